"""Pictures of a report: speed and memory over depth, latencies, roofline, prefill."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import BenchError
from .report import Report, target

FORMATS = (".png", ".svg")
#: Colours of models in order: distinct without red against green, and in grey.
COLOURS = ("#0072b2", "#e69f00", "#56b4e9", "#d55e00", "#009e73", "#cc79a7")
MARKERS = "osD^v<>"


def import_matplotlib() -> Any:
    """The matplotlib module; BenchError where it is not installed."""
    try:
        import matplotlib
        import matplotlib.figure
    except ImportError:
        raise BenchError("pictures need matplotlib; pip install 'dijiang[bench]'") from None
    return matplotlib


def _colours(report: Report) -> dict[str, str]:
    return {m["name"]: COLOURS[i % len(COLOURS)] for i, m in enumerate(report["models"])}


def _series(report: Report, kind: str, over: str) -> dict[tuple[Any, ...], list[Report]]:
    """Results of a kind that differ in one field only, sorted by it; keys: (model, label)."""
    fields = [f for f in ("tokens", "depth", "batch", "threads") if f != over]
    results = [r for r in report["results"] if r["kind"] == kind]
    varied = [f for f in fields if len({r[f] for r in results}) > 1]
    groups: dict[tuple[Any, ...], list[Report]] = defaultdict(list)
    for r in results:
        groups[(r["model"], ", ".join(f"{f} {r[f]}" for f in varied))].append(r)
    return {key: sorted(group, key=lambda r: r[over]) for key, group in groups.items()}


@dataclass(frozen=True)
class Lines:
    """One line a series of a kind of test, over a field of it."""

    kind: str
    over: str
    x: str
    y: str
    value: Callable[[Report], Any]

    def __call__(self, axes: Any, report: Report) -> bool:
        """Draw; whether there was anything to draw."""
        axes.set(xlabel=self.x, ylabel=self.y)
        colours, markers = _colours(report), dict[str, str]()
        for (model, label), group in _series(report, self.kind, self.over).items():
            points = [(r[self.over], self.value(r)) for r in group if self.value(r) is not None]
            if points:
                marker = markers.setdefault(label, MARKERS[len(markers) % len(MARKERS)])
                name = f"{model}, {label}" if label else model
                axes.plot(*zip(*points, strict=True), color=colours[model], marker=marker, label=name)
        if markers:
            axes.set_ylim(bottom=0)
            axes.legend(fontsize="small")
        return bool(markers)


def draw_latency(axes: Any, report: Report) -> bool:
    """Distribution of inter-token latencies: the fraction of tokens that took at most so long."""
    axes.set(xlabel="ms between two tokens", ylabel="fraction of tokens", ylim=(0, 1))
    colours = _colours(report)
    results = [r for r in report["results"] if r["per_token"]]
    for r in results:
        times = 1e3 * np.sort(r["per_token"]["latency"]["values"])
        fraction = np.arange(1, len(times) + 1) / len(times)
        style = ("-", "--", ":", "-.")[sorted({x["depth"] for x in results}).index(r["depth"]) % 4]
        name = f"{r['model']}, {r['test']}, batch {r['batch']}"
        axes.step(times, fraction, where="post", color=colours[r["model"]], linestyle=style, label=name)
    if results:
        axes.set_xscale("log")
        axes.legend(fontsize="x-small")
    return bool(results)


def draw_roofline(axes: Any, report: Report) -> bool:
    """Percent of the memory's bandwidth that decoding reaches."""
    colours = _colours(report)
    results = [r for r in report["results"] if r["roofline"]]
    names = [f"{r['model']}, {r['test']}, batch {r['batch']}" for r in results]
    values = [r["roofline"]["percent"] for r in results]
    bars = axes.barh(range(len(results)), values, color=[colours[r["model"]] for r in results])
    axes.set_yticks(range(len(results)), names, fontsize="x-small")
    axes.bar_label(bars, fmt="%.0f %%", padding=3, fontsize="x-small")
    axes.axvline(100, color="black", linewidth=1)
    axes.invert_yaxis()
    axes.set(xlabel="% of what the memory allows", xlim=(0, max([110.0, *(1.15 * v for v in values)])))
    return bool(results)


def _rate(result: Report) -> float:
    return float(result["tokens_per_second"])


def _peak(result: Report) -> float | None:
    peak: float | None = target(result)["memory"]["max_ram"]
    return peak


#: Title -> what draws it; each says whether the report has something to draw.
PANELS: dict[str, Callable[[Any, Report], bool]] = {
    "Decode speed over depth": Lines("tg", "depth", "tokens in the state", "tokens/s", _rate),
    "Peak memory over depth": Lines("tg", "depth", "tokens in the state", "MB", _peak),
    "Latency between tokens": draw_latency,
    "Roofline of decoding": draw_roofline,
    "Prefill speed over prompt length": Lines("pp", "tokens", "tokens of the prompt", "tokens/s", _rate),
}


def panels(report: Report) -> dict[str, str]:
    """Title -> SVG of every picture that the report has data for; text stays text."""
    matplotlib = import_matplotlib()
    found = {}
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "dijiang"}):
        for title, draw in PANELS.items():
            figure = matplotlib.figure.Figure(figsize=(7, 4.2), layout="constrained")
            axes = figure.add_subplot()
            if draw(axes, report):
                axes.grid(alpha=0.3)
                text = io.StringIO()
                figure.savefig(text, format="svg", metadata={"Date": None})
                found[title] = text.getvalue()[text.getvalue().index("<svg") :]
    return found


def save_plot(report: Report, file: Path) -> None:
    """All pictures in one PNG or SVG file; BenchError for another ending or a file that cannot be."""
    matplotlib = import_matplotlib()
    check_plot(file)
    figure = matplotlib.figure.Figure(figsize=(14, 13), layout="constrained")
    grid = figure.subplots(3, 2)
    for axes, (title, draw) in zip(grid.flat, PANELS.items(), strict=False):
        axes.set_title(title)
        axes.grid(alpha=0.3)
        if not draw(axes, report):
            axes.set_axis_off()
            axes.text(0.5, 0.5, "not measured", ha="center", transform=axes.transAxes)
    grid.flat[-1].set_axis_off()
    try:
        figure.savefig(file, dpi=100)
    except OSError as error:
        raise BenchError(f"{file}: cannot be written ({error.strerror}); choose another place") from error


def check_plot(file: Path) -> None:
    """BenchError unless the file's ending is a known one: said before anything is measured."""
    if file.suffix.lower() not in FORMATS:
        raise BenchError(f"{file}: a picture ends in {' or '.join(FORMATS)}; rename it")
