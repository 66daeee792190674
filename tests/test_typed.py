"""Values of a stranger against declared types."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import pytest

from dijiang.typed import check_types


@dataclass(frozen=True)
class Inner:
    share: float
    kind: Literal["a", "b"] = "a"


@dataclass(frozen=True)
class Outer:
    name: str
    count: int
    flag: bool
    inner: Inner
    many: tuple[Inner, ...] = ()
    maybe: int | None = None
    table: dict[str, tuple[str, ...]] | None = None
    free: Any = None


GOOD = Outer("x", 1, True, Inner(1), (Inner(0.5),), None, {"a": ("b",)}, object())
BAD = {
    "name": [None, 3, b"x", ["x"]],
    "count": [1.0, True, "1", None, float("inf")],
    "flag": [0, 1, None, "yes"],
    "inner": [None, {}, Inner("x"), Inner(True), Inner(1.0, "c")],
    "many": [[], Inner(1), (3,), (Inner(1), Inner(None))],
    "maybe": ["", 1.5, False],
    "table": [{1: ("b",)}, {"a": ["b"]}, {"a": (1,)}, []],
}


def test_declared_types_pass():
    check_types(GOOD)
    check_types(replace(GOOD, maybe=2, table=None, many=()))


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_other_types_are_named(name, value):
    with pytest.raises(ValueError, match=rf"^{name}.* is \w+, expected "):
        check_types(replace(GOOD, **{name: value}))
