"""Writes pages from what they are about: tables of `dijiang.recipe`, reports, commands, docstrings, decisions.

`make docs` runs it. A test compares the pages with what they are made of.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click
from markdown_parts import table, words
from measured.capacity import capacity, first_tokens, memories
from measured.performance import costs, gpus, performance
from measured.real import real
from measured.rounding import rounding
from messages import messages

import dijiang
from dijiang.cli import STATUSES, main
from dijiang.doctor.support import support
from dijiang.environment import VARIABLES
from dijiang.recipe import AUTO, GRAPHS, PRECISIONS, PROVIDERS, SCHEMES, TARGETS, by_target
from dijiang.recipe.precisions import EMBEDDING_SHARE
from dijiang.runtime.options import Generation, Loading

HERE = Path(__file__).parent
ADR = HERE / "adr"
HEAD = """# Recipes

This page is made from `dijiang/recipe/` by `make docs`. Do not edit it.

A bundle is made of a precision, one or more graphs, and a target. `dijiang export` decides all of it once. The
manifest keeps the result, the *recipe* of the bundle.
"""


def precisions() -> str:
    """What each precision stores, and must meet."""
    rows = []
    for name, row in PRECISIONS.items():
        parts = [(part, getattr(row, part)) for part in ("body", "head", "embed")]
        blocks = ", ".join(
            f"{part} {b.bits} bits in blocks of {b.block}{', rotated' * bool(b.rotation)}" for part, b in parts if b
        )
        gates = ", ".join(f"{gate.metric} {gate.bound:g}" for gate in row.gates)
        size = f"{row.weight_bytes:.3g}"
        rows.append([f"`{name}`", row.help, row.type, blocks or "-", size, gates])
    return table(["precision", "for", "type", "weights in blocks", "bytes a weight of a layer", "gates"], rows)


def graphs() -> str:
    """The forms of a graph."""
    rows = [
        [
            f"`{name}`",
            row.help,
            f"`{row.file}`",
            str(row.opset),
            ".".join(map(str, row.onnxruntime)),
            "yes" if row.in_place else "no",
            words(p for p, provider in PROVIDERS.items() if name in provider.graphs),
        ]
        for name, row in GRAPHS.items()
    ]
    return table(["graph", "what it is", "file", "opset", "onnxruntime from", "state in place", "providers"], rows)


def bundles() -> str:
    """What a default export holds, and what runs it."""
    rows = []
    recipes = [by_target(precision) for precision in PRECISIONS]
    for target in TARGETS:
        for recipe in (found[target] for found in recipes if target in found):
            runs = dict.fromkeys(p for graph in recipe.graphs for p in recipe.providers(graph))
            names = [f"`{name}`" for name in (target, recipe.precision)]
            rows.append([*names, words(recipe.graphs), f"`{recipe.scheme}`", words(runs)])
    return table(["target", "precision", "graphs", "weights", "providers"], rows)


def options(cls: type) -> str:
    """Options of a class of `runtime.options`."""
    from dataclasses import fields

    rows = []
    for one in fields(cls):
        facts, default = one.metadata, one.default
        low, high = facts["low"], facts["high"]
        bounds = f"{low:g} to {high:g}" if abs(low) < 1e300 or abs(high) < 1e300 else "-"
        shown = "-" if default in (None, ()) else f"`{default}`"
        rows.append([f"`{one.name}`", facts["help"], shown, bounds])
    return table(["option", "what it does", "default", "range"], rows)


def recipes() -> str:
    """The whole page."""
    parts = [
        HEAD,
        "## Precisions\n",
        precisions(),
        "\nA gate is the most that a metric may be. A metric that needs a text is not judged without one.\n",
        f"An embedding of 4 bits has 8 where it is less than {EMBEDDING_SHARE:.0%} of the parameters.\n",
        "\nThe same checkpoint and options give the same bytes on the same machine. Integers that were calibrated\n"
        "are others on another processor or with another number of cores: GPTQ carries each rounding on, and the\n"
        "sums of BLAS differ in their last bits. fp32, fp16, bf16, and integers of `--calibration-tokens 0`, do\n"
        "not depend on the number of cores.\n",
        "## Graphs\n",
        graphs(),
        "\nEach provider has an order of its own: it takes the first of its graphs that the bundle holds.\n",
        "## What a default export holds\n",
        bundles(),
        f"\nWith `--graph {AUTO}` a bundle holds the graphs that run on the machine of the export and share"
        f" all weights. The ways to store weights: {words(SCHEMES)}.\n",
        "## Options of loading\n",
        options(Loading),
        "\n## Options of generating\n",
        options(Generation),
        "",
    ]
    return "\n".join(parts)


#: Marks around the parts of gpu.md that are made.
TABLES, REPORTS, COSTS = (
    f"<!-- From here to the next mark made from {source} by `make docs`. -->\n"
    for source in (
        "dijiang/recipe/",
        "benchmarks/results/gpu-h200*.json",
        "benchmarks/results/precisions.json",
    )
)
END = "<!-- end -->"


def between(page: str, begin: str, made: str) -> str:
    """A page with another part between a mark and the end of it."""
    before, _, rest = page.partition(begin)
    _, _, after = rest.partition(END)
    return f"{before}{begin}\n{made}\n\n{END}{after}"


def gpu() -> str:
    """The page about GPUs, with what every provider runs, and what was measured."""
    rows = []
    for one in support():
        proven = PROVIDERS[one.provider].proven
        how = f"runs, proven on {proven}" if proven else "built, not run"
        said = ["-", str(one)] if one.target is None else [words(one.graphs), how]
        rows.append([f"`{one.provider}`", f"`{one.precision}`", f"`{one.target}`" if one.target else "-", *said])
    made = table(["provider", "precision", "`--target`", "graphs", "state"], rows)
    page = between((HERE / "gpu.md").read_text(encoding="utf-8"), TABLES, made)
    return between(between(page, REPORTS, gpus()), COSTS, costs())


def option(one: click.Option) -> list[str]:
    """A row: its names, what it means, and its default where the help shows it."""
    names = ", ".join(f"`{name}`" for name in (*one.opts, *one.secondary_opts))
    choices = words(one.type.choices) if isinstance(one.type, click.Choice) else ""
    meaning = " ".join(
        filter(None, [one.help, "One of " + choices + "." if choices else "", "Required." * one.required])
    )
    return [names, meaning.replace("|", "\\|"), f"`{one.default}`" if one.show_default else ""]


def commands(command: click.Command, name: str) -> Iterable[str]:
    """A command and those below it."""
    arguments = [one.human_readable_name.upper() for one in command.params if isinstance(one, click.Argument)]
    rows = [option(one) for one in command.params if isinstance(one, click.Option) and not one.hidden]
    yield f"## {name}\n\n`{' '.join([name, *arguments])}`\n\n{inspect.cleandoc(command.help or '')}\n"
    if rows:
        yield table(["option", "meaning", "default"], rows) + "\n"
    if isinstance(command, click.Group):
        for below, found in sorted(command.commands.items()):
            yield from commands(found, f"{name} {below}")


def cli() -> str:
    """Every command, what it ends with, and what it reads of the environment."""
    head = "# Command line\n\nThis page is made from the commands by `make docs`. Do not edit it.\n\n"
    status = table(["exit status", "when"], [[str(number), when] for number, when in STATUSES.items()])
    variables = table(["variable", "what it does"], [[f"`{name}`", does] for name, does in VARIABLES.items()])
    ends = f"## Exit status\n\n{status}\n\n## Environment\n\n{variables}\n"
    return head + "\n".join(commands(main, "dijiang")) + "\n" + ends


def described(name: str, found: Any) -> str:
    """A public name: how it is called, and its docstring."""
    if isinstance(found, property):
        called = f"{name} -> {inspect.signature(found.fget).return_annotation}".replace("'", "")
    else:
        called = f"{name}{inspect.signature(found)}".replace("'", "") if inspect.isfunction(found) else name
    called = re.sub(r"<function .* at 0x\w+>", "...", called)
    return f"```text\n{called}\n\n{inspect.cleandoc(found.__doc__)}\n```\n"


def api() -> str:
    """Every public name; of classes that are not errors, also their public methods and properties."""
    parts = ["# Python\n\nThis page is made from the docstrings by `make docs`. Do not edit it.\n"]
    for name in dijiang.__all__:
        found = getattr(dijiang, name)
        parts.append(f"## {name}\n\n{described(name, found)}")
        if not inspect.isclass(found) or issubclass(found, Exception):
            continue
        for member, value in vars(found).items():
            value = getattr(value, "__func__", None) or value
            shown = inspect.isfunction(value) or isinstance(value, property)
            if not member.startswith("_") and shown and value.__doc__:
                parts.append(described(f"{name}.{member}", value))
    return "\n".join(parts)


def decisions() -> str:
    """Every decision."""
    titles = {file.name: file.read_text(encoding="utf-8").splitlines()[0][2:] for file in sorted(ADR.glob("0*.md"))}
    return "# Decisions\n\n" + "".join(f"- [{title}]({name})\n" for name, title in titles.items())


#: Page -> what it is made by.
PAGES = {
    ADR / "index.md": decisions,
    HERE / "cli.md": cli,
    HERE / "api.md": api,
    HERE / "recipes.md": recipes,
    HERE / "messages.md": messages,
    HERE / "real.md": real,
    HERE / "rounding.md": rounding,
    HERE / "performance.md": performance,
    HERE / "capacity.md": capacity,
    HERE / "capacity-first.svg": first_tokens,
    HERE / "capacity-memory.svg": memories,
    HERE / "gpu.md": gpu,
}

if __name__ == "__main__":
    for path, page in PAGES.items():
        path.write_text(page(), encoding="utf-8")
