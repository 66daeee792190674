"""Draw training logs as an SVG.

python examples/plot_loss.py NAME=LOG.csv ... -o CURVE.svg
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

WIDTH, HEIGHT, MARGIN = 560, 300, 44
COLOURS = ("#1f5fa8", "#c0392b", "#2e7d32")


def held_out(path: Path) -> list[tuple[float, float]]:
    """(step, held-out loss) of every line of a log."""
    with path.open(newline="") as stream:
        return [(float(row["step"]), float(row["held_out_loss"])) for row in csv.DictReader(stream)]


def draw(logs: dict[str, list[tuple[float, float]]]) -> str:
    """One line a log, over shared axes."""
    points = [point for log in logs.values() for point in log]
    last, low, high = max(s for s, _ in points), min(v for _, v in points), max(v for _, v in points)

    def x(step: float) -> float:
        return MARGIN + step / last * (WIDTH - 2 * MARGIN)

    def y(loss: float) -> float:
        return HEIGHT - MARGIN - (loss - low) / (high - low) * (HEIGHT - 2 * MARGIN)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{WIDTH / 2}" y="{HEIGHT - 8}" text-anchor="middle">step</text>',
        f'<text x="{MARGIN}" y="16">held-out loss, nats a token</text>',
    ]
    for step in (0, last / 2, last):
        parts.append(f'<text x="{x(step):.0f}" y="{HEIGHT - 26}" text-anchor="middle">{step:.0f}</text>')
    for loss in (low, (low + high) / 2, high):
        parts.append(f'<text x="{MARGIN - 6}" y="{y(loss) + 4:.0f}" text-anchor="end">{loss:.1f}</text>')
        ends = f'x1="{MARGIN}" x2="{WIDTH - MARGIN}" y1="{y(loss):.1f}" y2="{y(loss):.1f}"'
        parts.append(f'<line {ends} stroke="#ddd"/>')
    for index, (name, log) in enumerate(logs.items()):
        colour = COLOURS[index % len(COLOURS)]
        line = " ".join(f"{x(step):.1f},{y(loss):.1f}" for step, loss in log)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        place = f'x="{WIDTH - MARGIN}" y="{34 + 16 * index}"'
        parts.append(f'<text {place} text-anchor="end" fill="{colour}">{name}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("logs", nargs="+", help="NAME=LOG.csv")
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    pairs = (log.split("=", 1) for log in args.logs)
    args.output.write_text(draw({name: held_out(Path(path)) for name, path in pairs}), encoding="utf-8")


if __name__ == "__main__":
    main()
