"""Timing one repetition: the clock is read once a token and nothing else is done between tokens."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import islice
from typing import Any, Protocol

import numpy as np

from .matrix import Test
from .subject import SelfTimed, Subject

#: Decode steps of a warm-up.
WARM_STEPS = 8


class Timer(Protocol):
    """One test on one subject."""

    def warm_up(self) -> None:
        """Once over the same path; not part of any figure."""
        ...

    def repeat(self) -> list[float]:
        """Seconds of the prompt (pp: one value), or of each generated token (tg)."""
        ...


class LoopTimer:
    """Times a subject's own loops, from a state that others may use before and after."""

    def __init__(self, subject: Subject, test: Test, state: Any) -> None:
        self._subject, self._test, self.state = subject, test, state
        self._steps = getattr(subject, "ways", {}).get(test.way, subject.steps)
        length = test.tokens if test.prompt else 1
        random = np.random.default_rng(test.tokens)
        self.ids = random.integers(subject.vocab_size, size=(test.batch, length))

    def warm_up(self) -> None:
        """See Timer.warm_up."""
        self._run(min(self._test.tokens, WARM_STEPS))

    def repeat(self) -> list[float]:
        """See Timer.repeat."""
        return self._run(self._test.tokens)

    def _run(self, tokens: int) -> list[float]:
        subject, state, now = self._subject, self.state, time.perf_counter
        subject.rewind(state, self._test.depth)
        if self._test.prompt:
            stamps = [now()]
            subject.prefill(self.ids, state)
            stamps.append(now())
        else:
            steps = islice(self._steps(self.ids[:, 0], state), tokens)
            stamps = [now()]
            for self.chosen in steps:
                stamps.append(now())
        return np.diff(stamps).tolist()


class OwnTimer:
    """A subject that has a clock."""

    def __init__(self, subject: SelfTimed, test: Test) -> None:
        self._subject, self._test = subject, test

    def warm_up(self) -> None:
        """See Timer.warm_up."""
        self._subject.warm_up(self._test)

    def repeat(self) -> list[float]:
        """See Timer.repeat."""
        return self._subject.seconds(self._test)


def timers_of(subject: Subject | SelfTimed, tests: Sequence[Test]) -> dict[Test, Timer]:
    """A timer for each of the tests, which differ only in depth or way, on one state for all."""
    if isinstance(subject, SelfTimed):
        return {test: OwnTimer(subject, test) for test in tests}
    deepest = max(tests, key=lambda test: test.end)
    state = subject.at(deepest.batch, deepest.depth, deepest.end)
    return {test: LoopTimer(subject, test, state) for test in tests}
