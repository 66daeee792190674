"""A report as one self-contained HTML file: tables, pictures, formulas and the raw data."""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from typing import Any

from . import render
from .explain import FORMULAS
from .plots import panels
from .render import figure, to_csv, to_json, to_jsonl, to_markdown
from .report import Report

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 1100px; padding: 0 1em; }
table { border-collapse: collapse; margin: 1em 0; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid #ccc; padding: 3px 9px; text-align: right; }
td.text, th { text-align: left; }
.scroll { overflow-x: auto; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(480px, 1fr)); gap: 1em; }
.pictures svg { width: 100%; height: auto; }
figure { margin: 0; } figcaption { font-weight: bold; }
.remark { color: #a40000; }
"""


def to_html(report: Report) -> str:
    """One page without scripts that run, without links, without anything from a network."""
    pictures = "".join(
        f"<figure><figcaption>{escape(title)}</figcaption>{svg}</figure>" for title, svg in panels(report).items()
    )
    parts = [
        "<h1>dijiang bench</h1>",
        _list(render.header_lines(report)),
        "".join(f'<p class="remark">{escape(line[2:])}</p>' for line in render.remarks(report)),
        f'<div class="pictures">{pictures}</div>',
        "<h2>Results</h2>",
        _table(render.result_rows(report)),
        _titled("Side by side", render.ratio_rows(report)),
        _titled("Change over depth", render.flatness_rows(report)),
        "<details><summary>What the figures mean</summary>",
        _table([{"figure": name, "formula": text} for name, text in FORMULAS.items()]),
        "</details>",
        f'<script type="application/json" id="report">{_inert(to_json(report))}</script>',
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>dijiang bench</title>'
        f'<link rel="icon" href="data:,"><style>{STYLE}</style></head>\n<body>\n'
        + "\n".join(parts)
        + "\n</body></html>"
    )


def _inert(json: str) -> str:
    """JSON that cannot end its script element."""
    return json.replace("<", "\\u003c")


def _list(lines: list[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def _titled(title: str, rows: list[dict[str, Any]]) -> str:
    return f"<h2>{escape(title)}</h2>{_table(rows)}" if rows else ""


def _table(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return "<p>Nothing was measured.</p>"
    head = "".join(f"<th>{escape(name)}</th>" for name in rows[0])
    body = "".join("<tr>" + "".join(_cell(v) for v in row.values()) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def _cell(value: Any) -> str:
    kind = ' class="text"' if isinstance(value, str) else ""
    return f"<td{kind}>{escape(figure(value))}</td>"


#: -o -> how a report is written.
FORMATS: dict[str, Callable[[Report], str]] = {
    "md": to_markdown,
    "json": to_json,
    "jsonl": to_jsonl,
    "csv": to_csv,
    "html": to_html,
}
