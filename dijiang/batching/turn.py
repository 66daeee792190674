"""One generation of many that go on together."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from itertools import count
from types import MappingProxyType
from typing import Protocol

import numpy as np

from ..errors import DijiangError
from ..runtime.generate import Plan
from ..runtime.model import Model
from ..runtime.sampling import require_numbers
from ..runtime.sequence import Record, Sequence
from ..runtime.sessions.base import Output
from ..runtime.state import State
from .prefixes import worth_keeping

_ORDER = count()
NO_BORDERS: Mapping[int, str] = MappingProxyType({})


class Listener(Protocol):
    """Is told what becomes of a turn, in the thread that runs the steps; it must not block."""

    def record(self, record: Record, logits: np.ndarray | None) -> None:
        """A token; logits [vocab] float32 that it was chosen from, where the turn wants them."""
        ...

    def failed(self, error: DijiangError) -> None:
        """There will be no more records."""
        ...


class Turn:
    """A prompt to be fed to a state, then tokens, one a step.

    Args:
        plan: what is fed and how tokens are chosen, checked.
        state: of batch 1, the turn's own until it ends. After the last record it is where the turn ended,
            if `keeps`.
        listener: is told.
        priority: lower goes first; among equals, who came first.
        keeps: whether the state is wanted at the end.
        wants_logits: whether the listener gets them.
        scored: is given ids [T] of the prompt and the logits [T, vocab] float32 that each of them was to be
            chosen from: of all but the first, piece by piece, in the thread that runs the steps.
        borders: counts of ids after which a state may be kept, see `prefixes`.
    """

    def __init__(
        self,
        plan: Plan,
        state: State,
        listener: Listener,
        *,
        priority: int = 0,
        keeps: bool = False,
        wants_logits: bool = False,
        scored: Callable[[np.ndarray, np.ndarray], None] | None = None,
        borders: Mapping[int, str] = NO_BORDERS,
    ) -> None:
        self.plan, self.state, self.listener, self.borders = plan, state, listener, borders
        self.kept = worth_keeping(borders)
        self.keeps, self.wants_logits, self.scored = keeps, wants_logits, scored
        self.rank = (priority, next(_ORDER))
        #: Set from any thread: the turn ends at the next step, without a record.
        self.cancelled = False
        #: Ids of the plan that were fed, and how many of them in a turn of before.
        self.fed = self.reused = 0
        #: The next token to be fed, once the prompt was.
        self.token = -1
        #: Turns that go on from the same prompt: they begin when it was fed.
        self.forks: list[Turn] = []
        self._sequence: Sequence | None = None
        self._started = time.perf_counter()

    def __lt__(self, other: Turn) -> bool:
        return self.rank < other.rank

    @property
    def left(self) -> int:
        """Ids of the prompt that were not fed yet."""
        return len(self.plan.ids) - self.fed

    def begin_after(self, fed: int, state: State) -> None:
        """So many ids of the prompt are in this state already."""
        state.vocabulary = self.state.vocabulary  # of prompts whose texts were others the ids may be the same
        self.fed = self.reused = fed
        self.state = state

    def asked(self, length: int) -> np.ndarray:
        """Of the next so many ids of the prompt, whose results are wanted, [1, N]: the last one's come first."""
        last = length - 1
        return np.array([[last] if self.scored is None else [last, *range(last)]])

    def score(self, output: Output, length: int) -> None:
        """Tell of the next so many ids of the prompt, which were fed; see `scored`.

        Raises:
            SessionError: logits hold NaN.
        """
        if self.scored is None:
            return
        following = self.plan.ids[self.fed + 1 :][:length]
        logits = np.roll(output.logits[0], -1, axis=0)[: len(following)]
        require_numbers(logits, self.plan.position + self.fed + np.arange(len(following)))
        self.scored(following, logits)

    def begin(self, model: Model, started: float | None = None) -> None:
        """The prompt was fed: tokens follow. started: of the turn that this one was forked from."""
        self.fed = len(self.plan.ids)
        self._sequence = self.plan.begin(model, self.state, self._started if started is None else started)

    def fork(self, model: Model) -> list[Turn]:
        """The turns that go on from here, each with a copy of the state."""
        for turn in self.forks:
            turn.state = self.state.clone()
            turn.begin(model, self._started)
        return self.forks

    def choose(self, output: Output, at: int, state: State, row: int) -> bool:
        """Take the next token, and tell; whether that ended the turn.

        at: its row in the output.  row: its row in the state.
        """
        assert self._sequence is not None
        position = int(state.position[row])
        self.token = self._sequence.choose(output, position, at)
        record = self._sequence.push(self.token, position)
        state.leave(row, self._sequence.seam(self.token, position))
        if record.finish_reason and self.keeps and state is not self.state:
            self.state = state.take([row])
        self.listener.record(record, output.logits[at, 0].copy() if self.wants_logits else None)
        return record.finish_reason is not None
