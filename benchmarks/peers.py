"""Our bundles beside their peers, on random weights of published shapes.

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
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import llama
import old_peers
from bundles import Place, load_loops
from targets import Target, target_table

from dijiang.bench.matrix import Test, plan_tests
from dijiang.bench.measure import Effort
from dijiang.bench.render import header_lines, tables
from dijiang.bench.report import Report
from dijiang.bench.runner import run_sides
from dijiang.bench.subject import Side
from dijiang.bench.traffic import Traffic
from dijiang.machine.describe import installed

HERE = Path(__file__).parent


def _dijiang(kind: str, place: Place) -> Side:
    precision, _, graph = kind.partition("-")
    options = (("graph", graph or "native"),)
    return replace(place, precision=precision, options=options).side(f"dijiang-{kind}", load_loops)


def _llama(kind: str, place: Place) -> Side:
    quantized, _, flash = kind.partition("-fa")
    file = llama.model(place.cache, place.preset, place.config, quantized)
    loads = partial(llama.LlamaBench, options=("-fa", flash) if flash else ())
    return _peer("llama.cpp", kind, str(file), loads, file.stat().st_size)


def _transformers(kind: str, place: Place) -> Side:
    from torch_models import DTYPES, Vanilla

    loads = partial(Vanilla, config=place.config, precision=kind, cache="dynamic")
    return _peer("transformers", kind, "", loads, _weights(place) * DTYPES[kind].itemsize)


def _published(kind: str, place: Place) -> Side:
    from torch_models import Published

    return _peer("published", kind, str(place.checkpoint), Published, 4 * _weights(place))


def _weights(place: Place) -> int:
    return sum(file.stat().st_size for file in place.checkpoint.glob("*.safetensors")) // 4


def _peer(name: str, kind: str, path: str, loads: Any, size: int) -> Side:
    facts = {"kind": name, "precision": kind, "graph": None, "bytes": size, "spec": None}
    return Side("-".join(filter(None, (name, kind))), path, loads, Traffic(size), facts)


#: First part of a side's name -> what makes it of the rest. dijiang: PRECISION or PRECISION-DIALECT, the
#: native one if none is named; llama.cpp: TYPE, -fa0 and -fa1: flash attention off, on.
MAKERS: dict[str, Callable[[str, Place], Side]] = {
    "dijiang": _dijiang,
    "llama.cpp": _llama,
    "transformers": _transformers,
    "published": _published,
}


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
        names = (name.partition("-") for name in self.sides.split())
        return [MAKERS[name](kind, place) for name, _, kind in names]

    def tests(self, threads: int | None = None) -> list[Test]:
        """Prompts at depth 0, and decoding by depth and way."""
        count = None if threads is None else str(threads)
        prompts, _ = plan_tests(self.prompts, "none", threads=count)
        decoding, _ = plan_tests("none", self.tokens, self.depths, threads=count)
        return prompts + [replace(test, way=way) for test in decoding for way in self.ways]


INT8, INT4 = "dijiang-int8 llama.cpp-q8_0", "dijiang-int4 llama.cpp-q4_0"
FLOATS, PUBLISHED = "dijiang-fp32 transformers-fp32 transformers-bf16", "dijiang-fp32 published"
P410, P70 = "pythia-410m", "pythia-70m"
GROUPS = {
    "int8": Group(P410, INT8, "128,512", "32", "0,2048"),
    "int8-8k": Group(P410, INT8, "none", "16", "8192", 4),
    "int4": Group(P410, INT4, "128,512", "32", "0,2048"),
    "int4-8k": Group(P410, INT4, "none", "16", "8192", 4),
    "fp32": Group(P410, FLOATS, "128,512", "16", "0,2048,8192", 6),
    # The published tables end at 2,048 positions.
    "published": Group(P410, PUBLISHED, "128,512", "1", "0,512,2032", 3),
    "70m-int8": Group(P70, INT8, "128,512", "128", "0,2048"),
    "70m-int4": Group(P70, INT4, "128,512", "128", "0,2048"),
    "70m-fp32": Group(P70, FLOATS, "128,512", "32", "0,2048,8192", 6),
    "70m-published": Group(P70, PUBLISHED, "128,512", "2", "0,512,2032", 3),
    "operator-int8": Group(P410, "dijiang-int8 dijiang-int8-ort", "512"),
    "operator-int4": Group(P410, "dijiang-int4 dijiang-int4-ort", "512"),
    "operator-70m": Group(P70, "dijiang-int8 dijiang-int8-ort", "512", "128"),
    "endless": Group(P410, "dijiang-int8", "none", "16", "0,1000000", 80),
    "endless-fp32": Group(P410, "dijiang-fp32", "none", "8", "0,1000000", 36),
    "flash-q8_0": Group(P410, "llama.cpp-q8_0-fa0 llama.cpp-q8_0-fa1", "512", "32", "0,2048", 9),
    "flash-q4_0": Group(P410, "llama.cpp-q4_0-fa0 llama.cpp-q4_0-fa1", "512", "32", "0,2048", 9),
    **{
        f"70m-loop-{precision}": Group(P70, f"dijiang-{precision}", turns=200, ways=("", "generate", "bare"))
        for precision in ("fp32", "int8", "int4")
    },
}


def _beside(label: str, run: str, test: str, must: float, stretch: float) -> Target:
    ours, theirs = GROUPS[run].sides.split()
    return Target(run, label, "over", must, stretch, (ours, test), (theirs, test))


O8 = "dijiang-int8"
SHARE = "410M int8 decode: weights at one byte x tokens/s / read bandwidth"
LOOP = "70M int8 loop overhead over bare run_with_iobinding"
FAR, NEAR = (O8, "tg16 @ d1000000"), (O8, "tg16")
RECORDS, BARE = (O8, "tg32 generate"), (O8, "tg32 bare")
TARGETS = (
    Target("int8", SHARE, "weights", 0.74, 0.80, (O8, "tg32")),
    _beside("410M int8 decode / llama.cpp Q8_0, depth 0", "int8", "tg32", 1.5, 1.8),
    _beside("410M int8 decode / llama.cpp Q8_0, depth 2048", "int8", "tg32 @ d2048", 6, 8),
    _beside("410M int8 decode / llama.cpp Q8_0, depth 8192", "int8-8k", "tg16 @ d8192", 20, 30),
    _beside("410M int4 decode / llama.cpp Q4_0, depth 0", "int4", "tg32", 1.3, 1.6),
    _beside("410M int4 decode / llama.cpp Q4_0, depth 2048", "int4", "tg32 @ d2048", 6, 8),
    _beside("410M int8 prefill 512 / llama.cpp Q8_0", "int8", "pp512", 3, 4),
    Target("endless", "410M int8 time per token, depth 10^6 / depth 0", "time", 1.02, None, FAR, NEAR),
    _beside("70M int8 decode / llama.cpp Q8_0, depth 0", "70m-int8", "tg128", 1.2, 1.5),
    Target("70m-int4", "70M int4 bundle bytes / parameters", "size", 0.75, None, ("dijiang-int4", "")),
    Target("70m-loop-int8", LOOP, "beyond", 0.05, 0.02, RECORDS, BARE),
)


def newest(document: dict[str, Any]) -> dict[str, Report]:
    """The latest report of each group, with the turns of earlier ones of the same commit."""
    groups: dict[str, Report] = {}
    runs = document["runs"] if "runs" in document else old_peers.read(document)
    for run in sorted(runs, key=lambda run: run["report"]["created"]):
        name, report = run["group"], run["report"]
        before = groups.get(name)
        same = before is not None and before["commit"] == report["commit"]
        groups[name] = old_peers.joined(before, report) if same else report
    return groups


def markdown(document: dict[str, Any]) -> str:
    """The whole page of a results file, of this layout or the older one."""
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


group_option = click.option(
    "--group", "names", type=click.Choice(list(GROUPS)), multiple=True, help="Default: all of them."
)
cache_option = click.option(
    "--cache",
    type=click.Path(path_type=Path, file_okay=False),
    default=HERE / ".peers",
    help="Where everything that is built lies.  [default: benchmarks/.peers]",
)


@click.group(help=__doc__)
def main() -> None:
    """See the module's text."""


