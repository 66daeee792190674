"""Edits of values of JSON and of bytes, drawn as data: so a case can be kept."""

from __future__ import annotations

import json
import random
from typing import Any

from tests.fuzz.grammar import BYTES, value

DEEP = "[" * 5000 + "]" * 5000
#: Texts in the place of a value.
LITERALS = {"digits": "9" * 5001, "lists": DEEP, "1e400": "1e400", "-Infinity": "-Infinity", "NaN": "NaN"}


def tree_edit(draw: random.Random) -> list[Any]:
    """Where (a number a level), and what becomes of that place."""
    where = [draw.randrange(40) for _ in range(draw.randrange(1, 6))]
    what = draw.choice(["set", "set", "set", "drop", "add", "twice", "literal"])
    return [what, where, draw.choice(list(LITERALS)) if what == "literal" else value(draw)]


def edit_tree(tree: Any, edit: list[Any]) -> str:
    """The JSON of a value after an edit."""
    what, where, new = edit
    at, path = tree, list(where)
    while len(path) > 1 and _keys(at):
        inner = at[_keys(at)[path[0] % len(_keys(at))]]
        if not _keys(inner):
            break
        at = inner
        path.pop(0)
    keys = _keys(at)
    key = keys[path[0] % len(keys)] if keys else None
    mark = "\x00literal\x00"
    if what == "add" or key is None:
        if isinstance(at, dict):
            at["x" if what == "add" else "y"] = new
        elif isinstance(at, list):
            at.append(new)
        else:
            return json.dumps(new)
    elif what == "drop":
        del at[key]
    elif what == "twice" and isinstance(at, list):
        at.append(at[key])
    else:
        at[key] = mark if what == "literal" else new
    text = json.dumps(tree)
    return text.replace(json.dumps(mark), LITERALS[new]) if what == "literal" else text


def _keys(at: Any) -> list[Any]:
    return list(at) if isinstance(at, dict) else list(range(len(at))) if isinstance(at, list) else []


def bytes_edit(draw: random.Random) -> list[Any]:
    """One edit of bytes; places from the start, the end and anywhere."""
    place = draw.choice([draw.randrange(64), draw.randrange(600), -draw.randrange(1, 400), draw.randrange(60_000)])
    new = draw.choice([draw.choice(BYTES), draw.randbytes(1).hex(), draw.randbytes(draw.randrange(1, 9)).hex()])
    return [draw.choice(["bytes", "bytes", "insert", "cut", "move"]), place, new]


def edit_bytes(data: bytes, edit: list[Any]) -> bytes:
    """Bytes after an edit."""
    what, place, text = edit
    at, new = place % (len(data) + 1), bytes.fromhex(text[: len(text) // 2 * 2])
    if what == "cut":
        return data[:at]
    if what == "move":
        return data[: at // 2] + data[at : at + 50] + data[at // 2 :]
    return data[:at] + new + data[at + (len(new) if what == "bytes" else 0) :]
