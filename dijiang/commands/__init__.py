"""Commands that outgrew cli.py: click declarations and printing, one file a verb."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import click

BUNDLE = click.argument("bundle", type=click.Path(path_type=Path))
PROVIDER = click.option(
    "--provider",
    default="auto",
    show_default=True,
    help="cpu, cuda, tensorrt, tensorrt_rtx, ort-tensorrt or ort-tensorrt-rtx, with :N for the N-th "
    "GPU; auto: the best that is there.",
)
THREADS = click.option("-t", "--threads", type=click.IntRange(1), help="Default: all cores it may use.")
JSON = click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
PROGRESS = click.option(
    "--progress/--no-progress", default=None, help="Bars on stderr; default: if it is a terminal."
)


def print_table(rows: Iterable[tuple[str, str]]) -> None:
    """Names and values in two columns, on stdout."""
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None)
    for name, value in rows:
        table.add_row(name, value)
    Console(soft_wrap=True, highlight=False, markup=False).print(table)
