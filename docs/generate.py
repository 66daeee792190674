"""Writes pages from what they are about: tables of `dijiang.recipe`, reports, commands, docstrings, decisions.

`make docs` runs it. A test compares the pages with what they are made of.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

import dijiang
from dijiang.cli import main
from dijiang.doctor.support import support
from dijiang.recipe import AUTO, GRAPHS, PRECISIONS, PROVIDERS, SCHEMES, TARGETS, resolve
from dijiang.runtime.options import Generation, Loading

HERE = Path(__file__).parent
ADR = HERE / "adr"
#: Share of a step from which on a kind of node has a row of its own.
SHOWN = 0.02
REPORTS = HERE.parent / "benchmarks" / "results"
HEAD = """# Recipes

This page is made from `dijiang/recipe.py` by `make docs`. Do not edit it.

A bundle is made of a precision, one or more graphs, and a target. `dijiang export` decides all of it once. The
manifest keeps the result, the *recipe* of the bundle.
"""


def table(heads: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def words(names: Iterable[str]) -> str:
    """Names as code."""
    return ", ".join(f"`{name}`" for name in names) or "-"


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


def recipes() -> str:
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


#: Marks around the part of gpu.md that is made.
BEGIN, END = "by `make docs`. -->\n", "<!-- end -->"


def gpu() -> str:
    """The page about GPUs, with what every provider runs."""
    before, _, rest = (HERE / "gpu.md").read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    rows = []
    for one in support():
        proven = PROVIDERS[one.provider].proven
        how = f"runs, proven on {proven}" if proven else "built, not run"
        said = ["-", str(one)] if one.target is None else [words(one.graphs), how]
        rows.append([f"`{one.provider}`", f"`{one.precision}`", f"`{one.target}`" if one.target else "-", *said])
    made = table(["provider", "precision", "`--target`", "graphs", "state"], rows)
    return f"{before}{BEGIN}\n{made}\n\n{END}{after}"


REAL = """# A real model

This page is made by `make real` and `make docs`. Do not edit it.

`make real` takes SmolLM2-135M-Instruct, a LLaMA of 30 layers, from the package `{package}`. It converts the
model, exports it as a user would, compares it with the float64 reference on English text, and decodes
{decoded} tokens. The model was not fine-tuned after the conversion. So int8 and int4 are not judged by its text:
their rows show what rounding does to a model that makes no sense yet.

Processor: {cpu}.

## Against the float64 reference
"""


def compared(rows: list[dict[str, Any]]) -> str:
    """Differences of every graph; one over float32 is in units of what the reference loses in float32."""
    lines = []
    for row in rows:
        for graph, found in row["graphs"].items():
            passed = {True: "passed", False: "failed", None: "not judged"}[found["passed"]]
            over = found["gates"].get("error_over_float32")
            ratio = "-" if over is None else f"{over:.2f}"
            size = f"{found['max_error']:.1e}", f"{found['rms_relative_error']:.1e}", f"{found['kl']:.1e}"
            lines.append([f"`{row['precision']}`", f"`{graph}`", str(found["tokens"]), *size])
            lines[-1] += [f"{found['top1_agreement']:.2%}", ratio, passed]
    heads = ["precision", "graph", "tokens", "largest error", "RMS, relative", "KL, nats", "top-1", "over float32"]
    return table([*heads, "gate"], lines)


def costs(rows: list[dict[str, Any]]) -> str:
    """Seconds, bytes and tokens a second."""
    lines = [
        [
            f"`{row['precision']}`",
            f"{row['bytes'] / 1e6:.0f}",
            f"{row['export_seconds']:.0f}",
            f"{row['verify_seconds']:.0f}",
            f"{row['decode']['first']:.1f}",
            f"{row['decode']['last']:.1f}",
            f"{row['decode']['state_bytes'] / 1e6:.2f}",
        ]
        for row in rows
    ]
    heads = [
        "precision",
        "bundle, MB",
        "export, s",
        "verify, s",
        "first 1,000, tokens/s",
        "last 1,000",
        "state, MB",
    ]
    return table(heads, lines)


def real() -> str:
    """The page about the real model."""
    found = json.loads((REPORTS / "real.json").read_text(encoding="utf-8"))
    rows, cpu = found["precisions"], found["cpu"]
    head = REAL.format(package=found["package"], decoded=f"{found['decoded']:,}", cpu=cpu["model"])
    return "\n".join([head, compared(rows), "\n## What it costs\n", costs(rows), ""])


ROUNDING = """# What rounding costs a real model

This page is made by `make rounding` and `make docs`. Do not edit it.

`make rounding` takes the weights of SmolLM2-135M-Instruct from the package `{package}`, as they were trained: the
vanilla Transformer. It is written in the graph that `dijiang bench` compares with, by the writer, the passes and
the schemes of a bundle. Each row is compared with float32 on {tokens} tokens of English, the head included. The
second moments of GPTQ come from {calibration} other tokens of the same text. The weights lie on a 4-bit grid of
their own. For the rows in 4 bits noise of one step of the grid was added first, on both sides of the comparison.

