"""Tests on sides that take turns: raw samples in, nothing summarised yet."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from ..errors import BenchError, DijiangError
from ..machine.contention import Watch, wait_until_idle
from ..machine.limits import available_bytes
from ..machine.memory import run_bytes
from ..machine.sensors import Meter, Sensor
from .matrix import Failure, Test
from .subject import Side
from .worker import Worker

Say = Callable[[str], None]
#: Seconds that a session's threads go on looking for work after a step, at most; until then they slow
#: down whoever has the next turn (measured: 70 ms).
SETTLE = 0.1
#: Of a quiet measurement: the share of its time in which a runnable thread may have waited for a CPU,
#: how often it is tried, and seconds after which it is not tried again.
QUIET, TRIES, PATIENCE = 0.05, 3, 20.0


@dataclass(frozen=True)
class Effort:
    """How long to measure: repetitions and seconds have to be reached before a side is done.

    minutes: of a series, at most.
    quiet: wait for an idle machine before each repetition, take again what other processes disturbed,
        and leave out what stays so; measure the memory's bandwidth in every turn.
    probe: load time and peak memory of each test from a process of its own, which only warms up.
    """

    repetitions: int = 10
    seconds: float = 10.0
    minutes: float = math.inf
    quiet: bool = False
    probe: bool = True

    def check(self) -> None:
        """BenchError for repetitions or seconds that are no sizes."""
        if self.repetitions < 1 or self.seconds < 0:
            raise BenchError(
                f"{self.repetitions} repetitions and {self.seconds} seconds: expected at least 1 and 0"
            )


@dataclass(frozen=True)
class Turn:
    """One repetition. seconds: of each token, or one total; waited, stolen: see contention.Watch."""

    number: int
    seconds: list[float]
    waited: float = 0.0
    stolen: float = 0.0


@dataclass
class Samples:
    """What one test gave on one side.

    facts: what the subject says of itself once it is loaded.
    turns: those that count; disturbed: those during which other processes ran.
    alone: the other side was not in memory at the same time, so the two did not take turns.
    interleaved: the tests of its series took turns in one process.
    """

    load_seconds: float | None
    provider: str
    facts: dict[str, Any] = field(default_factory=dict)
    turns: list[Turn] = field(default_factory=list)
    disturbed: list[Turn] = field(default_factory=list)
    peaks: dict[str, int | None] = field(default_factory=dict)
    joules: float | None = None
    joules_seconds: float = 0.0
    alone: bool = False
    interleaved: bool = False
    taken: int = 0

    @property
    def totals(self) -> list[float]:
        """Seconds of each repetition that counts."""
        return [sum(turn.seconds) for turn in self.turns]

    def add(self, turn: Turn, meter: Meter) -> None:
        """One repetition, and the energy it took."""
        self.turns.append(turn)
        if meter.joules is not None:
            self.joules = (self.joules or 0.0) + meter.joules
            self.joules_seconds += meter.seconds

    def enough(self, effort: Effort) -> bool:
        """Whether this has been measured for long enough."""
        return self.taken >= effort.repetitions and sum(self.totals) >= effort.seconds


Pair = tuple[Side, Test]


def needed_bytes(pairs: Sequence[Pair]) -> int:
    """Memory that tests take in turn, about: each side once, with one state for all its depths."""
    largest: dict[str, int] = {}
    for side, test in pairs:
        need = run_bytes(side.traffic.weights, side.traffic.resident(test.batch, test.end))
        largest[side.name] = max(need, largest.get(side.name, 0))
    return sum(largest.values())


@dataclass
class Series:
    """Tests that differ only in depth or way, on every side: repetition by repetition in turn.

    samples: by side and test, what there is so far, also after an interruption.
    failures: what could not be measured.  before_turn: told the number of the turn that begins.
    """

    sides: Sequence[Side]
    tests: Sequence[Test]
    effort: Effort
    provider: str
    sensors: list[Sensor]
    say: Say
    before_turn: Callable[[int], None] = lambda number: None
    samples: dict[tuple[str, Test], Samples] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)

    def run(self) -> None:
        """Measure what memory allows, as much of it in turn as memory allows."""
        free = available_bytes()
        able = [(side, test) for test in self.tests for side in self.sides if self._fits(side, test, free)]
        if self.effort.probe:
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
        sides = [side for side in self.sides if side.name in tests]
        workers: dict[str, Worker] = {}
        with ExitStack() as stack:
            for side in sides:
                with self._keeping_on(side, tests[side.name]):
                    worker = stack.enter_context(self._worker(side, tests[side.name]))
                    loaded = worker.start()
                    workers[side.name] = worker
                    for test in tests[side.name]:
                        samples = self.samples.setdefault((side.name, test), Samples(*loaded))
                        samples.alone = len(tests) < len(self.sides)
                        samples.interleaved = len(tests[side.name]) > 1
            self._repeat_all(workers, pairs, tests)
            for side in [] if self.effort.probe else sides:
                with self._keeping_on(side, tests[side.name]):
                    peaks = workers[side.name].finish() if side.name in workers else {}
                    for test in tests[side.name]:
                        if found := self.samples.get((side.name, test)):
                            found.peaks = peaks

    def _repeat_all(self, workers: dict[str, Worker], pairs: Sequence[Pair], tests: dict[str, list[Test]]) -> None:
        before, number, ending = None, 0, time.monotonic() + 60 * self.effort.minutes
        while left := [pair for pair in pairs if self._wants_more(*pair)]:
            if number and time.monotonic() > ending:
                return
            self.before_turn(number)
            for side, test in (pair for pair in left if self._wants_more(*pair)):
                if before not in (None, side):
                    time.sleep(SETTLE)
                with self._keeping_on(side, tests[side.name]):
                    self._repeat(workers[side.name], side, test)
                before = side
            number += 1

    def _repeat(self, worker: Worker, side: Side, test: Test) -> None:
        """One turn; where it has to be quiet, tried again while other processes disturb it."""
        samples, ending = self.samples[side.name, test], time.monotonic() + PATIENCE
        for tried in range(1, TRIES + 1):
            if self.effort.quiet:
                wait_until_idle(ending - time.monotonic())
            watch = Watch()
            with Meter(self.sensors) as meter:
                seconds = worker.repeat(test)
            turn = Turn(samples.taken, seconds, *watch.seen())
            if not self.effort.quiet or turn.waited <= QUIET:
                samples.add(turn, meter)
                break
            samples.disturbed.append(turn)
            if tried == TRIES or time.monotonic() > ending:
                break
        samples.taken += 1

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
