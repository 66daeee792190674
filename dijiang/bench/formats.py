"""The forms that a report can be written in."""

from __future__ import annotations

from collections.abc import Callable

from .page import to_html
from .render import Report, to_csv, to_json, to_jsonl, to_markdown

#: -o -> how the report is written.
FORMATS: dict[str, Callable[[Report], str]] = {
    "md": to_markdown,
    "json": to_json,
    "jsonl": to_jsonl,
    "csv": to_csv,
    "html": to_html,
}
