"""Timing one repetition: the clock is read once a token and nothing else is done between tokens."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from .matrix import Test
from .subject import Subject

#: Decode steps of a warm-up.
WARM_STEPS = 8


class Timer:
    """One test on one subject, from a state that others may use before and after."""

    def __init__(self, subject: Subject, test: Test, state: Any) -> None:
        self._subject, self._test, self._state = subject, test, state
        length = test.tokens if test.kind == "pp" else 1
        random = np.random.default_rng(test.tokens)
        self._ids = random.integers(subject.vocab_size, size=(test.batch, length))

    def warm_up(self) -> None:
        """Once over the same path; not part of any figure."""
        self._run(min(self._test.tokens, WARM_STEPS))

    def repeat(self) -> list[float]:
        """Seconds of the prompt (pp: one value), or of each generated token (tg)."""
        return self._run(self._test.tokens)

    def _run(self, tokens: int) -> list[float]:
        subject, state, ids = self._subject, self._state, self._ids
        subject.rewind(state, self._test.depth)
        stamps = [time.perf_counter()]
        for _ in range(1 if self._test.kind == "pp" else tokens):
            logits = subject.forward(ids, state)
            chosen = logits.argmax(axis=-1)
            if self._test.kind == "tg":
                ids[:, 0] = chosen
            stamps.append(time.perf_counter())
        return np.diff(stamps).tolist()


def timers_of(subject: Subject, tests: Sequence[Test]) -> dict[Test, Timer]:
    """A timer for each of the tests, which differ only in depth, on one state for all."""
    deepest = max(tests, key=lambda test: test.end)
    state = subject.at(deepest.batch, deepest.depth, deepest.end)
    return {test: Timer(subject, test, state) for test in tests}
