"""Tests on one model, or on two that take turns: raw samples in, nothing summarised yet."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from ..errors import BenchError, DijiangError
from ..machine.limits import available_bytes
from ..machine.memory import run_bytes
from ..machine.sensors import Meter, Sensor
from .matrix import Failure, Test
from .traffic import Traffic
from .worker import Load, Worker

Say = Callable[[str], None]
#: Seconds that a session's threads go on looking for work after a step, at most; until then they slow
#: down whoever has the next turn (measured: 70 ms).
SETTLE = 0.1


@dataclass(frozen=True)
class Side:
    """A model to be measured. facts: what the report says about it."""

    name: str
    path: str
    load: Load
    traffic: Traffic
    facts: dict[str, Any]
    baseline_of: str | None = None


@dataclass(frozen=True)
class Effort:
    """How long to measure: both conditions have to hold before a side is done."""

    repetitions: int = 10
    seconds: float = 10.0


@dataclass
class Samples:
    """What one test gave on one side.

    repetitions: seconds of each token (tg) or of the prompt (pp), one list a repetition.
    alone: the other side was not in memory at the same time, so the two did not take turns.
    interleaved: the depths of its series took turns in one process.
    """

    load_seconds: float
    provider: str
    repetitions: list[list[float]] = field(default_factory=list)
    peaks: dict[str, int | None] = field(default_factory=dict)
    joules: float | None = None
    joules_seconds: float = 0.0
    alone: bool = False
    interleaved: bool = False

    @property
    def totals(self) -> list[float]:
        """Seconds of each repetition."""
        return [sum(seconds) for seconds in self.repetitions]

    def add(self, seconds: list[float], meter: Meter) -> None:
        """One repetition, and the energy it took."""
        self.repetitions.append(seconds)
        if meter.joules is not None:
            self.joules = (self.joules or 0.0) + meter.joules
            self.joules_seconds += meter.seconds

    def enough(self, effort: Effort) -> bool:
        """Whether this has been measured for long enough."""
        return len(self.repetitions) >= effort.repetitions and sum(self.totals) >= effort.seconds


Pair = tuple[Side, Test]


def needed_bytes(pairs: Sequence[Pair]) -> int:
    """Memory that tests take in turn, about: each side once, with one state for all its depths."""
    largest: dict[str, int] = {}
    for side, test in pairs:
        need = run_bytes(side.traffic.weights, side.traffic.resident(test.batch, test.end))
        largest[side.name] = max(need, largest.get(side.name, 0))
    return sum(largest.values())


class Series:
    """Tests that differ only in depth, on every side: repetition by repetition in turn.

    samples: by side and test, what there is so far, also after an interruption.
    failures: what could not be measured.
    """

    def __init__(
        self,
        sides: Sequence[Side],
        tests: Sequence[Test],
        effort: Effort,
        provider: str,
        sensors: list[Sensor],
        say: Say,
    ) -> None:
        self.sides, self.tests, self.effort = sides, tests, effort
        self.provider, self.sensors, self.say = provider, sensors, say
        self.samples: dict[tuple[str, Test], Samples] = {}
        self.failures: list[Failure] = []

    def run(self) -> None:
        """Measure what memory allows, as much of it in turn as memory allows."""
        free = available_bytes()
        able = [(side, test) for test in self.tests for side in self.sides if self._fits(side, test, free)]
        able = [pair for pair in able if self._probe(*pair)]
        for pairs in rounds(able, free):
            self._take_turns(pairs)

    def _fits(self, side: Side, test: Test, free: int) -> bool:
        need = needed_bytes([(side, test)])
        if need > free:
            message = (
                f"needs {need / 1e9:,.1f} GB of memory, {free / 1e9:,.1f} GB are free; "
                "use a smaller batch or depth, or a machine with more memory"
            )
            self.failures.append(Failure(side.name, test.label, message))
        return need <= free

    def _probe(self, side: Side, test: Test) -> bool:
        """Load time and peak memory of one test, in a process of its own; False if it failed."""
        self.say(f"{side.name}: {test.label}")
        with self._worker(side, [test]) as worker, self._keeping_on(side, [test]):
            samples = Samples(*worker.start())
            samples.peaks = worker.finish()
            self.samples[side.name, test] = samples
        return (side.name, test) in self.samples

    def _take_turns(self, pairs: Sequence[Pair]) -> None:
        """The repetitions; a side has one process, so that depths differ in nothing but their depth."""
        tests = {side.name: [test for other, test in pairs if other is side] for side, _ in pairs}
        for side, test in pairs:
            samples = self.samples[side.name, test]
            samples.alone = len(tests) < len(self.sides)
            samples.interleaved = len(tests[side.name]) > 1
        workers: dict[str, Worker] = {}
        with ExitStack() as stack:
            for side in (side for side in self.sides if side.name in tests):
                with self._keeping_on(side, tests[side.name]):
                    worker = stack.enter_context(self._worker(side, tests[side.name]))
                    worker.start()
                    workers[side.name] = worker
            before = None
            while left := [pair for pair in pairs if self._wants_more(*pair)]:
                for side, test in (pair for pair in left if self._wants_more(*pair)):
                    if before not in (None, side):
                        time.sleep(SETTLE)
                    with self._keeping_on(side, tests[side.name]):
                        self._repeat(workers[side.name], side, test)
                    before = side

    def _repeat(self, worker: Worker, side: Side, test: Test) -> None:
        with Meter(self.sensors) as meter:
            seconds = worker.repeat(test)
        self.samples[side.name, test].add(seconds, meter)

    def _worker(self, side: Side, tests: Sequence[Test]) -> Worker:
        return Worker(side.load, side.path, self.provider, tests)

    def _wants_more(self, side: Side, test: Test) -> bool:
        samples = self.samples.get((side.name, test))
        return samples is not None and not samples.enough(self.effort)

    @contextmanager
    def _keeping_on(self, side: Side, tests: Sequence[Test]) -> Iterator[None]:
        """Turn an error into a Failure of each test that is not done."""
        try:
            yield
        except DijiangError as error:
            for test in tests:
                samples = self.samples.get((side.name, test))
                if samples is None or not samples.enough(self.effort):
                    self.samples.pop((side.name, test), None)
                    self.failures.append(Failure(side.name, test.label, str(error)))


def rounds(pairs: Sequence[Pair], free: int) -> list[list[Pair]]:
    """What is in turn: all depths of all sides, or the sides of each depth, or nothing."""
    if needed_bytes(pairs) <= free:
        return [list(pairs)]
    tests = dict.fromkeys(test for _, test in pairs)
    groups = [[pair for pair in pairs if pair[1] == test] for test in tests]
    return [
        part
        for group in groups
        for part in ([group] if needed_bytes(group) <= free else [[pair] for pair in group])
    ]


def check_effort(effort: Effort) -> None:
    """BenchError for repetitions or seconds that are no sizes."""
    if effort.repetitions < 1 or effort.seconds < 0:
        raise BenchError(
            f"{effort.repetitions} repetitions and {effort.seconds} seconds: expected at least 1 and 0"
        )
