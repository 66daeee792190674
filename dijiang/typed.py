"""Values of a stranger against the types that a dataclass declares, and ours as JSON takes them."""

from __future__ import annotations

import math
from dataclasses import is_dataclass
from functools import cache
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


def check_types(record: object, where: str = "") -> None:
    """ValueError unless every field of a dataclass, and of those inside of it, is of its declared type.

    A whole number may stand for a float. A boolean is no number.
    """
    cls: Any = type(record)
    for name, declared in _declared(cls).items():
        value = getattr(record, name)
        if not _fits(value, declared, f"{where}{name}."):
            raise ValueError(f"{where}{name} is {type(value).__name__}, expected {_named(declared)}")


@cache
def _declared(cls: Any) -> dict[str, Any]:
    return get_type_hints(cls)


def _fits(value: Any, declared: Any, where: str) -> bool:
    origin, inner = get_origin(declared), get_args(declared)
    if declared is Any:
        return True
    if origin in (Union, UnionType):
        return any(_fits(value, one, where) for one in inner)
    if origin is Literal:
        return value in inner
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(one, inner[0], where) for one in value)
    if origin is dict:
        return isinstance(value, dict) and all(
            _fits(key, inner[0], where) and _fits(one, inner[1], where) for key, one in value.items()
        )
    if is_dataclass(declared):
        if type(value) is not declared:
            return False
        check_types(value, where)
        return True
    if declared in (int, float):
        return type(value) is int or (declared is float and type(value) is float)
    return isinstance(value, declared)


def unknown_field(data: Any, declared: Any, where: str = "") -> str | None:
    """Where JSON that is to become a dataclass has a field that this, or one inside of it, does not declare."""
    origin, inner = get_origin(declared), get_args(declared)
    parts: list[tuple[str, Any, Any]] = []
    if origin in (Union, UnionType):
        parts = [(where, data, one) for one in inner]
    elif origin is dict and isinstance(data, dict):
        parts = [(f"{where}{key}.", value, inner[1]) for key, value in data.items()]
    elif origin is tuple and isinstance(data, list):
        parts = [(f"{where}{at}.", value, inner[0]) for at, value in enumerate(data)]
    elif is_dataclass(declared) and isinstance(data, dict):
        of: Any = declared
        known = _declared(of)
        if more := sorted(data.keys() - known):
            return f"{where}{more[0]}"
        parts = [(f"{where}{name}.", value, known[name]) for name, value in data.items()]
    found = (unknown_field(value, kind, place) for place, value, kind in parts)
    return next((one for one in found if one is not None), None)


def _named(declared: Any) -> str:
    return declared.__name__ if isinstance(declared, type) else str(declared)


def strict(value: Any) -> Any:
    """Dicts, sequences and numbers without NaN and infinity, which JSON does not have: null stands for them."""
    if isinstance(value, dict):
        return {key: strict(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
