"""The whole of a bench: plan, machine, bandwidth, idle power, tests in turn, report."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ..bundle.manifest import Bundle, open_bundle
from ..errors import DijiangError
from ..machine.bandwidth import Bandwidth, measure_bandwidth
from ..machine.describe import describe_machine
from ..machine.sensors import Meter, Sensor, find_sensors
from ..runtime.model import load
from .matrix import Failure, Test, plan_tests, series_of
from .measure import Effort, Samples, Say, Series, Side, check_effort
from .results import flatness_of, ratio_of, result_of
from .subject import DijiangSubject, bundle_traffic

SCHEMA_VERSION = 1
#: Seconds of idle power before the tests.
IDLE = 2.0
#: build(bundle, empty folder, positions): the vanilla Transformer of its shape, ready to be measured.
Baseline = Callable[[Bundle, Path, int], Side]


@dataclass(frozen=True)
class Options:
    """What to run; sizes are llama-bench's lists and ranges, see plan.plan_tests."""

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


def load_bundle(path: str, threads: int | None, provider: str) -> DijiangSubject:
    """A bundle, in the process that measures it."""
    return DijiangSubject(load(path, provider=provider, threads=threads, check_hashes=False))


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
    check_effort(effort)
    tests, failures = plan_tests(
        options.prompts, options.generations, options.depths, options.batches, options.threads
    )
    sensors = find_sensors()
    with ExitStack() as stack:
        positions = max((test.end for test in tests), default=1)
        groups = _open(bundles, baseline, positions, stack, failures, say)
        run = _Run(groups, tests, effort, options.provider, sensors, failures, say)
        run.all()
    return {
        "schema_version": SCHEMA_VERSION,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": sys.argv,
        "commit": _commit(),
        "options": asdict(options),
        "environment": run.machine,
        "bandwidth": [asdict(b) for b in run.bandwidths],
        "idle": {"sensor": run.idle.name, "watts": run.idle.watts},
        "models": [
            {
                "name": s.name,
                "path": s.path,
                "baseline_of": s.baseline_of,
                "traffic": s.traffic.to_dict(),
                **s.facts,
            }
            for group in groups
            for s in group
        ],
        "results": run.results,
        "ratios": run.ratios,
        "flatness": flatness_of(run.results),
        "errors": [asdict(failure) for failure in failures],
    }


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
            group = [bundle_side(name, bundle)]
        except DijiangError as error:
            failures.append(Failure(name, None, str(error)))
            continue
        groups.append(group)
        if baseline is None:
            continue
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dijiang-bench-")))
        say(f"{name}: building its baseline")
        try:
            group.append(baseline(bundle, folder, positions))
        except DijiangError as error:
            failures.append(Failure(f"baseline of {name}", None, str(error)))
    return groups


def bundle_side(name: str, bundle: Bundle) -> Side:
    """A bundle as a side of a bench."""
    manifest = bundle.manifest
    traffic = bundle_traffic(manifest.reads, manifest.spec.state_bytes)
    facts = {
        "kind": "dijiang",
        "precision": manifest.precision,
        "dialect": manifest.dialect,
        "bytes": bundle.nbytes,
        "spec": manifest.spec.to_dict(),
    }
    return Side(name, str(bundle.path), load_bundle, traffic, facts)


class _Run:
    """The measuring part; what was measured stays when it is interrupted."""

    def __init__(
        self,
        groups: list[list[Side]],
        tests: list[Test],
        effort: Effort,
        provider: str,
        sensors: list[Sensor],
        failures: list[Failure],
        say: Say,
    ) -> None:
        self.groups, self.tests, self.effort, self.provider = groups, tests, effort, provider
        self.sensors, self.failures, self.say = sensors, failures, say
        self.machine = describe_machine()
        self.bandwidths: list[Bandwidth] = []
        self._fastest: dict[int | None, float] = {}  # by the threads asked for, bytes a second
        self.idle = Meter(sensors)
        self.results: list[dict[str, Any]] = []
        self.ratios: list[dict[str, Any]] = []
        self._rows: list[tuple[Side, Test, Samples]] = []

    def all(self) -> None:
        """Every test on every group; Ctrl-C or a polite kill ends it early."""
        if not (self.groups and self.tests):
            return
        main = threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGTERM, signal.default_int_handler) if main else None
        try:
            with self.idle:
                time.sleep(IDLE if self.sensors else 0)
            self._measure_bandwidth()
            for tests in series_of(self.tests):
                for group in self.groups:
                    self._series(group, tests)
            self._measure_bandwidth()
        except KeyboardInterrupt:
            self.failures.append(Failure(None, None, "interrupted; the tests before it are kept"))
        finally:
            if main:
                signal.signal(signal.SIGTERM, before)
        for side, test, samples in self._rows:
            self.results.append(result_of(side, test, samples, self._fastest[test.threads], self.idle))

    def _measure_bandwidth(self) -> None:
        """For each count of threads: before the tests and after them, as other load comes and goes."""
        for count in dict.fromkeys(test.threads for test in self.tests):
            self.say("memory bandwidth")
            found = measure_bandwidth(threads=count)
            self.bandwidths.append(found)
            self._fastest[count] = max(found.bytes_per_second, self._fastest.get(count, 0.0))

    def _series(self, group: list[Side], tests: list[Test]) -> None:
        series = Series(group, tests, self.effort, self.provider, self.sensors, self.say)
        try:
            series.run()
        finally:
            self.failures += series.failures
            for test in tests:
                self._keep(group, test, series)

    def _keep(self, group: list[Side], test: Test, series: Series) -> None:
        """What was measured of a test."""
        found = [(side, series.samples.get((side.name, test))) for side in group]
        done = [(side, samples) for side, samples in found if samples and samples.repetitions]
        self._rows += [(side, test, samples) for side, samples in done]
        used = {samples.provider for _, samples in done}
        if len(used) > 1:
            message = f"ran on {' and '.join(sorted(used))}: no ratio; use --provider cpu"
            self.failures.append(Failure(group[0].name, test.label, message))
        elif len(done) == 2:
            self.ratios.append(ratio_of(done[0], done[1], test))


def _commit() -> str | None:
    """Commit of the source tree that this package is run from; None for an installed package."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True
        )
    except OSError:
        return None
    return done.stdout.strip() or None
