"""Line plots as SVG, the same on every machine."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

WIDTH, HEIGHT, LEFT, RIGHT, EDGE = 760, 340, 64, 250, 36
#: Distinct without red against green, and in grey.
COLOURS = ("#0072b2", "#56b4e9", "#d55e00", "#e69f00", "#7f3b08")
Line = Sequence[tuple[float, float]]


def line_plot(lines: Mapping[str, Line], x: str, y: str, *, name_x: Callable[[float], str] = "{:g}".format) -> str:
    """Lines of points over shared axes, the vertical one logarithmic.

    x, y: names of the axes.  name_x: how a value of the horizontal axis is written.
    """
    points = [point for line in lines.values() for point in line]
    first, last = min(at for at, _ in points), max(at for at, _ in points)
    low = math.floor(math.log10(min(value for _, value in points)))
    high = max(low + 1, math.ceil(math.log10(max(value for _, value in points))))

    def across(at: float) -> float:
        return LEFT + (at - first) / (last - first) * (WIDTH - LEFT - RIGHT)

    def up(value: float) -> float:
        return HEIGHT - EDGE - (math.log10(value) - low) / (high - low) * (HEIGHT - 2 * EDGE)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{x}</text>',
        f'<text x="8" y="18">{y}</text>',
    ]
    for power in range(low, high + 1):
        height = up(10.0**power)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{height:.1f}" y2="{height:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{height + 4:.1f}" text-anchor="end">{10.0**power:g}</text>')
    for at in (first, (first + last) / 2, last):
        parts.append(f'<text x="{across(at):.1f}" y="{HEIGHT - 20}" text-anchor="middle">{name_x(at)}</text>')
    for number, (name, line) in enumerate(lines.items()):
        colour, drawn = COLOURS[number], " ".join(f"{across(at):.1f},{up(value):.1f}" for at, value in line)
        parts.append(f'<polyline points="{drawn}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<text x="{WIDTH - RIGHT + 12}" y="{EDGE + 8 + 18 * number}" fill="{colour}">{name}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"
