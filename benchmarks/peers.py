"""Our bundles beside their peers, on random weights of published shapes: the groups of peers.json.

    pip install -r benchmarks/requirements.txt      # in an environment of its own
    python benchmarks/peers.py prepare              # builds llama.cpp and all models: minutes, once
    python benchmarks/peers.py run                  # every group; or --group int8 --group endless
    python benchmarks/peers.py report FILE          # the Markdown again

Reports are added to one JSON file; of a group, the newest commit counts. Nothing else should run
meanwhile.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import click
import llama
from bundles import Place, load_loops, peer_side
from plan import HERE, RESULTS, keep, kept
from targets import Target, target_table

from dijiang.bench.matrix import Test, plan_tests
from dijiang.bench.measure import Effort, Samples, Turn
from dijiang.bench.render import header_lines, tables
from dijiang.bench.report import Report, seconds_of, target
from dijiang.bench.results import summarise
from dijiang.bench.runner import run_sides
from dijiang.bench.subject import Side, Traffic, load_bundle
from dijiang.machine.describe import installed
from dijiang.machine.sensors import Meter


def make_side(name: str, place: Place) -> Side:
    """A side of its name; what it runs is written if it is not there.

    dijiang-PRECISION or dijiang-PRECISION-GRAPH, the native one if none is named; llama.cpp-TYPE, -fa0
    and -fa1: flash attention off, on; transformers-PRECISION; published.
    """
    peer, _, kind = name.partition("-")
    if peer == "dijiang":
        precision, _, graph = kind.partition("-")
        ours = replace(place, precision=precision, options=(("graph", graph or "native"),))
        return ours.side(name, load_loops)
    if peer == "llama.cpp":
        quantized, _, flash = kind.partition("-fa")
        path = llama.model(place.cache, place.preset, place.config, quantized)
        loads: Any = partial(llama.LlamaBench, options=("-fa", flash) if flash else ())
        weights = path.stat().st_size
    else:
        import torch_models

        path, loads = place.checkpoint, torch_models.Published
        weights = sum(file.stat().st_size for file in path.glob("*.safetensors"))
        if peer == "transformers":
            loads = partial(torch_models.Vanilla, config=place.config, precision=kind, cache="dynamic")
            weights = weights // 4 * torch_models.DTYPES[kind].itemsize
    return peer_side(name, peer, kind, path, loads, weights)


@dataclass(frozen=True)
class Group:
    """Sides that take turns on every test; the first is compared with the others.

    prompts, tokens, depths: as `dijiang bench -p -n -d`.  turns: repetitions.  ways: of decoding.
    """

    preset: str
    sides: str
    prompts: str = "none"
    tokens: str = "32"
    depths: str = "0"
    turns: int = 15
    ways: tuple[str, ...] = ("",)

    def make(self, cache: Path) -> list[Side]:
        """The sides; what they run is written if it is not there."""
        place = Place(cache, self.preset, "", "cpu", dtype="float32")
        return [make_side(name, place) for name in self.sides.split()]

    def tests(self, threads: int | None = None) -> list[Test]:
        """Prompts at depth 0, and decoding by depth and way."""
        count = None if threads is None else str(threads)
        prompts, _ = plan_tests(self.prompts, "none", threads=count)
        decoding, _ = plan_tests("none", self.tokens, self.depths, threads=count)
        return prompts + [replace(test, way=way) for test in decoding for way in self.ways]


PLAN = json.loads((HERE / "peers.json").read_text(encoding="utf-8"))
GROUPS = {name: Group(**group) for name, group in PLAN["groups"].items()}
TARGETS = [Target(**target) for target in PLAN["targets"]]


def newest(document: dict[str, Any]) -> dict[str, Report]:
    """The latest report of each group, with the turns of earlier ones of the same commit."""
    groups: dict[str, Report] = {}
    for run in sorted(document["runs"], key=lambda run: run["report"]["created"]):
        before, report = groups.get(run["group"]), run["report"]
        same = before is not None and before["commit"] == report["commit"]
        groups[run["group"]] = joined(before, report) if same else report
    return groups


def samples_of(result: Report) -> Samples:
    """The samples that a result was made of; single tokens are not taken apart again."""
    other, load, peak = result["contention"], result["load_model"], target(result)["memory"]["max_ram"]
    pairs = zip(other["turns"], seconds_of(result), other["waited"], other["stolen"], strict=True)
    return Samples(
        load and load["latency"]["mean"],
        result["provider"],
        result["session"],
        [Turn(number, [seconds], waited, stolen) for number, seconds, waited, stolen in pairs],
        [Turn(**turn) for turn in other["disturbed"]],
        {"host": None if peak is None else round(1e6 * peak)},
        alone=result["alone"],
        interleaved=result["interleaved"],
    )


def joined(before: Report, after: Report) -> Report:
    """Two reports of one group and commit as one, the turns of the second after those of the first."""
    first = 1 + max(rate["turn"] or 0 for rate in before["bandwidth"])
    found = {(r["model"], Test.of(r)): samples_of(r) for r in before["results"]}
    for result in after["results"]:
        later = samples_of(result)
        known = found.setdefault((result["model"], Test.of(result)), replace(later, turns=[], disturbed=[]))
        known.turns += [replace(turn, number=turn.number + first) for turn in later.turns]
        known.disturbed += [replace(turn, number=turn.number + first) for turn in later.disturbed]
    moved = [b | {"turn": None if b["turn"] is None else b["turn"] + first} for b in after["bandwidth"]]
    bandwidth = before["bandwidth"] + moved
    middle = median(b["bytes_per_second"] for b in bandwidth if b["turn"] is not None)
    sides = [
        Side(m["name"], m["path"], load_bundle, Traffic(**m["traffic"]), m, m["baseline_of"])
        for m in after["models"]
    ]
    tests = list(dict.fromkeys(test for _, test in found))
    figures = summarise([sides], tests, found, {test.threads: middle for test in tests}, Meter([]))
    return after | figures | {"bandwidth": bandwidth, "errors": before["errors"] + after["errors"]}


def markdown(document: dict[str, Any]) -> str:
    """The whole page of a results file."""
    groups = newest(document)
    latest = max(groups.values(), key=lambda report: report["created"])
    header, numbers = header_lines(latest), target_table(TARGETS, groups)
    header += [", ".join(known)] if (known := document["llama.cpp"].values()) else []
    parts = [
        "# Side by side with peers",
        "\n".join(f"- {line}" for line in header),
        "Written by `benchmarks/peers.py`; every sample is in the JSON file of the same name. Ratios "
        "pair the samples of one turn. Memory limit: the ratio at which the first side would only read "
        "its weights, once a token or a prompt.",
        *(["## Numbers to reach", numbers] if numbers else []),
        "## Groups",
    ]
    for name, report in groups.items():
        parts += [f"### {name}", f"{report['created']}, commit {report['commit']}", *tables(report)]
    return "\n\n".join(parts) + "\n"


names_option = click.option(
    "--group", "names", type=click.Choice(list(GROUPS)), multiple=True, default=list(GROUPS)
)
cache_option = click.option(
    "--cache", type=click.Path(path_type=Path), default=HERE / ".peers", help="For all that is built."
)


@click.group(help=__doc__)
def main() -> None:
    """See the module's text."""


