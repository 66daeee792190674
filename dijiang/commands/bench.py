"""dijiang bench."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

SIZES = "A size, a list 0,2048 or a range 128-512+128, 1-16*2."


@click.command()
@click.argument("bundles", nargs=-1, type=click.Path(path_type=Path))
@click.option(
    "-p", "prompts", default="512", show_default=True, help=f"Prompt tokens. {SIZES} none: off."
)
@click.option("-n", "generations", default="128", show_default=True, help="Generated tokens; none: off.")
@click.option("-d", "depths", default="0", show_default=True, help="Tokens already in the state.")
@click.option("-b", "batches", default="1", show_default=True, help="Sequences side by side.")
@click.option("-t", "threads", help="Threads. Default: all physical cores.")
@click.option("-r", "repetitions", type=int, default=10, show_default=True, help="At least.")
@click.option("--seconds", type=float, default=10.0, show_default=True, help="At least, each test.")
@click.option("--provider", default="auto", show_default=True)
@click.option("-o", "form", type=click.Choice(["md", "json", "jsonl", "csv"]), default="md")
@click.option("-f", "--file", type=click.Path(path_type=Path), help="Write there, not to stdout.")
@click.option("--explain", is_flag=True, help="Print the formula of every figure.")
def bench(
    bundles: tuple[Path, ...], form: str, file: Path | None, explain: bool, **options: Any
) -> None:
    """Measure BUNDLES: speed, memory, energy, and how close that is to what the memory allows."""
    from ..runtime.bench.explain import explain as formulas
    from ..runtime.bench.render import FORMATS, require, write
    from ..runtime.bench.runner import Options, run_bench

    if explain:
        click.echo(formulas())
    if not bundles:
        if explain:
            return
        raise click.UsageError("give one bundle or more")
    report = run_bench(bundles, Options(**options), say=lambda text: click.echo(text, err=True))
    write(FORMATS[form](report), file)
    require(report)
