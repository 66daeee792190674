"""The whole of a bench: plan, machine, bandwidth, idle power, tests in turn, report."""

from __future__ import annotations

import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ..bundle.opened import Bundle, open_bundle
from ..errors import DijiangError
from ..machine.bandwidth import Bandwidth, measure_bandwidth
from ..machine.describe import describe_machine
from ..machine.sensors import Meter, Sensor, find_sensors
from .matrix import Failure, Test, plan_tests, series_of
from .measure import Effort, Samples, Say, Series
from .report import SCHEMA_VERSION
from .results import summarise
from .subject import Side, bundle_side

#: Seconds of idle power before the tests.
IDLE = 2.0
#: build(bundle, empty folder, positions): the vanilla Transformer of its shape, ready to be measured.
Baseline = Callable[[Bundle, Path, int], Side]


@dataclass(frozen=True)
class Options:
    """What to run; sizes are llama-bench's lists and ranges, see matrix.plan_tests."""

    prompts: str = "512"
    generations: str = "128"
    depths: str = "0"
    batches: str = "1"
    threads: str | None = None
    repetitions: int = 10
    seconds: float = 10.0
    provider: str = "auto"
    baseline: str | None = None
    cache: str = "fp16"

    def tests(self) -> tuple[list[Test], list[Failure]]:
        """See plan_tests."""
        return plan_tests(self.prompts, self.generations, self.depths, self.batches, self.threads)


def run_bench(
    bundles: Sequence[str | Path],
    options: Options,
    *,
    baseline: Baseline | None = None,
    say: Say = lambda _: None,
) -> dict[str, Any]:
    """Measure bundles and return the report; what fails is in its `errors`, the rest is measured.

    Args:
        bundles: folders written by `dijiang export`.
        baseline: builds the Transformer that each bundle is compared with; None: no comparison.
        say: told what happens now, one short line at a time.

    Raises:
        BenchError: repetitions or seconds that are no sizes.
    """
    effort = Effort(options.repetitions, options.seconds)
    effort.check()
    tests, failures = options.tests()
    with ExitStack() as stack:
        positions = max((test.end for test in tests), default=1)
        groups = _open(bundles, baseline, positions, stack, failures, say)
        report = run_sides(groups, tests, effort, provider=options.provider, say=say)
    errors = [asdict(failure) for failure in failures] + report["errors"]
    return report | {"options": asdict(options), "errors": errors}


def run_sides(
    groups: Sequence[Sequence[Side]],
    tests: Sequence[Test],
    effort: Effort,
    *,
    provider: str = "auto",
    say: Say = lambda _: None,
) -> dict[str, Any]:
    """Measure groups of sides; those of a group take turns, the first is compared with the others."""
    run = _Run(groups, tests, effort, provider, find_sensors(), say)
    run.all()
    found = summarise(groups, tests, run.samples, run.bandwidth(), run.idle)
    failures = run.failures + found.pop("failures")
    return {
        "schema_version": SCHEMA_VERSION,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": sys.argv,
        "commit": commit(),
        "options": None,
        "environment": run.machine,
        "bandwidth": [asdict(found) | {"turn": turn} for found, turn, _ in run.bandwidths],
        "idle": {"sensor": run.idle.name, "watts": run.idle.watts},
        "models": [model_of(side) for group in groups for side in group],
        **found,
        "errors": [asdict(failure) for failure in failures],
    }


def model_of(side: Side) -> dict[str, Any]:
    """What a report says of a side."""
    known = {"name": side.name, "path": side.path, "baseline_of": side.baseline_of}
    return known | {"traffic": side.traffic.to_dict(), **side.facts}


def _open(
    bundles: Sequence[str | Path],
    baseline: Baseline | None,
    positions: int,
    stack: ExitStack,
    failures: list[Failure],
    say: Say,
) -> list[list[Side]]:
    """One group a bundle: itself, and its baseline if one is wanted and can be built."""
    groups: list[list[Side]] = []
    for path in bundles:
        name = Path(path).resolve().name
        if any(side.name == name for group in groups for side in group):
            name = str(path)
        try:
            bundle = open_bundle(path)
            groups.append([bundle_side(name, bundle)])
        except DijiangError as error:
            failures.append(Failure(name, None, str(error)))
            continue
        if baseline is None:
            continue
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dijiang-bench-")))
        say(f"{name}: building its baseline")
        try:
            groups[-1].append(baseline(bundle, folder, positions))
        except DijiangError as error:
            failures.append(Failure(f"baseline of {name}", None, str(error)))
    return groups


@dataclass
class _Run:
    """The measuring part; what was measured stays when it is interrupted."""

    groups: Sequence[Sequence[Side]]
    tests: Sequence[Test]
    effort: Effort
    provider: str
    sensors: list[Sensor]
    say: Say
    machine: dict[str, Any] = field(default_factory=describe_machine)
    failures: list[Failure] = field(default_factory=list)
    #: What was measured, before which turn, and the threads asked for.
    bandwidths: list[tuple[Bandwidth, int | None, int | None]] = field(default_factory=list)
    samples: dict[tuple[str, Test], Samples] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.idle = Meter(self.sensors)

    def bandwidth(self) -> dict[int | None, float]:
        """Bytes a second by the threads asked for: the fastest; of turns, their median."""
        found: dict[int | None, list[float]] = {}
        for measured, turn, threads in self.bandwidths:
            if not self.effort.quiet or turn is not None:
                found.setdefault(threads, []).append(measured.bytes_per_second)
        middle = statistics.median if self.effort.quiet else max
        return {test.threads: 0.0 for test in self.tests} | {t: middle(f) for t, f in found.items()}

    def all(self) -> None:
        """Every test on every group; Ctrl-C or a polite kill ends it early."""
        if not (self.groups and self.tests):
            return
        main = threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGTERM, signal.default_int_handler) if main else None
        try:
            with self.idle:
                time.sleep(IDLE if self.sensors else 0)
            self._measure_bandwidth(None)
            for tests in series_of(self.tests):
                for group in self.groups:
                    self._series(group, tests)
            self._measure_bandwidth(None)
        except KeyboardInterrupt:
            self.failures.append(Failure(None, None, "interrupted; the tests before it are kept"))
        finally:
            if main:
                signal.signal(signal.SIGTERM, before)

    def _measure_bandwidth(self, turn: int | None) -> None:
        """For each count of threads: before the tests and after them, as other load comes and goes."""
        for count in dict.fromkeys(test.threads for test in self.tests):
            if turn is None:
                self.say("memory bandwidth")
            self.bandwidths.append((measure_bandwidth(threads=count), turn, count))

    def _series(self, group: Sequence[Side], tests: list[Test]) -> None:
        before = self._measure_bandwidth if self.effort.quiet else lambda turn: None
        series = Series(group, tests, self.effort, self.provider, self.sensors, self.say, before)
        try:
            series.run()
        finally:
            self.failures += series.failures
            self.samples |= series.samples


def commit() -> str | None:
    """Commit of the source tree that this package is run from, `-dirty` if it was changed since.

    None for an installed package.
    """
    command = ("git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude", "*")
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None
