"""A layer of a step graph as a picture: its nodes, from what goes in at the top to what comes out."""

from __future__ import annotations

import re
from collections.abc import Iterable
from html import escape

import onnx_ir as ir

from ..errors import InputError
from . import roles

#: How names begin that are of one layer: of its states, which no writer marks; and of its weights, to shorten them.
STATE, PREFIX = re.compile(r"(?:past_key_values|present)\.(\d+)\."), re.compile(r"layers\.\d+\.")
#: Pixels: of a box, and between two.
WIDTH, HEIGHT, ACROSS, DOWN = 190, 38, 24, 34
#: Of a weight's name in a box.
LETTERS = 23


def layer_of(node: ir.Node, known: dict[ir.Node, int | None]) -> int | None:
    """The layer of a node: that of a weight or state it reads or writes, else the last of the nodes before it."""
    values = [value for value in (*node.inputs, *node.outputs) if value is not None]
    marked = [layer for value in values if (layer := roles.layer_of(value)) is not None and layer.isdecimal()]
    states = [found[1] for value in values if (found := STATE.match(value.name or ""))]
    own = [int(layer) for layer in (*marked, *states)]
    before = [known.get(one) for one in _before(node)]
    return max(own or [layer for layer in before if layer is not None], default=None)


def draw(graph: ir.Graph, layer: int) -> str:
    """The nodes of a layer as SVG.

    Raises:
        InputError: the graph has no such layer.
    """
    known: dict[ir.Node, int | None] = {}
    for node in graph:
        known[node] = layer_of(node, known)
    nodes = [node for node in graph if known[node] == layer]
    if not nodes:
        last = max((found for found in known.values() if found is not None), default=-1)
        raise InputError(f"layer {layer} is not in the graph, expected 0 to {last}")
    places = _places(nodes)
    right, bottom = (max(place[axis] for place in places.values()) for axis in (0, 1))
    lines = [_line(places[one], places[node]) for node in nodes for one in _before(node) if one in places]
    boxes = [_box(node, place) for node, place in places.items()]
    size = f"0 0 {right + 1.5 * WIDTH + ACROSS:.0f} {bottom + HEIGHT + DOWN:.0f}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{size}" font-family="sans-serif" font-size="12">'
        f'<g stroke="#999" fill="none">{"".join(lines)}</g>{"".join(boxes)}</svg>\n'
    )


def _before(node: ir.Node) -> list[ir.Node]:
    """The nodes whose results it reads."""
    found = (value.producer() for value in node.inputs if value is not None)
    return [one for one in found if one is not None]


def _places(nodes: Iterable[ir.Node]) -> dict[ir.Node, tuple[float, float]]:
    """Left and top of each box: below all that it reads, near the middle of it."""
    depths: dict[ir.Node, int] = {}
    for node in nodes:
        depths[node] = 1 + max((depths[one] for one in _before(node) if one in depths), default=-1)
    rows: dict[int, list[ir.Node]] = {}
    for node, depth in depths.items():
        rows.setdefault(depth, []).append(node)
    widest = max(map(len, rows.values()))
    places: dict[ir.Node, tuple[float, float]] = {}
    for depth in sorted(rows):
        row = sorted(rows[depth], key=lambda node: _middle(node, places))
        start = (widest - len(row)) / 2
        for at, node in enumerate(row):
            places[node] = ((start + at) * (WIDTH + ACROSS) + ACROSS, depth * (HEIGHT + DOWN) + DOWN / 2)
    return places


def _middle(node: ir.Node, places: dict[ir.Node, tuple[float, float]]) -> float:
    across = [places[one][0] for one in _before(node) if one in places]
    return sum(across) / len(across) if across else 0.0


def _line(start: tuple[float, float], end: tuple[float, float]) -> str:
    """An edge; one that passes other rows goes around them on the right."""
    x, y, to, down = start[0] + WIDTH / 2, start[1] + HEIGHT, end[0] + WIDTH / 2, end[1]
    if down - y <= DOWN:
        return f'<path d="M{x:.0f} {y:.0f}L{to:.0f} {down:.0f}"/>'
    side = max(x, to) + WIDTH * 0.75
    return (
        f'<path d="M{x:.0f} {y:.0f}C{side:.0f} {y + DOWN:.0f} {side:.0f} {down - DOWN:.0f} {to:.0f} {down:.0f}"/>'
    )


def _box(node: ir.Node, place: tuple[float, float]) -> str:
    """What a node does, its first weight, and its output's shape on hovering."""
    x, y = place
    names = [value.name or "" for value in node.inputs if value is not None and value.is_initializer()]
    weights = [PREFIX.sub("", name) for name in names if PREFIX.match(name)]
    named = escape(weights[0] if len(weights[0]) <= LETTERS else f"{weights[0][:LETTERS]}…") if weights else ""
    shapes = "\n".join(f"{value.name}: {value.dtype} {value.shape}" for value in node.outputs)
    return (
        f'<g><title>{escape(shapes)}</title><rect x="{x:.0f}" y="{y:.0f}" width="{WIDTH}" height="{HEIGHT}" rx="5" '
        f'fill="{"#fde8d8" if weights else "#eef2f7"}" stroke="#888"/>'
        f'<text x="{x + 8:.0f}" y="{y + 16:.0f}" font-weight="bold">{escape(node.op_type)}</text>'
        f'<text x="{x + 8:.0f}" y="{y + 31:.0f}" fill="#555">{named}</text></g>'
    )
