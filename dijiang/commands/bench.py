"""dijiang bench."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import click

from ..errors import BenchError
from ..files import check_file
from . import FILE, model_folder, refuse_given, tell

SIZES = "A size, a list 0,2048 or a range 128-512+128, 1-16*2."


@click.command()
@model_folder("bundles", nargs=-1)
@click.option("-p", "prompts", default="512", show_default=True, help=f"Prompt tokens. {SIZES} none: off.")
@click.option("-n", "generations", default="128", show_default=True, help="Generated tokens; none: off.")
@click.option("-d", "depths", default="0", show_default=True, help="Tokens already in the state.")
@click.option("-b", "batches", default="1", show_default=True, help="Sequences side by side.")
@click.option("-t", "threads", help="Threads. Default: all cores it may use.")
@click.option("-r", "repetitions", type=int, default=10, show_default=True, help="Of each test, at least.")
@click.option("--seconds", type=float, default=10.0, show_default=True, help="At least, each test.")
@click.option("--provider", default="auto", show_default=True)
@click.option("--baseline", type=click.Choice(["transformer"]), help="Compare with one of the same shape.")
@click.option(
    "--cache",
    type=click.Choice(["fp32", "fp16", "int8"]),
    default="fp16",
    show_default=True,
    help="Keys and values of the baseline.",
)
@click.option("-o", "form", type=click.Choice(["md", "json", "jsonl", "csv", "html", "llama-bench"]), default="md")
@click.option("-f", "--file", type=FILE, help="Write there, not to stdout.")
@click.option("--plot", type=FILE, help="All pictures in one .png or .svg file.")
@click.option("--compare", nargs=2, type=FILE, help="Two JSON reports, older first: exit 1 if a test got slower.")
@click.option("--threshold", type=float, default=5.0, show_default=True, help="Percent that --compare allows.")
@click.option("--explain", is_flag=True, help="Print the formula of every figure.")
def bench(
    bundles: tuple[Path, ...],
    baseline: str | None,
    cache: str,
    form: str,
    file: Path | None,
    plot: Path | None,
    compare: tuple[Path, Path] | None,
    threshold: float,
    explain: bool,
    **options: Any,
) -> None:
    """Measure BUNDLES: speed, memory, energy, and how close that is to what the memory allows."""
    from ..bench.plots import check_plot, import_matplotlib, save_plot
    from ..bench.render import FORMATS, require, write
    from ..bench.render import explain as formulas
    from ..bench.runner import Options, run_bench

    if baseline is None:
        refuse_given(("cache",), "without --baseline")
    if compare is None:
        refuse_given(("threshold",), "without --compare")
    else:
        refuse_given(("bundles", "plot", "baseline", *options), "beside --compare")
    if form == "llama-bench" and options["batches"] != "1":
        raise click.UsageError("llama-bench tells of one sequence at a time; leave -b out, or choose another -o")
    if explain:
        if form != "md" and file is None:
            raise click.UsageError(f"--explain would stand before the {form} on stdout; give --file too")
        click.echo(formulas())
    if compare is not None:
        _compare(*compare, threshold / 100, form, file)
        return
    if not bundles:
        if explain:
            return
        raise click.UsageError("give one bundle or more")
    if file is not None:
        check_file(file, BenchError)
        if plot is not None and os.path.abspath(file) == os.path.abspath(plot):
            raise click.UsageError("--file and --plot have one name; give two")
    if form == "html" or plot is not None:
        import_matplotlib()
    if plot is not None:
        check_plot(plot)
    build = None
    if baseline is not None:
        from ..bench.transformer import build_transformer

        build = partial(build_transformer, cache=cache)
    options |= {"baseline": baseline, "cache": cache}
    report = run_bench(bundles, Options(**options), baseline=build, say=tell)
    if report["results"] or file is None:  # what stands there may be another day's
        write(FORMATS[form](report), file)
    if plot is not None:
        save_plot(report, plot)
    require(report)


def _compare(before: Path, after: Path, threshold: float, form: str, file: Path | None) -> None:
    from ..bench import compare
    from ..bench.render import write
    from ..bench.report import read_report

    if form not in ("md", "json"):
        raise click.UsageError("--compare writes md or json")
    if file is not None and os.path.realpath(file) in map(os.path.realpath, (before, after)):
        raise BenchError(f"{file} is a report that is compared; choose another file")
    found = compare.compare(read_report(before), read_report(after), threshold=threshold)
    write(compare.to_markdown(found) if form == "md" else json.dumps(found, indent=1), file)
    compare.require(found, threshold)
