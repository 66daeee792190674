"""Our bundles beside their peers, on random weights of published shapes.

    pip install -r benchmarks/requirements.txt      # in an environment of its own
    python benchmarks/peers.py prepare              # builds llama.cpp and all models: minutes, once
    python benchmarks/peers.py run                  # every group; or --group int8 --group endless
    python benchmarks/peers.py report FILE          # the Markdown again

Results are appended to one JSON file; of a group, the newest commit counts. Nothing else should run
meanwhile.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import click
from peer_cases import GROUPS, bundle_kind, gguf_type
from peer_report import markdown
from rich.console import Console

from dijiang.models.presets import PRESETS

HERE = Path(__file__).parent
err = Console(stderr=True)

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


def _chosen(names: tuple[str, ...]) -> dict[str, Any]:
    return {name: group for name, group in GROUPS.items() if not names or name in names}


@main.command()
@group_option
@cache_option
@click.option("--threads", type=int, default=os.cpu_count(), show_default=True)
def prepare(names: tuple[str, ...], cache: Path, threads: int) -> None:
    """Fetch and build llama.cpp; write checkpoints, bundles, GGUF files and states; time nothing."""
    from peer_llama import model
    from peer_ours import Ours, bundle

    cache.mkdir(parents=True, exist_ok=True)
    chosen = _chosen(names).values()
    for preset, side in sorted({(group.preset, side) for group in chosen for side in group.sides}):
        err.print(f"{preset}: {side}")
        if kind := gguf_type(side):
            model(cache, preset, PRESETS[preset], kind)
        elif kind := bundle_kind(side):
            ours = Ours(bundle(cache, preset, kind), threads)
            groups = [group for group in chosen if group.preset == preset and side in group.sides]
            for depth in sorted({depth for group in groups for depth in group.depths}):
                ours.state(depth)


@main.command()
@group_option
@cache_option
@click.option("--threads", type=int, default=os.cpu_count(), show_default=True, help="Physical cores.")
@click.option("--rounds", type=click.IntRange(1), help="Default: the group's.")
@click.option("--minutes", type=float, default=60, show_default=True, help="Of a group, at most.")
@click.option("--output", type=click.Path(path_type=Path), help="JSON file to append to.")
def run(
    names: tuple[str, ...],
    cache: Path,
    threads: int,
    rounds: int | None,
    minutes: float,
    output: Path | None,
) -> None:
    """Measure groups and append them to OUTPUT; writes the Markdown beside it."""
    from dataclasses import replace

    from peer_llama import version
    from peer_run import run as measure

    machine = f"{platform.machine()}-{os.cpu_count()}cpu"
    output = output or HERE / "results" / f"{time.strftime('%Y-%m-%d')}-{machine}-peers.json"
    output.parent.mkdir(exist_ok=True)
    records = json.loads(output.read_text())["records"] if output.is_file() else []
    for name, group in _chosen(names).items():
        group = replace(group, rounds=rounds) if rounds else group
        for record in measure(name, group, cache, threads, minutes, err.print):
            whole = {"llama.cpp": version(cache), "records": [*records, record]}
            output.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
            output.with_suffix(".md").write_text(markdown(whole), encoding="utf-8")
        records.append(record)
    sys.stdout.write(f"{output}\n")


@main.command()
@click.argument("results", type=click.Path(path_type=Path, exists=True, dir_okay=False))
def report(results: Path) -> None:
    """Print RESULTS as Markdown."""
    sys.stdout.write(markdown(json.loads(results.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