Activations are rounded to 8 bits in the same blocks. The head has 8 bits everywhere. The embedding is tied. It is
stored once where 576 channels are whole blocks.

Processor: {cpu}.

"""


def rounding() -> str:
    """The page about ways of rounding."""
    found = json.loads((REPORTS / "rounding.json").read_text(encoding="utf-8"))
    lines = [
        [
            row["case"],
            f"{row['bytes'] / 1e6:.1f}",
            f"{row['perplexity_change']:+.2%}",
            f"{row['kl']:.1e}",
            f"{row['top1_agreement']:.2%}",
            f"{row['seconds']:.0f}",
        ]
        for row in found["cases"]
    ]
    head = ROUNDING.format(
        package=found["package"],
        tokens=f"{found['tokens']:,}",
        calibration=f"{found['calibration']:,}",
        cpu=found["cpu"]["model"],
    )
    heads = ["weights", "MB that a step reads", "perplexity", "KL, nats", "top-1", "seconds to round"]
    return head + table(heads, lines) + "\n"


PERFORMANCE = """# Where a step's time goes

This page is made by `make steps` and `make docs`. Do not edit it.

`make steps` runs the shape of {preset} with random weights, on all cores, batch 1. Whole steps of the graphs are
timed in turn, in {blocks} blocks, in random order within one process. The time of the nodes comes from ONNX
Runtime's profiler, which adds some microseconds to each. So the sums are larger than the steps.

Processor: {cpu}, {cores} cores. Measured bandwidth of the memory: {bandwidths} GB/s, before, between and after
the precisions.

Choices that were made by measurement: the settings of a session ([ADR 0031](adr/0031-session-settings.md)), the
matmul ([ADR 0020](adr/0020-matmul.md)), one operator a layer ([ADR 0010](adr/0010-native-operator.md)).
"""


def steps(row: dict[str, Any]) -> list[list[str]]:
    """Rows of one precision: whole steps of each graph."""
    return [
        [
            f"`{row['precision']}`",
            length,
            f"`{graph}`",
            f"{one['ms']:.2f}",
            f"{one['ratio']:.2f} ({one['quartiles'][0]:.2f} to {one['quartiles'][1]:.2f})",
            f"{row['reads'] / 1e6 / one['ms']:.1f}" if length == "1" else "-",
        ]
        for length, found in row["lengths"].items()
        for graph, one in found["steps"].items()
    ]


def nodes(found: dict[str, Any]) -> str:
    """The kinds of nodes of each graph that take most of the time."""
    rows = []
    for graph, kinds in found["nodes"].items():
        total = sum(kind["ms"] for kind in kinds)
        shown = [kind for kind in kinds if kind["ms"] >= SHOWN * total]
        rest = [kind for kind in kinds if kind["ms"] < SHOWN * total]
        shown.append(
            {"kind": "all others", "nodes": sum(k["nodes"] for k in rest), "ms": sum(k["ms"] for k in rest)}
        )
        rows += [
            [f"`{graph}`", k["kind"], str(k["nodes"]), f"{k['ms']:.2f}", f"{k['ms'] / total:.0%}"] for k in shown
        ]
    return table(["graph", "kind", "nodes", "ms", "share"], rows)


def performance() -> str:
    """The page about the steps of each graph."""
    found = json.loads((REPORTS / "steps.json").read_text(encoding="utf-8"))
    head = PERFORMANCE.format(
        preset=found["preset"],
        blocks=found["blocks"],
        cpu=found["cpu"]["model"],
        cores=found["cpu"]["usable_cores"],
        bandwidths=", ".join(f"{one['bytes_per_second'] / 1e9:.1f}" for one in found["bandwidths"]),
    )
    heads = ["precision", "tokens", "graph", "ms a step", "over the first graph (quartiles)", "GB/s that it reads"]
    whole = table(heads, [line for row in found["precisions"] for line in steps(row)])
    parts = [
        f"## {row['precision']}, {length} token{'s' * (length != '1')}\n\n{nodes(one)}\n"
        for row in found["precisions"]
        for length, one in row["lengths"].items()
    ]
    return "\n".join([head, "## Whole steps\n", whole, "", *parts])


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
    """Every command."""
    head = "# Command line\n\nThis page is made from the commands by `make docs`. Do not edit it.\n\n"
    return head + "\n".join(commands(main, "dijiang"))


def described(name: str, found: Any) -> str:
    """A public name: how it is called, and its docstring."""
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
            value = getattr(value, "__func__", None) or getattr(value, "fget", None) or value
            if not member.startswith("_") and inspect.isfunction(value) and value.__doc__:
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
    HERE / "real.md": real,
    HERE / "rounding.md": rounding,
    HERE / "performance.md": performance,
    HERE / "gpu.md": gpu,
}

if __name__ == "__main__":
    for path, page in PAGES.items():
        path.write_text(page(), encoding="utf-8")