@main.command()
@group_option
@cache_option
def prepare(names: tuple[str, ...], cache: Path) -> None:
    """Fetch and build llama.cpp; write checkpoints, bundles and GGUF files; time nothing."""
    cache.mkdir(parents=True, exist_ok=True)
    for name in names or GROUPS:
        click.echo(f"{name}: {GROUPS[name].preset}, {GROUPS[name].sides}", err=True)
        GROUPS[name].make(cache)


@main.command()
@group_option
@cache_option
@click.option("--threads", type=int, default=os.cpu_count(), show_default=True, help="Physical cores.")
@click.option("--rounds", type=click.IntRange(1), help="Turns. Default: the group's.")
@click.option("--minutes", type=float, default=60, show_default=True, help="Of a group, at most.")
@click.option("--output", type=click.Path(path_type=Path), help="JSON file to add to.")
def run(
    names: tuple[str, ...],
    cache: Path,
    threads: int,
    rounds: int | None,
    minutes: float,
    output: Path | None,
) -> None:
    """Measure groups and add them to OUTPUT; writes the Markdown beside it."""
    machine = f"{platform.machine()}-{os.cpu_count()}cpu"
    output = output or HERE / "results" / f"{time.strftime('%Y-%m-%d')}-{machine}-peers.json"
    output.parent.mkdir(exist_ok=True)
    known = json.loads(output.read_text()) if output.is_file() else {"runs": []}
    runs = known["runs"] if "runs" in known else old_peers.read(known)
    for name in names or GROUPS:
        group = GROUPS[name]
        effort = Effort(rounds or group.turns, 0.0, minutes, quiet=True, probe=False)
        say = partial(click.echo, err=True)
        say(name)
        report = run_sides([group.make(cache)], group.tests(threads), effort, provider="cpu", say=say)
        report["environment"]["packages"] |= installed(("transformers", "gguf"))
        runs.append({"group": name, "report": report})
        whole = {"llama.cpp": llama.version(cache), "runs": runs}
        output.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
        output.with_suffix(".md").write_text(markdown(whole), encoding="utf-8")
    sys.stdout.write(f"{output}\n")


@main.command()
@click.argument("results", type=click.Path(path_type=Path, exists=True, dir_okay=False))
def report(results: Path) -> None:
    """Print RESULTS as Markdown."""
    sys.stdout.write(markdown(json.loads(results.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
