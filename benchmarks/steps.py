"""Where the time of a step goes: the nodes of each graph, and whole steps of the graphs in turn.

    python benchmarks/steps.py CACHE_FOLDER -o REPORT.json

Weights are random. ONNX Runtime's profiler times the nodes, and adds some microseconds to
each. So whole steps are timed without it, by the bench: the graphs of a bundle take turns.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
from bundles import Place, load_graph

from dijiang.bench.matrix import Test
from dijiang.bench.measure import Effort
from dijiang.bench.runner import run_sides
from dijiang.bench.subject import Side, bundle_side
from dijiang.bundle.opened import Bundle, open_bundle
from dijiang.recipe import GRAPHS
from dijiang.runtime.sessions.base import PIECE
from dijiang.runtime.sessions.inference import open_inference
from dijiang.runtime.step import Step

PRECISIONS = ("fp32", "int8", "int4")
#: Tokens of the steps that are looked into: decoding, and a whole piece of a prompt.
LENGTHS = (1, PIECE)
#: Steps of a profile; tokens of a sample of decoding.
PROFILED, DECODED = 20, 32


def profile(bundle: Bundle, graph: str, length: int) -> list[dict[str, Any]]:
    """Kinds of nodes: how many there are, and their milliseconds in a step of `length` tokens (median)."""
    spec = bundle.manifest.spec
    with tempfile.TemporaryDirectory() as folder:
        session = open_inference(
            bundle.graph_file(graph), operators=GRAPHS[graph].operators, profile=Path(folder, "steps")
        )
        step = Step.of(np.arange(length)[None] % spec.vocab_size, np.zeros(1, np.int64), np.array([[length - 1]]))
        inputs = [value.name for value in session.get_inputs()]
        states = [name for name in inputs if "recurrent_state" in name]
        feeds = step.feeds(inputs) | {name: np.zeros((1, *spec.state_shape), np.float32) for name in states}
        for _ in range(PROFILED + 1):
            session.run(None, feeds)
        events = json.loads(Path(session.end_profiling()).read_text())
    times: dict[str, list[float]] = {}
    kinds: dict[str, str] = {}
    for event in events:
        if event["cat"] == "Node" and event["name"].endswith("_kernel_time"):
            times.setdefault(event["name"], []).append(event["dur"])
            kinds[event["name"]] = event["args"]["op_name"]
    spent: Counter[str] = Counter()
    for node, found in times.items():
        spent[kinds[node]] += float(np.median(found[1:])) / 1e3  # the first step packs weights
    counts = Counter(kinds.values())
    return [{"kind": kind, "nodes": counts[kind], "ms": ms} for kind, ms in spent.most_common()]


def sides(place: Place) -> list[Side]:
    """The graphs of a bundle that are for the CPU; those of one bundle take turns."""
    bundle = open_bundle(place.bundle, check_hashes=False)
    graphs = [graph for graph in bundle.manifest.graphs if GRAPHS[graph].fused and not GRAPHS[graph].exact]
    return [bundle_side(f"{place.precision} {graph}", bundle, partial(load_graph, graph=graph)) for graph in graphs]


@click.command()
@click.argument("cache", type=click.Path(file_okay=False, path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(dir_okay=False, path_type=Path))
@click.option("--preset", default="pythia-410m", show_default=True)
def main(cache: Path, output: Path, preset: str) -> None:
    """Measure all precisions, as one report of the bench with a table of nodes for each side and length."""
    groups = [sides(Place(cache, preset, precision, "cpu")) for precision in PRECISIONS]
    tests = [Test("tg", DECODED), Test("pp", PIECE)]
    report = run_sides(groups, tests, Effort(10, 10.0), provider="cpu", say=click.echo)
    nodes = []
    for side in (side for group in groups for side in group):
        bundle, graph = open_bundle(side.path, check_hashes=False), side.name.split()[1]
        for length in LENGTHS:
            nodes.append({"model": side.name, "tokens": length, "kinds": profile(bundle, graph, length)})
    found = {"preset": preset, "report": report, "nodes": nodes}
    output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
