"""The verbs of the command line, one file each: click declarations and printing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import click

from ..recipe import AUTO, GRAPHS
from ..runtime.sessions.providers import PROVIDERS


class Row(Protocol):
    """A row of a table that the command line offers."""

    @property
    def help(self) -> str: ...


def row_option(
    *names: str, rows: Mapping[str, Row], default: str | None, extra: str = "", **options: Any
) -> Callable[[Any], Any]:
    """An option whose choices and help are the rows of a table; `extra`: a choice that is no row."""
    choices = [*([AUTO] if extra else []), *rows]
    help_text = "; ".join([f"{name}: {row.help}" for name, row in rows.items()])
    return click.option(
        *names,
        type=click.Choice(choices),
        default=default,
        show_default=default is not None,
        help=f"{help_text}{f'; {AUTO}: {extra}' if extra else ''}.",
        **options,
    )


BUNDLE = click.argument("bundle", type=click.Path(path_type=Path))
PROVIDER = click.option(
    "--provider",
    default=AUTO,
    show_default=True,
    help=f"{', '.join(PROVIDERS)}, with :N for the N-th GPU; auto: the best that is there.",
)
GRAPH = click.option(
    "--graph",
    "--dialect",
    type=click.Choice(list(GRAPHS)),
    help="Of the bundle. Default: the best that runs here.",
)
THREADS = click.option("-t", "--threads", type=click.IntRange(1), help="Default: all cores it may use.")
JSON = click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
PROGRESS = click.option(
    "--progress/--no-progress", default=None, help="Bars on stderr; default: if it is a terminal."
)
TEXT = click.option(
    "--text",
    type=click.Path(path_type=Path),
    help="Text to verify on, for perplexity; default: random token ids, or (int8, int4) text of its own.",
)


def print_table(rows: Iterable[tuple[str, str]]) -> None:
    """Names and values in two columns, on stdout."""
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None)
    for name, value in rows:
        table.add_row(name, value)
    Console(soft_wrap=True, highlight=False, markup=False).print(table)
