"""Writes docs/recipes.md from the tables of `dijiang.recipe`: make docs. A test compares the two."""

from __future__ import annotations

from pathlib import Path

from dijiang.recipe import AUTO, GRAPHS, PRECISIONS, PROVIDERS, SCHEMES, TARGETS, resolve
from dijiang.runtime.options import Generation, Loading

PAGE = Path(__file__).with_name("recipes.md")
HEAD = """# Recipes

This page is made from `dijiang/recipe.py` by `make docs`. Do not edit it.

A bundle is made of a precision, one or more graphs, and a target. `dijiang export` decides all of it once. The
manifest keeps the result, the *recipe* of the bundle.
"""


def table(heads: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def words(names: object) -> str:
    """Names as code."""
    return ", ".join(f"`{name}`" for name in names) or "-"  # type: ignore[attr-defined]


def precisions() -> str:
    """What each precision stores, and must meet."""
    rows = []
    for name, row in PRECISIONS.items():
        parts = [(part, getattr(row, part)) for part in ("body", "head", "embed")]
        blocks = ", ".join(f"{part} {b.bits} bits in blocks of {b.block}" for part, b in parts if b)
        gates = ", ".join(f"{gate.metric} {gate.bound:g}" for gate in row.gates)
        size = f"{row.weight_bytes:.3g}"
        rows.append([f"`{name}`", row.help, row.type, blocks or "-", size, gates])
    return table(["precision", "for", "type", "weights in blocks", "bytes a weight", "gates"], rows)


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
    for target in TARGETS:
        for precision in PRECISIONS:
            recipe = resolve(precision, target=target)
            runs = dict.fromkeys(p for graph in recipe.graphs for p in recipe.providers(graph))
            rows.append([f"`{target}`", f"`{precision}`", words(recipe.graphs), f"`{recipe.scheme}`", words(runs)])
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


def page() -> str:
    """The whole page."""
    parts = [
        HEAD,
        "## Precisions\n",
        precisions(),
        "\nA gate is the most that a metric may be. A metric that needs a text is not judged without one.\n",
        "## Graphs\n",
        graphs(),
        "\nThe first graph of a bundle that runs on a machine is the one that is used there.\n",
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


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
