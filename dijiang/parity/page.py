"""A verification as one page: where a bundle is off, by layer, position and token, and how its heads forget."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template

import numpy as np

from ..bundle.opened import Bundle
from ..errors import ParityError
from ..files import write_file
from ..hub import name_of
from ..models.decay import Decay
from ..models.tokenizer import TOKENIZER
from ..runtime.text import TextTokenizer
from .findings import Detail, Parity

#: Points of a curve, tokens of a table, and tokens shown before each.
POINTS, WORST, BEFORE = 128, 12, 8
#: A picture of a curve, in pixels.
WIDTH, HEIGHT = 900, 160


def write_page(file: Path, report: Parity, bundle: Bundle) -> None:
    """Write the page of a report; ParityError if the file cannot be written."""
    write_file(file, to_html(report, bundle).encode(errors="backslashreplace"), ParityError)


def to_html(report: Parity, bundle: Bundle) -> str:
    """One page without scripts, without links, without anything from a network."""
    tokenizer = bundle.path / TOKENIZER
    reader = TextTokenizer.read(tokenizer) if TOKENIZER in bundle.manifest.files else None
    compared = (
        f"{report.tokens} tokens ({report.text}), {report.reference_dtype} reference, dijiang {report.dijiang}"
    )
    details = [one.detail for one in report.each if one.detail is not None]
    graphs = "".join(_graph(one, one.detail, reader) for one in report.each if one.detail is not None)
    return Template(files(__package__).joinpath("page.html").read_text(encoding="utf-8")).substitute(
        title=escape(name_of(bundle.path)),
        header=escape(compared),
        graphs=graphs,
        decay=_decay(details[0].decays) if details else "",
    )


def _graph(report: Parity, detail: Detail, reader: TextTokenizer | None) -> str:
    gates = [
        [v.metric, f"{v.found:.2e}", f"{v.bound:.1e}", "passed" if v.passed else "FAILED"] for v in report.gates
    ]
    layers = list(zip(*detail.states.values(), strict=True))
    heads = ["layer", *(f"after {length}" for length in detail.states)]
    return (
        f"<h2>Graph {escape(report.graph)}</h2>"
        + _table(["gate", "found", "allowed", ""], gates)
        + "<h3>RMS-relative error of the states, by layer and length</h3>"
        + _heat(heads, layers)
        + "<h3>RMS error of the logits, by position</h3>"
        + _curve(detail)
        + "<h3>Tokens after which the prediction is furthest off</h3>"
        + _table(["position", "text", "KL, nats", "RMS error"], _worst(detail, reader))
    )


def _worst(detail: Detail, reader: TextTokenizer | None) -> list[list[str]]:
    rows = []
    for at in np.argsort(detail.kl)[::-1][:WORST]:
        position = detail.positions[at]
        tokens = detail.ids[at - min(position, BEFORE) : at + 1]
        text = " ".join(map(str, tokens)) if reader is None else reader.decode(tokens)
        rows.append([f"{position:,}", repr(text), f"{detail.kl[at]:.2e}", f"{detail.errors[at]:.2e}"])
    return rows


def _curve(detail: Detail) -> str:
    """Mean over windows of the error at each position, on a logarithmic axis, as SVG."""
    length = max(detail.positions) + 1
    sums = np.bincount(detail.positions, np.square(detail.errors), length) / np.bincount(detail.positions)
    points = [part.mean() ** 0.5 for part in np.array_split(sums, min(POINTS, length))]
    levels = np.log10(np.maximum(points, np.finfo(np.float64).tiny))
    low, high = np.floor(levels.min()), np.ceil(levels.max() + 1e-9)
    across = np.linspace(0, WIDTH, len(levels)) if len(levels) > 1 else np.zeros(1)
    down = HEIGHT * (1 - (levels - low) / max(high - low, 1))
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(across, down, strict=True))
    return (
        f'<svg viewBox="-60 -10 {WIDTH + 80} {HEIGHT + 40}" role="img" aria-label="error by position">'
        f'<rect width="{WIDTH}" height="{HEIGHT}"/><polyline points="{line}"/>'
        f'<text x="-55" y="8">1e{high:.0f}</text><text x="-55" y="{HEIGHT}">1e{low:.0f}</text>'
        f'<text x="0" y="{HEIGHT + 20}">0</text>'
        f'<text x="{WIDTH}" y="{HEIGHT + 20}" text-anchor="end">{length - 1:,}</text></svg>'
    )


def half_lives(decay: Decay) -> np.ndarray:
    """Tokens after which a head's memory is half of what it was, [heads]; infinity for gamma 1."""
    with np.errstate(divide="ignore"):
        lives: np.ndarray = np.log(2) / np.abs(np.log(decay.gamma))
    return lives


def _decay(decays: Sequence[Decay]) -> str:
    lives = [half_lives(decay).tolist() for decay in decays]
    heads = ["layer", *(f"head {number}" for number in range(len(lives[0])))]
    trained = [
        [
            str(layer),
            str(head),
            *(f"{scale[head].min():.3g} to {scale[head].max():.3g}" for scale in (decay.u, decay.w)),
        ]
        for layer, decay in enumerate(decays)
        if decay.u is not None and decay.w is not None
        for head in range(len(decay.gamma))
    ]
    tables = "<h3>What training put beside gamma</h3>" + _table(
        ["layer", "head", "query scale u", "key scale w"], trained
    )
    return (
        "<h2>Decay</h2><h3>Half-life of each head, in tokens</h3>"
        + _heat(heads, lives, form="{:,.3g}")
        + (tables if trained else "<p>Analytic: nothing was trained beside gamma.</p>")
    )


def _heat(heads: Sequence[str], rows: Iterable[Sequence[float]], form: str = "{:.1e}") -> str:
    """A table of numbers by layer, darker where they are larger, on a logarithmic scale."""
    values = np.array(list(rows), np.float64)
    levels = np.log10(np.clip(values, 1e-300, 1e300))
    spread = max(float(np.ptp(levels)), 1e-9)
    shades = (levels - levels.min()) / spread
    body = "".join(
        f"<tr><td>{layer}</td>"
        + "".join(
            f'<td style="background:rgba(200,80,0,{0.7 * shade:.2f})">{form.format(value)}</td>'
            for value, shade in zip(row, shading, strict=True)
        )
        + "</tr>"
        for layer, (row, shading) in enumerate(zip(values, shades, strict=True))
    )
    return f"<table><tr>{''.join(f'<th>{escape(head)}</th>' for head in heads)}</tr>{body}</table>"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><tr>{''.join(f'<th>{escape(head)}</th>' for head in heads)}</tr>{body}</table>"
