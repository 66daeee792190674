"""Many generations on one model: their prompts in pieces, their tokens in one step."""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

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
#: The same in one step with the tokens of running turns; and by what part of its time such a step may be longer.
LEAST_TOGETHER, LONGER = 4, 0.5
#: Weight of the newest measurement.
NEWEST = 0.2
#: What a turn is told that has no steps any more.
CLOSED = "the model was closed before the end; ask again"


class Pace:
    """How many tokens of a prompt take as long as a part of a decode step.

    longest, least: tokens at most, and at least.
    """

    def __init__(self, longest: int, least: int = LEAST, part: float = 1.0) -> None:
        self._longest, self._least, self._part = longest, min(least, longest), part
        self._step: float | None = None
        self._token: float | None = None

    def stepped(self, seconds: float) -> None:
        """A decode step took so long."""
        self._step = _mean(self._step, seconds)

    def fed(self, tokens: int, seconds: float) -> None:
        """A piece took so long."""
        self._token = _mean(self._token, seconds / tokens)

    def stepped_and_fed(self, tokens: int, seconds: float) -> None:
        """A decode step took so long with a piece in it."""
        if self._step:
            self.fed(tokens, max(seconds - self._step, 0.0))

    @property
    def budget(self) -> int:
        """Tokens of the next piece."""
        if not self._step or not self._token:
            return self._least
        return int(np.clip(self._part * self._step / self._token, self._least, self._longest))


def _mean(mean: float | None, value: float) -> float:
    return value if mean is None else (1 - NEWEST) * mean + NEWEST * value


