"""Reading files of any origin: none is waited for, and none is larger than it may be."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from .errors import DijiangError

T = TypeVar("T")
#: A larger file of JSON is none that dijiang reads.
JSON_BYTES = 64 << 20


def read_regular(path: Path, most: int = JSON_BYTES) -> bytes:
    """All bytes of a file that is neither a pipe nor a device, and no larger than `most`.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: it is no regular file, or too large.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise ValueError("not a regular file")
    if found.st_size > most:
        raise ValueError(f"{found.st_size} bytes, expected at most {most}")
    return path.read_bytes()


def read_json(path: Path) -> Any:
    """The value in a JSON file, whoever wrote it.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: as `read_regular`, or no UTF-8, no JSON, or too deep.
    """
    return parse_json(read_regular(path))


def parse_json(data: bytes) -> Any:
    """The value of JSON in UTF-8, with or without a byte order mark; ValueError if it is none, or too deep."""
    try:
        return json.loads(data.decode("utf-8-sig"))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def given(path: Path, read: Callable[[Path], T], error: type[DijiangError], advice: str) -> T:
    """What `read` gives of a file that a user named; `error` with `advice` where it cannot be read."""
    try:
        return read(path)
    except (OSError, ValueError) as reason:
        said = getattr(reason, "strerror", None) or reason
        raise error(f"{path}: unreadable ({said}); {advice}") from reason
