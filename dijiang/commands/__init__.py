"""The verbs of the command line, one file each: click declarations and printing."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import Field, fields
from functools import wraps
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import click
from click.core import ParameterSource

from ..recipe import AUTO, GRAPHS
from ..runtime.options import FILTERS, MOST_THREADS
from ..typed import strict

if TYPE_CHECKING:
    from rich.console import Console

#: Columns of a table that is read by another program.
PIPE_WIDTH = 10_000
#: What Windows puts before a text.
BYTE_ORDER_MARK = "\ufeff"


class Row(Protocol):
    """A row of a table that the command line offers."""

    @property
    def help(self) -> str: ...


def row_option(*names: str, rows: Mapping[str, Row], default: str | None, extra: str = "") -> Callable[[Any], Any]:
    """An option whose choices and help are the rows of a table; `extra`: a choice that is no row."""
    choices = [*([AUTO] if extra else []), *rows]
    help_text = "; ".join([f"{name}: {row.help}" for name, row in rows.items()])
    return click.option(
        *names,
        type=click.Choice(choices),
        default=default,
        show_default=default is not None,
        help=f"{help_text}{f'; {AUTO}: {extra}' if extra else ''}.",
    )


def options_of(*classes: type) -> Callable[[Any], Any]:
    """The options of options classes, see `runtime.options`, in their order."""
    declared = [one for cls in classes for one in fields(cls)]

    def declare(command: Any) -> Any:
        for one in reversed(declared):
            command = _option(one)(command)
        return command

    return declare


def _option(one: Field[Any]) -> Callable[[Any], Any]:
    """One field as a click option; ranges are checked where they are declared, in Python."""
    facts, flag = one.metadata, f"--{one.name.replace('_', '-')}"
    names, several = list(facts["flags"] or (flag,)), one.default == ()
    shown = not several and one.default is not None
    if facts["kind"] is bool:
        negated = one.default is None
        names = [f"{flag}/--no-{flag[2:]}" if negated else flag]
        return click.option(*names, is_flag=True, default=one.default, help=facts["help"])
    return click.option(
        *names,
        one.name,
        type=click.Choice(facts["choices"]) if facts["choices"] else TYPES[facts["kind"]],
        default=None if several else one.default,
        multiple=several,
        show_default=shown,
        help=facts["help"],
    )


def taken(cls: type, options: dict[str, Any]) -> dict[str, Any]:
    """The options of one options class, taken out of all that a command has."""
    return {one.name: options.pop(one.name) for one in fields(cls)}


def tell(text: str, *, nl: bool = True) -> None:
    """Something for people: on stderr. Where nobody can read it, as on a full disk, the work goes on without."""
    try:
        click.echo(text, err=True, nl=nl)
    except OSError:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - for the whole process


def say(text: str) -> None:
    """A remark: in brackets, so that it is not taken for what the command makes."""
    tell(f"[{text}]")


def given_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the options that the command line gives, and no default."""
    source = click.get_current_context().get_parameter_source
    return {name: value for name, value in options.items() if source(name) is not ParameterSource.DEFAULT}


def say_idle(chosen: Any) -> None:
    """Say which filters of draws the command line gives where nothing is drawn; chosen: a `Generation`."""
    idle = given_options(dict.fromkeys(FILTERS))
    if idle and chosen.temperature == 0:
        flags = ", ".join(map(flag_of, idle))
        say(f"{flags}: of no effect at temperature 0, which takes the most likely token; give --temperature, too")


def refuse_given(names: Iterable[str], reason: str) -> None:
    """UsageError if the command line gives one of these parameters, which would change nothing."""
    for name in given_options(dict.fromkeys(names)):
        raise click.UsageError(f"{flag_of(name)} would change nothing {reason}; leave it out")


def flag_of(name: str) -> str:
    """How a user writes a parameter of the command that runs: the long way, if there is one."""
    flags = next(one for one in click.get_current_context().command.params if one.name == name).opts
    return next((flag for flag in flags if flag.startswith("--")), flags[0])


#: Kind of an option -> how the command line reads it.
TYPES: dict[type, type] = {Real: float, Integral: int, str: str}
#: In what a command notes: the revision asked for, and whether a model is the Hub's.
REVISION, OF_HUB = "dijiang.revision", "dijiang.of_hub"


class ModelFolder(click.Path):
    """A folder, or the name of a repository of the Hub, which becomes a folder of its cache."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """The folder; HubError if the Hub does not give it."""
        from ..hub import folder_of

        given = os.fsdecode(super().convert(value, param, ctx))
        found = folder_of(given, ctx.meta.get(REVISION) if ctx else None)
        if ctx is not None and found != Path(given):
            ctx.meta[OF_HUB] = True
        return found


def model_folder(name: str, **more: Any) -> Callable[[Any], Any]:
    """An argument of ModelFolders, one unless click's `nargs` says otherwise, and their --revision."""

    def remember(ctx: click.Context, _: click.Parameter, value: str | None) -> None:
        ctx.meta[REVISION] = value

    def declare(command: Any) -> Any:
        @wraps(command)
        def checked(*values: Any, **options: Any) -> Any:
            meta = click.get_current_context().meta
            if meta.get(REVISION) is not None and OF_HUB not in meta:
                raise click.UsageError("--revision would change nothing: no model is the Hub's; leave it out")
            return command(*values, **options)

        text = "Branch, tag or commit of a model of the Hub, which is given as ORG/NAME."
        option = click.option("--revision", is_eager=True, expose_value=False, callback=remember, help=text)
        return click.argument(name, type=ModelFolder(), **more)(option(checked))

    return declare


FILE = click.Path(path_type=Path)
BUNDLE = click.argument("bundle", type=FILE)
SIGNERS = click.option(
    "--require-signature", type=FILE, help="File of public keys; one of them must have signed the bundle."
)
JSON = click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
PROGRESS = click.option(
    "--progress/--no-progress", default=None, help="Bars on stderr; default: if it is a terminal."
)
TEXT = click.option(
    "--text",
    type=FILE,
    help="Text to verify on, for perplexity; default: random ids, or (int8, int4) text that the bundle generates.",
)


def graph_option(help: str) -> Callable[[Any], Any]:
    """One of a bundle's graphs."""
    return click.option("--graph", "--dialect", type=click.Choice(list(GRAPHS)), help=help)


def threads_option(help: str) -> Callable[[Any], Any]:
    """How many threads; `help` ends with what is used otherwise."""
    return click.option("-t", "--threads", type=click.IntRange(1, MOST_THREADS), help=help)


def printable(text: str) -> str:
    """Text of any origin for a terminal: control characters, which could command it, are shown as escapes."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def spoken(text: str) -> str:
    """A model's text for stdout: on a terminal its control characters, but line ends and tabs, are escapes."""
    if not sys.stdout.isatty():
        return text
    return "".join(c if c in "\n\t" or c >= "\xa0" else printable(c) for c in text)


def print_json(value: Any) -> None:
    """One line of JSON on stdout; null for a number that JSON cannot say."""
    click.echo(json.dumps(strict(value), allow_nan=False))


def print_table(rows: Iterable[tuple[str, str]]) -> None:
    """Names and values in two columns, on stdout."""
    from rich.table import Table

    table = Table(show_header=False, box=None)
    for name, value in rows:
        table.add_row(name, printable(value))
    console().print(table)


def console() -> Console:
    """Standard output for tables; into a pipe nothing is wrapped or cut."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else PIPE_WIDTH
    return Console(width=width, soft_wrap=True, highlight=False, markup=False)
