"""Where the time of a step goes: the nodes of each graph, and whole steps of the graphs in turn.

    python benchmarks/steps.py CACHE_FOLDER -o REPORT.json

Weights are random. ONNX Runtime's profiler times the nodes, and adds some microseconds to
each. So whole steps are timed without it, in blocks in random order within one process.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import numpy as np
from bundles import Place

import dijiang
from dijiang.bundle.opened import Bundle, open_bundle
from dijiang.machine.bandwidth import measure_bandwidth
from dijiang.machine.describe import describe_cpu
from dijiang.recipe import GRAPHS
from dijiang.runtime.sessions.inference import open_inference
from dijiang.runtime.step import Step

PRECISIONS = ("fp32", "int8", "int4")
#: Tokens of a step: decoding, and a whole piece of a prompt.
LENGTHS = (1, 256)
#: Steps of a profile; blocks of a comparison, and decode steps or pieces in a block.
PROFILED, BLOCKS, TOGETHER = 20, 20, {1: 16, 256: 1}


def profile(bundle: Bundle, graph: str, length: int) -> list[dict[str, Any]]:
    """Kinds of nodes: how many there are, and their milliseconds in a step of `length` tokens (median)."""
    spec = bundle.manifest.spec
    with tempfile.TemporaryDirectory() as folder:
        session = open_inference(
            bundle.graph_file(graph), operators=GRAPHS[graph].operators, profile=Path(folder, "steps")
        )
        step = Step.of(np.arange(length)[None] % spec.vocab_size, np.zeros(1, np.int64), np.array([[length - 1]]))
        states = [value.name for value in session.get_inputs() if "recurrent_state" in value.name]
        feeds = step.arrays | {name: np.zeros((1, *spec.state_shape), np.float32) for name in states}
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


def in_turn(bundle: Bundle, graphs: list[str], length: int) -> dict[str, Any]:
    """Milliseconds of a step of each graph, and its ratio to the first graph's, by blocks in random order."""
    models = [dijiang.load(bundle.path, graph=graph, check_hashes=False) for graph in graphs]
    ids = np.arange(length)[None] % bundle.manifest.spec.vocab_size
    states = [model.new_state() for model in models]
    times = np.zeros((BLOCKS + 1, len(models)))
    random = np.random.default_rng(0)
    for block in times:
        for at in random.permutation(len(models)):
            started = time.perf_counter()
            for _ in range(TOGETHER[length]):
                models[at].forward(ids, states[at])
            block[at] = (time.perf_counter() - started) / TOGETHER[length] * 1e3
    times = times[1:]
    ratios = times / times[:, :1]
    return {
        graph: {
            "ms": float(np.median(times[:, at])),
            "ratio": float(np.median(ratios[:, at])),
            "quartiles": [float(q) for q in np.percentile(ratios[:, at], (25, 75))],
        }
        for at, graph in enumerate(graphs)
    }


def measure(place: Place) -> dict[str, Any]:
    """One precision: graphs in turn, and their profiles."""
    bundle = open_bundle(place.bundle, check_hashes=False)
    graphs = [graph for graph in bundle.manifest.graphs if GRAPHS[graph].fused and not GRAPHS[graph].exact]
    return {
        "precision": place.precision,
        "reads": bundle.manifest.graphs[graphs[0]].reads["step"] + 2 * bundle.manifest.spec.state_bytes,
        "lengths": {
            str(length): {
                "steps": in_turn(bundle, graphs, length),
                "nodes": {graph: profile(bundle, graph, length) for graph in graphs},
            }
            for length in LENGTHS
        },
    }


@click.command()
@click.argument("cache", type=click.Path(file_okay=False, path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(dir_okay=False, path_type=Path))
@click.option("--preset", default="pythia-410m", show_default=True)
def main(cache: Path, output: Path, preset: str) -> None:
    """Measure all precisions; the bandwidth of the memory before, between and after them."""
    bandwidths, rows = [asdict(measure_bandwidth())], []
    for precision in PRECISIONS:
        rows.append(measure(Place(cache, preset, precision, "cpu")))
        bandwidths.append(asdict(measure_bandwidth()))
    found = {
        "preset": preset,
        "blocks": BLOCKS,
        "cpu": describe_cpu(Path("/")),
        "bandwidths": bandwidths,
        "precisions": rows,
    }
    output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
