"""Many generations on one model: their prompts in pieces, their tokens in one step."""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from ..errors import DijiangError, InputError, SessionError
from ..runtime.model import Model
from ..runtime.sessions.base import Output
from ..runtime.state import State
from ..runtime.step import Step
from .prefixes import Prefixes
from .scheduler import Scheduler
from .slots import Slots
from .turn import Turn

#: Tokens of a prompt that are fed between two decode steps, at least.
LEAST = 16
#: Weight of the newest measurement.
NEWEST = 0.2


class Pace:
    """How many tokens of a prompt take as long as a decode step."""

    def __init__(self, longest: int) -> None:
        self._longest = longest
        self._step: float | None = None
        self._token: float | None = None

    def stepped(self, seconds: float) -> None:
        """A decode step took so long."""
        self._step = _mean(self._step, seconds)

    def fed(self, tokens: int, seconds: float) -> None:
        """A piece took so long."""
        self._token = _mean(self._token, seconds / tokens)

    @property
    def budget(self) -> int:
        """Tokens of the next piece."""
        if not self._step or not self._token:
            return min(LEAST, self._longest)
        return int(np.clip(self._step / self._token, min(LEAST, self._longest), self._longest))


def _mean(mean: float | None, value: float) -> float:
    return value if mean is None else (1 - NEWEST) * mean + NEWEST * value


class Batcher:
    """Turns come from any thread; one thread runs the steps.

    Args:
        model: nobody else runs it meanwhile.
        slots: turns that are fed or run at once.
        budget: tokens of a prompt between two decode steps; None: as many as take as long as one.
        prefixes: states of prompts' beginnings.
    """

    def __init__(
        self, model: Model, slots: int, budget: int | None = None, prefixes: Prefixes | None = None
    ) -> None:
        if slots < 1:
            raise InputError(f"slots is {slots}, expected at least 1; ask for one or more")
        self.model = model
        self.scheduler = Scheduler(slots)
        self._slots = Slots(model, slots)
        self._budget, self._pace, self._prefixes = budget, Pace(model.session.longest), prefixes
        self._inbox: queue.SimpleQueue[Turn | None] = queue.SimpleQueue()
        self._closed = False

    def submit(self, turn: Turn) -> None:
        """Let a turn begin at the next step that has room for it."""
        self._inbox.put(turn)

    def cancel(self, turn: Turn) -> None:
        """End a turn at the next step; its state is lost."""
        turn.cancelled = True
        self._inbox.put(None)

    def close(self) -> None:
        """Let `run` return; what is on its way is told that it failed."""
        self._closed = True
        self._inbox.put(None)

    def run(self) -> None:
        """Run steps until `close`; waits where there is nothing to do."""
        try:
            while not self._closed:
                self.step(wait=True)
        finally:
            self._receive(wait=False)
            for turn in self.scheduler.clear():
                turn.listener.failed(SessionError("the model was closed before the end; ask again"))

    def step(self, *, wait: bool = False) -> bool:
        """Feed one piece of one prompt, then one token of every running turn; whether anything is left.

        wait: for the next turn, where there is none.
        """
        scheduler = self.scheduler
        self._receive(wait=wait and not scheduler.busy)
        scheduler.drop_cancelled()
        for turn in scheduler.admit():
            self._slots.swap_out(turn)
        if (fed := scheduler.next_fed()) is not None:
            with self._told([fed]):
                self._feed(fed)
        if scheduler.running:
            with self._told(scheduler.running):
                self._decode()
        if not scheduler.running:
            self._slots.clear()
        return scheduler.busy or not self._inbox.empty()

    def _receive(self, *, wait: bool) -> None:
        """Take in what was submitted."""
        while True:
            try:
                turn = self._inbox.get(block=wait)
            except queue.Empty:
                return
            if turn is not None:
                self.scheduler.add(turn)
            wait = False

    def _feed(self, turn: Turn) -> None:
        """One piece of a prompt; after the last one, the first token."""
        if self._prefixes is not None and not turn.fed and (found := self._prefixes.find(turn.borders)):
            (turn.fed, turn.state), turn.reused = found, found[0]
        pace, longest = self._pace, self.model.session.longest
        budget = self._budget or (pace.budget if self.scheduler.running else longest)
        border = min((at for at in turn.kept if at > turn.fed), default=len(turn.plan.ids))
        piece = turn.plan.ids[turn.fed : min(turn.fed + min(budget, longest), border)][None]
        started = time.perf_counter()
        step = Step.of(piece, turn.state.position, np.array([[piece.shape[1] - 1]]))
        output = self.model.session.run(step, turn.state)
        turn.fed += piece.shape[1]
        if self._prefixes is not None and turn.fed in turn.kept:
            self._prefixes.keep(turn.borders[turn.fed], turn.state)
        if turn.left:
            pace.fed(piece.shape[1], time.perf_counter() - started)
            return
        turn.begin(self.model)
        self.scheduler.fed(turn)
        for fork in turn.fork(self.model):
            if not fork.cancelled and self._choose(fork, output, fork.state, 0):
                self.scheduler.add(fork)
        self._choose(turn, output, turn.state, 0)

    def _decode(self) -> None:
        """One token of every running turn."""
        state = self._slots.arrange(self.scheduler.running)
        turns, session = self._slots.turns, self.model.session
        started = time.perf_counter()
        step = session.step(state)
        step.ids[:, 0] = [turn.token for turn in turns]
        step.positions[:, 0] = state.position
        output = session.run(step, state)
        self._pace.stepped(time.perf_counter() - started)
        for row, turn in enumerate(turns):
            self._choose(turn, output, state, row)

    def _choose(self, turn: Turn, output: Output, state: State, row: int) -> bool:
        """The next token of one turn; whether more follow. What fails here, fails for this turn alone."""
        with self._told([turn]):
            if not turn.choose(output, state, row):
                return True
            self.scheduler.end(turn)
        return False

    @contextmanager
    def _told(self, turns: Sequence[Turn]) -> Iterator[None]:
        """An error ends these turns, and is told to them."""
        try:
            yield
        except DijiangError as error:
            for turn in list(turns):
                self.scheduler.end(turn)
                turn.listener.failed(error)
