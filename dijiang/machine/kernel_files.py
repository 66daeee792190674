"""Small files in which a kernel or a board says what it is."""

from __future__ import annotations

from pathlib import Path


def text_of(file: Path) -> str:
    """What a file says; empty if it cannot be read."""
    try:
        return file.read_text(errors="replace").strip()
    except OSError:
        return ""
