"""Decode steps of one sequence: what `generate` runs for every token.

A step empties the caches of everything but weights, so that each Python or NumPy call beside it costs
ten times what it costs in a loop of its own: nothing is checked, made or copied here for a token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    from .sessions.base import Session
    from .state import State


class Decoder(Protocol):
    """Advances a state of batch 1; the caller checks the prompt and watches the limit of positions."""

    def logits(self, token: int) -> np.ndarray:
        """Logits [vocab] float32 after a token; overwritten by the next step."""
        ...

    def pick(self, token: int) -> int:
        """The most likely token after a token."""
        ...


class SessionDecoder:
    """The Decoder of a session that takes its inputs call by call."""

    def __init__(self, session: Session, state: State) -> None:
        self._session, self._state = session, state
        self._ids, self._mask = np.zeros((1, 1), np.int64), np.ones((1, 1), np.int64)
        self._positions, self._kept = np.zeros((1, 1), np.int64), np.zeros((1, 1), np.int64)

    def logits(self, token: int) -> np.ndarray:
        """See Decoder.logits."""
        inputs = self._inputs(token)
        row: np.ndarray = self._session.run(*inputs, self._state)[0, 0]
        self._state.position[0] += 1
        return row

    def pick(self, token: int) -> int:
        """See Decoder.pick."""
        inputs = self._inputs(token)
        picked = self._session.next_tokens(*inputs, self._state)
        self._state.position[0] += 1
        return int(picked[0, 0])

    def _inputs(self, token: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        self._ids[0, 0] = token
        self._positions[0, 0] = self._state.position[0]
        return self._ids, self._positions, self._mask, self._kept