@main.command()
@names_option
@cache_option
def prepare(names: tuple[str, ...], cache: Path) -> None:
    """Fetch and build llama.cpp; write checkpoints, bundles and GGUF files; time nothing."""
    cache.mkdir(parents=True, exist_ok=True)
    for name in names:
        click.echo(f"{name}: {GROUPS[name].preset}, {GROUPS[name].sides}", err=True)
        GROUPS[name].make(cache)


@main.command()
@names_option
@cache_option
@click.option("--threads", type=int, default=os.cpu_count(), show_default=True, help="Physical cores.")
@click.option("--rounds", type=click.IntRange(1), help="Turns. Default: the group's.")
@click.option("--minutes", type=float, default=60, show_default=True, help="Of a group, at most.")
@click.option("--output", type=click.Path(path_type=Path), help="JSON file to add to.")
def run(
    names: tuple[str, ...], cache: Path, threads: int, rounds: int | None, minutes: float, output: Path | None
) -> None:
    """Measure groups and add them to OUTPUT; writes the Markdown beside it."""
    day, machine = time.strftime("%Y-%m-%d"), f"{platform.machine()}-{os.cpu_count()}cpu"
    output = output or RESULTS / f"{day}-{machine}-peers.json"
    document, say = kept(output) or {"runs": []}, partial(click.echo, err=True)
    for name in names:
        say(name)
        group, effort = GROUPS[name], Effort(rounds or GROUPS[name].turns, 0.0, minutes, quiet=True, probe=False)
        report = run_sides([group.make(cache)], group.tests(threads), effort, provider="cpu", say=say)
        report["environment"]["packages"] |= installed(("transformers", "gguf"))
        document["runs"].append({"group": name, "report": report})
        document["llama.cpp"] = llama.version(cache)
        keep(document, output)
        output.with_suffix(".md").write_text(markdown(document), encoding="utf-8")
    sys.stdout.write(f"{output}\n")


@main.command()
@click.argument("results", type=click.Path(path_type=Path, exists=True, dir_okay=False))
def report(results: Path) -> None:
    """Print RESULTS as Markdown."""
    sys.stdout.write(markdown(kept(results)))


if __name__ == "__main__":
    main()
