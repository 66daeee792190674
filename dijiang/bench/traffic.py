"""Bytes that a decode step has to move: the numerator of the roofline, in one place."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Traffic:
    """What a step reads and writes.

    weights: bytes of parameters that every step reads once, whatever the batch.
    rows: bytes of looked-up table rows a token (embedding, rotary, decay tables).
    state: bytes of recurrent state a sequence; read and written.
    cache: bytes of keys and values a token of a sequence; read for every earlier token, written once.
    """

    weights: int
    rows: int = 0
    state: int = 0
    cache: int = 0

    def step(self, batch: int, depth: float) -> float:
        """Bytes of one decode step of `batch` sequences that have `depth` tokens each.

        weights + batch * (rows + 2 * state + (depth + 1) * cache)
        """
        return self.weights + batch * (self.rows + 2 * self.state + (depth + 1) * self.cache)

    def resident(self, batch: int, tokens: int) -> int:
        """Bytes of the states or caches of `batch` sequences that will have `tokens` tokens."""
        return batch * (self.state + tokens * self.cache)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return asdict(self)
