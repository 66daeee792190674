"""One test on one model, or on two that take turns: raw samples in, nothing summarised yet."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from ...errors import BenchError, DijiangError
from ..memory import available_bytes, run_bytes
from .plan import Failure, Test
from .sensors import Meter, Sensor
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


@dataclass
class Samples:
    """What one test gave on one side.

    repetitions: seconds of each token (tg) or of the prompt (pp), one list a repetition.
    alone: the other side was not in memory at the same time, so the two did not take turns.
    """

    load_seconds: float
    provider: str
    repetitions: list[list[float]] = field(default_factory=list)
    peaks: dict[str, int | None] = field(default_factory=dict)
    joules: float | None = None
    joules_seconds: float = 0.0
    alone: bool = False

    @property
    def totals(self) -> list[float]:
        """Seconds of each repetition."""
        return [sum(seconds) for seconds in self.repetitions]


@dataclass(frozen=True)
class Effort:
    """How long to measure: both conditions have to hold before a side is done."""

    repetitions: int = 10
    seconds: float = 10.0


def needed_bytes(side: Side, test: Test) -> int:
    """Memory that a test takes on a side, about."""
    return run_bytes(side.traffic.weights, side.traffic.resident(test.batch, test.end))


def measure(
    sides: list[Side], test: Test, effort: Effort, provider: str, sensors: list[Sensor], say: Say
) -> tuple[dict[str, Samples], list[Failure]]:
    """Run a test on every side, in turn, repetition by repetition; samples by the side's name."""
    failures: list[Failure] = []
    able = []
    free = available_bytes()
    for side in sides:
        need = needed_bytes(side, test)
        if need > free:
            message = (
                f"needs {need / 1e9:,.1f} GB of memory, {free / 1e9:,.1f} GB are free; "
                "use a smaller batch or depth, or a machine with more memory"
            )
            failures.append(Failure(side.name, test.label, message))
        else:
            able.append(side)
    together = sum(needed_bytes(side, test) for side in able) <= free
    rounds = [able] if together else [[side] for side in able]
    samples: dict[str, Samples] = {}
    for group in rounds:
        found, failed = _take_turns(group, test, effort, provider, sensors, say)
        samples |= found
        failures += failed
    for one in samples.values():
        one.alone = not together
    return samples, failures


def _take_turns(
    sides: list[Side], test: Test, effort: Effort, provider: str, sensors: list[Sensor], say: Say
) -> tuple[dict[str, Samples], list[Failure]]:
    samples: dict[str, Samples] = {}
    failures: list[Failure] = []
    workers: dict[str, Worker] = {}

    def attempt(action: Callable[[Side], None], side: Side) -> None:
        try:
            action(side)
        except DijiangError as error:
            failures.append(Failure(side.name, test.label, str(error)))
            workers.pop(side.name, None)
            samples.pop(side.name, None)

    def start(side: Side) -> None:
        say(f"{side.name}: {test.label}")
        worker = stack.enter_context(Worker(side.load, side.path, provider, test))
        workers[side.name] = worker
        samples[side.name] = Samples(*worker.start())

    def repeat(side: Side) -> None:
        one = samples[side.name]
        if len(workers) > 1:
            time.sleep(SETTLE)
        with Meter(sensors) as meter:
            one.repetitions.append(workers[side.name].repeat())
        if meter.joules is not None:
            one.joules = (one.joules or 0.0) + meter.joules
            one.joules_seconds += meter.seconds

    def finish(side: Side) -> None:
        samples[side.name].peaks = workers[side.name].finish()

    def waiting() -> list[Side]:
        return [s for s in sides if s.name in workers and not _enough(samples[s.name], effort)]

    with ExitStack() as stack:
        for side in sides:
            attempt(start, side)
        while left := waiting():
            for side in left:
                attempt(repeat, side)
        for side in [s for s in sides if s.name in workers]:
            attempt(finish, side)
    return samples, failures


def _enough(samples: Samples, effort: Effort) -> bool:
    done = len(samples.repetitions)
    return done >= effort.repetitions and sum(samples.totals) >= effort.seconds


def check_effort(effort: Effort) -> None:
    """BenchError for repetitions or seconds that are no sizes."""
    if effort.repetitions < 1 or effort.seconds < 0:
        raise BenchError(
            f"{effort.repetitions} repetitions and {effort.seconds} seconds: expected at least 1 and 0"
        )