class Batcher:
    """Turns come from any thread; one thread runs the steps.

    Args:
        model: nobody else runs it meanwhile.
        slots: turns that are fed or run at once.
        budget: tokens of a prompt between two decode steps, or in a step of both; None: as `Pace` says.
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
        longest, self._ragged = model.session.longest, model.session.ragged
        #: Of pieces in steps of their own, and of those in one step with running turns.
        self._alone = Pace(longest)
        self._together = Pace(max(longest - slots, LEAST_TOGETHER), LEAST_TOGETHER, LONGER)
        self._budget, self._prefixes = budget, prefixes
        self._inbox: queue.SimpleQueue[Turn | None] = queue.SimpleQueue()
        self._closed = self._ended = False

    def submit(self, turn: Turn) -> None:
        """Let a turn begin at the next step that has room for it; where `run` has ended, it fails."""
        self._inbox.put(turn)
        if self._ended:  # nobody will take it
            self._fail_rest()

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
            self._ended = True
            self._fail_rest()
            for turn in self.scheduler.clear():
                turn.listener.failed(SessionError(CLOSED))

    def _fail_rest(self) -> None:
        """Tell what waits that nobody will take it."""
        with suppress(queue.Empty):
            while True:
                if (turn := self._inbox.get_nowait()) is not None:
                    turn.listener.failed(SessionError(CLOSED))

    def step(self, *, wait: bool = False) -> bool:
        """Feed one piece of one prompt and one token of every running turn; whether anything is left.

        wait: for the next turn, where there is none.
        """
        scheduler = self.scheduler
        self._receive(wait=wait and not scheduler.busy)
        scheduler.drop_cancelled()
        for turn in scheduler.admit():
            self._slots.swap_out(turn)
        self._leave_slots()
        fed = scheduler.next_fed()
        if fed is not None and scheduler.running and self._ragged and fed.scored is None:
            begun = [turn for turn in scheduler.feeding if (turn.fed or turn is fed) and turn.scored is None]
            with self._told([*begun, *scheduler.running]):
                self._feed_and_decode(fed, begun)
        else:
            if fed is not None:
                with self._told([fed]):
                    self._feed(fed)
            if scheduler.running:
                with self._told(scheduler.running):
                    self._decode()
        self._leave_slots()
        return scheduler.busy or not self._inbox.empty()

    def _leave_slots(self) -> None:
        """Where nobody runs, prompts are fed to states of their own."""
        if not self.scheduler.running:
            for turn in self.scheduler.feeding:
                self._slots.swap_out(turn)
            self._slots.clear()

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
        longest = self.model.session.longest
        budget = self._budget or (self._alone.budget if self.scheduler.running else longest)
        piece = self._next_piece(turn, min(budget, longest))
        started = time.perf_counter()
        step = Step.of(piece[None], turn.state.position, turn.asked(len(piece)))
        output = self.model.session.run(step, turn.state)
        turn.score(output, len(piece))
        turn.fed += len(piece)
        if turn.left:
            self._alone.fed(len(piece), time.perf_counter() - started)
        self._after_piece(turn, output, 0, turn.state, 0)

    def _next_piece(self, turn: Turn, most: int) -> np.ndarray:
        """The ids [T] of a prompt to be fed now; the first time, what a kept state covers is left out."""
        if self._prefixes is not None and not turn.fed and (found := self._prefixes.find(turn.borders)):
            turn.begin_after(*found)
        border = min((at for at in turn.kept if at > turn.fed), default=len(turn.plan.ids))
        return turn.plan.ids[turn.fed : min(turn.fed + most, border)]

    def _after_piece(self, turn: Turn, output: Output, at: int, state: State, row: int) -> None:
        """A piece was fed, see `Turn.choose`: keep its state where one is kept; at the end of the prompt, go on."""
        keeps = self._prefixes is not None and turn.fed in turn.kept
        if keeps or not turn.left:
            self._slots.swap_out(turn)
        if keeps:
            assert self._prefixes is not None
            self._prefixes.keep(turn.borders[turn.fed], turn.state)
        if turn.left:
            return
        turn.begin(self.model)
        self.scheduler.fed(turn)
        for fork in turn.fork(self.model):
            if not fork.cancelled and self._choose(fork, output, at, fork.state, 0):
                self.scheduler.add(fork)
        self._choose(turn, output, at, state, row)

    def _feed_and_decode(self, fed: Turn, begun: list[Turn]) -> None:
        """One piece of a prompt and one token of every running turn, in one step: the weights are read once.

        begun: whose prompts lie in the slots from then on; all but one wait.
        """
        running = self.scheduler.running
        piece = self._next_piece(fed, self._budget or self._together.budget)
        state = self._slots.arrange([*running, *begun])
        turns = list(self._slots.turns)
        pieces = [piece if turn is fed else [] if turn.left else [turn.token] for turn in turns]
        ends = fed.left == len(piece)
        wanted = [row for row, turn in enumerate(turns) if not turn.left or (turn is fed and ends)]
        started = time.perf_counter()
        output = self.model.session.run(Step.ragged(pieces, state.position, wanted), state)
        self._together.stepped_and_fed(len(piece), time.perf_counter() - started)
        for at, row in enumerate(wanted):
            if turns[row] is not fed:
                self._choose(turns[row], output, at, state, row)
        fed.fed += len(piece)
        row = turns.index(fed)
        with self._told([fed]):
            self._after_piece(fed, output, wanted.index(row) if ends else 0, state, row)

    def _decode(self) -> None:
        """One token of every running turn."""
        state = self._slots.arrange(self.scheduler.running)
        turns, session = self._slots.turns, self.model.session
        started = time.perf_counter()
        step = session.step(state)
        step.ids[:, 0] = [turn.token for turn in turns]
        step.positions[:, 0] = state.position
        output = session.run(step, state)
        seconds = time.perf_counter() - started
        self._alone.stepped(seconds)
        self._together.stepped(seconds)
        for row, turn in enumerate(turns):
            self._choose(turn, output, row, state, row)

    def _choose(self, turn: Turn, output: Output, at: int, state: State, row: int) -> bool:
        """The next token of one turn, see `Turn.choose`; whether more follow. What fails, fails for it alone."""
        with self._told([turn]):
            if not turn.choose(output, at, state, row):
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
