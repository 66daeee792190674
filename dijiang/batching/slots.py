"""The rows of the batched step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..machine.limits import available_bytes
from ..runtime.model import Model
from ..runtime.state import State
from .turn import Turn

#: Part of the free memory that slots may take, and slots at most where nobody says how many.
SHARE, MOST = 0.5, 16


def slot_bytes(model: Model) -> int:
    """Memory of one slot: the row of a sequence, and its own state while its prompt is fed."""
    return 2 * (model.spec.state_bytes + model.spec.vocab_size)


def slots_that_fit(model: Model) -> int:
    """Slots for this machine: what half of its free memory holds, 1 to 16."""
    return int(min(max(SHARE * available_bytes() // slot_bytes(model), 1), MOST))


class Slots:
    """States of the running turns in memory that is never allocated again; those in use come first.

    A step is as large as the turns that run. Joining and leaving copy one state each.
    """

    def __init__(self, model: Model, count: int) -> None:
        shape = (count, *model.spec.state_shape)
        self._memory = [np.zeros(shape, np.float32) for _ in range(model.spec.num_layers)]
        self._turns: list[Turn] = []
        self._state: State | None = None

    @property
    def turns(self) -> Sequence[Turn]:
        """Whose rows they are, in order."""
        return self._turns

    def swap_out(self, turn: Turn) -> None:
        """Give a turn its state back, if it lies here; the row is the turn's until the next `arrange`."""
        if turn in self._turns and self._state is not None:
            turn.state = self._state.take([self._turns.index(turn)])

    def arrange(self, turns: Sequence[Turn]) -> State:
        """Have exactly these turns here, at least one; their state, one row each, in the order of `turns`.

        The last rows fill the places of turns that left.
        """
        wanted, here = set(turns), set(self._turns)
        if self._state is not None and wanted == here:
            return self._state
        stays = [(turn, row) for row, turn in enumerate(self._turns) if turn in wanted]
        front = {row: turn for turn, row in stays if row < len(stays)}
        back = [(turn, row) for turn, row in stays if row >= len(stays)]
        rows = [(front[at], at) if at in front else back.pop() for at in range(len(stays))]
        joined = [turn for turn in turns if turn not in here]
        old = self._state
        sources = [(old, row) for _, row in rows if old is not None] + [(turn.state, 0) for turn in joined]
        self._turns = [turn for turn, _ in rows] + joined
        self._state = State.gathered(sources, self._memory)
        return self._state

    def clear(self) -> None:
        """Forget all rows."""
        self._turns, self._state = [], None
