"""Tests on sides that take turns: raw samples in, nothing summarised yet."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from ..errors import BenchError, DijiangError
from ..machine.bandwidth import measure_bandwidth
from ..machine.contention import Watch, wait_until_idle
from ..machine.limits import available_bytes
from ..machine.memory import run_bytes
from ..machine.sensors import Meter, Sensor
from .matrix import Test, failure, series_of
from .subject import Side
from .worker import Worker

Say = Callable[[str], None]
#: Seconds that a session's threads go on looking for work after a step, at most; until then they slow
#: down whoever has the next turn (measured: 70 ms).
SETTLE = 0.1
#: Of a quiet measurement: the share of its time in which a runnable thread may have waited for a CPU,
#: how often it is tried, and seconds after which it is not tried again.
QUIET, TRIES, PATIENCE = 0.05, 3, 20.0
#: Seconds of idle power before the tests.
IDLE = 2.0


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

    def __post_init__(self) -> None:
        if self.repetitions < 1 or not 0 <= self.seconds < math.inf:
            found = f"{self.repetitions} repetitions and {self.seconds} seconds"
            raise BenchError(f"{found}: expected at least 1 and 0; change -r or --seconds")


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
    joules_turns: int = 0
    alone: bool = False
    interleaved: bool = False
    taken: int = 0

    @property
    def totals(self) -> list[float]:
        """Seconds of each repetition that counts."""
        return [sum(turn.seconds) for turn in self.turns]


Pair = tuple[Side, Test]


@dataclass
class Run:
    """Measures tests on sides; what was measured stays when it is interrupted.

    samples: by side and test.  failures: what could not be measured.
    bandwidths: of the report, with the threads asked for.  turn: None: before or after all.
    """

    effort: Effort
    provider: str
    sensors: list[Sensor]
    say: Say
    samples: dict[tuple[str, Test], Samples] = field(default_factory=dict)
    failures: list[dict[str, Any]] = field(default_factory=list)
    bandwidths: list[tuple[int | None, dict[str, Any]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.idle = Meter(self.sensors)

    def all(self, groups: Sequence[Sequence[Side]], tests: Sequence[Test]) -> None:
        """Every test on every group of sides; KeyboardInterrupt ends it early."""
        try:
            with self.idle:
                time.sleep(IDLE if self.sensors else 0)
            self.bandwidth(tests, None)
            for series in series_of(tests):
                for group in groups:
                    self.series(group, series)
            self.bandwidth(tests, None)
        except KeyboardInterrupt:
            self.failures.append(failure("interrupted; the tests before it are kept"))

    def bandwidth(self, tests: Sequence[Test], turn: int | None) -> None:
        """For each count of threads: before the tests and after them, as other load comes and goes."""
        for count in dict.fromkeys(test.threads for test in tests):
            if turn is None:
                self.say("memory bandwidth")
            self.bandwidths.append((count, asdict(measure_bandwidth(threads=count)) | {"turn": turn}))

    def rates(self) -> dict[int | None, float]:
        """Bytes a second by the threads asked for: the fastest; of turns, their median."""
        found: dict[int | None, list[float]] = {}
        for threads, measured in self.bandwidths:
            if not self.effort.quiet or measured["turn"] is not None:
                found.setdefault(threads, []).append(measured["bytes_per_second"])
        middle = statistics.median if self.effort.quiet else max
        return {threads: middle(rates) for threads, rates in found.items()}

    def series(self, sides: Sequence[Side], tests: Sequence[Test]) -> None:
        """Tests that differ only in depth or way, on every side: as much in turn as memory allows."""
        free, able = available_bytes(), []
        for side, test in [(side, test) for test in tests for side in sides]:
            need = needed_bytes([(side, test)])
            if need > free:
                found = f"needs {need / 1e9:,.1f} GB of memory, {free / 1e9:,.1f} GB are free"
                advice = "use a smaller batch or depth, or a machine with more memory"
                self.failures.append(failure(f"{found}; {advice}", side.name, test.label))
            elif not self.effort.probe or self._probe(side, test):
                able.append((side, test))
        for pairs in rounds(able, free):
            self._take_turns(pairs, len(sides))

    def _probe(self, side: Side, test: Test) -> bool:
        """Load time and peak memory of one test, in a process of its own; False if it failed."""
        self.say(f"{side.name}: {test.label}")
        with self._keeping_on(side, [test]), Worker(side, self.provider, [test]) as worker:
            self.samples[side.name, test] = Samples(*worker.start(), peaks=worker.finish())
        return (side.name, test) in self.samples

    def _take_turns(self, pairs: Sequence[Pair], sides: int) -> None:
        """The repetitions; a side has one process, so that depths differ in nothing but their depth."""
        tests: dict[Side, list[Test]] = {}
        for side, test in pairs:
            tests.setdefault(side, []).append(test)
        workers: dict[str, Worker] = {}
        with ExitStack() as stack:
            for side, mine in tests.items():
                with self._keeping_on(side, mine):
                    worker = stack.enter_context(Worker(side, self.provider, mine))
                    loaded, workers[side.name] = worker.start(), worker
                    for test in mine:
                        samples = self.samples.setdefault((side.name, test), Samples(*loaded))
                        samples.alone, samples.interleaved = len(tests) < sides, len(mine) > 1
            self._repeat_all(workers, pairs, tests)
            for side in tests if not self.effort.probe else ():
                kept = [self.samples[side.name, test] for test in tests[side] if (side.name, test) in self.samples]
                with self._keeping_on(side, tests[side]):
                    peaks = workers[side.name].finish() if kept else {}
                    for samples in kept:
                        samples.peaks = peaks

    def _repeat_all(self, workers: dict[str, Worker], pairs: Sequence[Pair], tests: dict[Side, list[Test]]) -> None:
        before, number, ending = None, 0, time.monotonic() + 60 * self.effort.minutes
        while left := [pair for pair in pairs if self._wants_more(*pair)]:
            if number and time.monotonic() > ending:
                return
            if self.effort.quiet:
                self.bandwidth([test for _, test in left], number)
            for side, test in (pair for pair in left if self._wants_more(*pair)):
                if before not in (None, side):
                    time.sleep(SETTLE)
                with self._keeping_on(side, tests[side]):
                    self._repeat(workers[side.name], side, test)
                before = side
            number += 1

    def _repeat(self, worker: Worker, side: Side, test: Test) -> None:
        """One turn; where it has to be quiet, tried again while other processes disturb it."""
        samples, ending = self.samples[side.name, test], time.monotonic() + PATIENCE
        for _ in range(TRIES):
            if self.effort.quiet:
                wait_until_idle(ending - time.monotonic())
            watch = Watch()
            with Meter(self.sensors) as meter:
                seconds = worker.repeat(test)
            turn = Turn(samples.taken, seconds, *watch.seen())
            if not self.effort.quiet or turn.waited <= QUIET:
                samples.turns.append(turn)
                if meter.joules is not None:
                    samples.joules = (samples.joules or 0.0) + meter.joules
                    samples.joules_seconds += meter.seconds
                    samples.joules_turns += 1
                break
            samples.disturbed.append(turn)
            if time.monotonic() > ending:
                break
        samples.taken += 1

    def _wants_more(self, side: Side, test: Test) -> bool:
        samples, effort = self.samples.get((side.name, test)), self.effort
        return samples is not None and (samples.taken < effort.repetitions or sum(samples.totals) < effort.seconds)

    @contextmanager
    def _keeping_on(self, side: Side, tests: Sequence[Test]) -> Iterator[None]:
        """Turn an error into a failure of each test that is not done."""
        try:
            yield
        except DijiangError as error:
            for test in tests:
                if (side.name, test) not in self.samples or self._wants_more(side, test):
                    self.samples.pop((side.name, test), None)
                    self.failures.append(failure(str(error), side.name, test.label))


def needed_bytes(pairs: Sequence[Pair]) -> int:
    """Memory that tests take in turn, about: each side once, with one state for all its depths."""
    largest: dict[str, int] = {}
    for side, test in pairs:
        need = run_bytes(side.traffic.weights, side.traffic.resident(test.batch, test.end))
        largest[side.name] = max(need, largest.get(side.name, 0))
    return sum(largest.values())


def rounds(pairs: Sequence[Pair], free: int) -> list[list[Pair]]:
    """What is in turn: all depths of all sides, or the sides of each depth, or nothing."""
    if len(pairs) < 2 or needed_bytes(pairs) <= free:
        return [list(pairs)]
    tests = dict.fromkeys(test for _, test in pairs)
    parts = [[pair for pair in pairs if pair[1] == test] for test in tests]
    if len(parts) < 2:
        parts = [[pair] for pair in pairs]
    return [one for part in parts for one in rounds(part, free)]
