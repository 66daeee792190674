"""Pictures of a report: speed and memory over depth, latencies, roofline, prefill."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import BenchError
from ..files import check_file, write_file
from .matrix import Test
from .report import Report, target

FORMATS = (".png", ".svg")
#: Colours of models in order: distinct without red against green, and in grey.
COLOURS = ("#0072b2", "#e69f00", "#56b4e9", "#d55e00", "#009e73", "#cc79a7")
MARKERS, STYLES = "osD^v<>", ("-", "--", ":", "-.")
VARIED = ("tokens", "depth", "batch", "threads")
#: Draws a report's results on axes in the colours of its models; whether there was anything to draw.
Draw = Callable[[Any, "list[Report]", "dict[str, str]"], bool]


def import_matplotlib() -> Any:
    """The matplotlib module; BenchError where it is not installed."""
    try:
        import matplotlib
        import matplotlib.figure
    except ImportError:
        raise BenchError("pictures need matplotlib; pip install 'dijiang[bench]'") from None
    return matplotlib


def _draw_lines(
    kind: str, over: str, value: Callable[[Report], Any], axes: Any, results: list[Report], colours: dict[str, str]
) -> bool:
    """`value` over a field of a kind of test: a line for each model and each choice of the other fields."""
    results = [r for r in results if r["kind"] == kind]
    varied = [f for f in VARIED if f != over and len({r[f] for r in results}) > 1]
    lines: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for r in sorted(results, key=lambda r: r[over]):
        if value(r) is not None:
            key = (r["model"], ", ".join(f"{f} {r[f]}" for f in varied))
            lines.setdefault(key, []).append((r[over], value(r)))
    labels = list(dict.fromkeys(label for _, label in lines))
    for (model, label), points in lines.items():
        marker, name = MARKERS[labels.index(label) % len(MARKERS)], f"{model}, {label}" if label else model
        axes.plot(*zip(*points, strict=True), color=colours[model], marker=marker, label=_shown(name))
    if lines:
        axes.set_ylim(bottom=0)
        axes.legend(fontsize="x-small")
    return bool(lines)


def _draw_latency(axes: Any, results: list[Report], colours: dict[str, str]) -> bool:
    """Distribution of inter-token latencies: the fraction of tokens that took at most so long."""
    results = [r for r in results if r["per_token"]]
    depths = sorted({r["depth"] for r in results})
    for r in results:
        style = STYLES[depths.index(r["depth"]) % len(STYLES)]
        times = 1e3 * np.array(r["per_token"]["latency"]["values"])
        axes.ecdf(times, color=colours[r["model"]], linestyle=style, label=_shown(_name(r)))
    if results:
        axes.set_xscale("log")
        axes.legend(fontsize="x-small")
    return bool(results)


def _draw_roofline(axes: Any, results: list[Report], colours: dict[str, str]) -> bool:
    """Percent of the memory's bandwidth that decoding reaches."""
    results = [r for r in results if r["roofline"]]
    values = [r["roofline"]["percent"] for r in results]
    bars = axes.barh(range(len(results)), values, color=[colours[r["model"]] for r in results])
    axes.set_yticks(range(len(results)), map(_name, results), fontsize="x-small")
    axes.bar_label(bars, fmt="%.0f %%", padding=3, fontsize="x-small")
    axes.axvline(100, color="black", linewidth=1)
    axes.invert_yaxis()
    axes.set_xlim(0, max([110.0, *(1.15 * v for v in values)]))
    return bool(results)


def _shown(name: str) -> str:
    """A label that a legend shows: it leaves out those that begin with an underscore."""
    return f"\u200b{name}" if name.startswith("_") else name


def _name(result: Report) -> str:
    return f"{result['model']}, {Test.of(result).label}"


#: Names of models are no formulas, whatever is in them.
PLAIN = {"text.parse_math": False}
RATE, PEAK = itemgetter("tokens_per_second"), lambda result: target(result)["memory"]["max_ram"]
#: Title -> names of the axes, and what draws it.
PANELS: dict[str, tuple[str, str, Draw]] = {
    "Decode speed over depth": ("tokens in the state", "tokens/s", partial(_draw_lines, "tg", "depth", RATE)),
    "Peak memory over depth": ("tokens in the state", "MB", partial(_draw_lines, "tg", "depth", PEAK)),
    "Latency between tokens": ("ms between two tokens", "fraction of tokens", _draw_latency),
    "Roofline of decoding": ("% of what the memory allows", "", _draw_roofline),
    "Prefill speed over prompt length": ("prompt tokens", "tokens/s", partial(_draw_lines, "pp", "tokens", RATE)),
}


def _draw(title: str, axes: Any, report: Report) -> bool:
    x, y, draw = PANELS[title]
    axes.set(xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    colours = {m["name"]: COLOURS[i % len(COLOURS)] for i, m in enumerate(report["models"])}
    return draw(axes, report["results"], colours)


def panels(report: Report) -> dict[str, str]:
    """Title -> SVG of every picture that the report has data for; text stays text."""
    matplotlib, found = import_matplotlib(), {}
    with matplotlib.rc_context(PLAIN | {"svg.fonttype": "none", "svg.hashsalt": "dijiang"}):
        for title in PANELS:
            figure = matplotlib.figure.Figure(figsize=(7, 4.2), layout="constrained")
            if _draw(title, figure.add_subplot(), report):
                text = io.StringIO()
                figure.savefig(text, format="svg", metadata={"Date": None})
                found[title] = text.getvalue()[text.getvalue().index("<svg") :]
    return found


def save_plot(report: Report, file: Path) -> None:
    """All pictures in one PNG or SVG file; BenchError for another ending or a file that cannot be."""
    check_plot(file)
    matplotlib, picture = import_matplotlib(), io.BytesIO()
    with matplotlib.rc_context(PLAIN):
        figure = matplotlib.figure.Figure(figsize=(14, 13), layout="constrained")
        grid = figure.subplots(3, 2).flat
        for axes, title in zip(grid, PANELS, strict=False):
            axes.set_title(title)
            if not _draw(title, axes, report):
                axes.set_axis_off()
                axes.text(0.5, 0.5, "not measured", ha="center", transform=axes.transAxes)
        grid[-1].set_axis_off()
        figure.savefig(picture, format=file.suffix[1:].lower(), dpi=100)
    write_file(file, picture.getvalue(), BenchError)


def check_plot(file: Path) -> None:
    """BenchError unless the file can be written and its ending is known: said before anything is measured."""
    if file.suffix.lower() not in FORMATS:
        raise BenchError(f"{file}: a picture ends in {' or '.join(FORMATS)}; rename it")
    check_file(file, BenchError)
