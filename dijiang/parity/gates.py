"""What a bundle must meet before it may be kept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..recipe import Gate


@dataclass(frozen=True)
class Verdict:
    """A gate and what was found; NaN never passes."""

    metric: str
    found: float
    bound: float
    passed: bool


def judge(gates: Iterable[Gate], metrics: Mapping[str, float | None]) -> tuple[Verdict, ...]:
    """The verdict of every gate whose metric was measured."""
    found = [(gate, metrics[gate.metric]) for gate in gates]
    return tuple(
        Verdict(gate.metric, value, gate.bound, value <= gate.bound) for gate, value in found if value is not None
    )
