"""Names of rows: what they stand for, and the error for one that is unknown."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from typing import Any

from ..errors import ExportError


def named(path: str) -> Any:
    """What a row names by import path, `module:name`. Paths come from the tables, never from files."""
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)


def require(what: str, value: str, known: Iterable[str]) -> None:
    """ExportError unless a name is one of those known."""
    known = list(known)
    if value not in known:
        raise ExportError(f"{what} {value!r} is unknown, expected one of {', '.join(known)}")
