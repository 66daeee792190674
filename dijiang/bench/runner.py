"""The whole of a bench: plan, machine, tests in turn, report."""

from __future__ import annotations

import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from itertools import chain, count
from pathlib import Path
from typing import Any

from ..bundle.opened import Bundle, open_bundle
from ..errors import DijiangError
from ..hub import name_of
from ..machine.describe import describe_machine
from ..machine.sensors import find_sensors
from ..recipe import AUTO
from ..runtime.sessions.providers import numbered
from ..version import describe
from .matrix import Test, failure, plan_tests
from .measure import Effort, Run, Say
from .report import SCHEMA_VERSION
from .results import summarise
from .subject import Side, bundle_side

#: build(bundle, empty folder, positions): the vanilla Transformer of its shape, ready to be measured.
Baseline = Callable[[str, Bundle, Path, int], Side]


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


def run_bench(
    bundles: Sequence[str | Path], options: Options, *, baseline: Baseline | None = None, say: Say = lambda _: None
) -> dict[str, Any]:
    """Measure bundles and return the report; what fails is in its `errors`, the rest is measured.

    Args:
        bundles: folders written by `dijiang export`.
        baseline: builds the Transformer that each bundle is compared with; None: no comparison.
        say: told what happens now, one short line at a time.

    Raises:
        BenchError: repetitions or seconds that are no sizes.
        SessionError: no provider has this name.
    """
    if options.provider != AUTO:
        numbered(options.provider)
    effort = Effort(options.repetitions, options.seconds)
    tests, failures = plan_tests(
        options.prompts, options.generations, options.depths, options.batches, options.threads
    )
    groups: list[list[Side]] = []
    with ExitStack() as stack:
        for path in bundles:
            taken = {side.name for group in groups for side in group}
            names = chain((name_of(Path(path)), str(path)), (f"{path} ({n})" for n in count(2)))
            building = name = next(name for name in names if name not in taken)
            try:
                bundle = open_bundle(path)
                groups.append([bundle_side(name, bundle)])
                if baseline is not None:
                    building = f"baseline of {name}"
                    say(building)
                    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="dijiang-bench-"))
                    positions = max((test.end for test in tests), default=1)
                    groups[-1].append(baseline(name, bundle, Path(folder), positions))
            except DijiangError as error:
                failures.append(failure(str(error), building))
        report = run_sides(groups, tests, effort, provider=options.provider, say=say)
    return report | {"options": asdict(options), "errors": failures + report["errors"]}


def run_sides(
    groups: Sequence[Sequence[Side]],
    tests: Sequence[Test],
    effort: Effort,
    *,
    provider: str = "auto",
    say: Say = lambda _: None,
) -> dict[str, Any]:
    """Measure groups of sides; those of a group take turns, the first is compared with the others."""
    machine, run = describe_machine(), Run(effort, provider, find_sensors(), say)
    if groups and tests:
        before = None
        with suppress(ValueError):  # not the main thread: signals are not for this one
            before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            run.all(groups, tests)
        finally:
            if before is not None:
                signal.signal(signal.SIGTERM, before)
    return {
        "schema_version": SCHEMA_VERSION,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": sys.argv,
        "commit": commit(),
        "options": None,
        "environment": machine,
        "bandwidth": [measured for _, measured in run.bandwidths],
        "models": [side.to_dict() for group in groups for side in group],
        **summarise(groups, tests, run.samples, run.rates(), run.idle, run.failures),
    }


def commit() -> str | None:
    """Commit of the source tree that this package is run from, `-dirty` if it was changed since.

    None for an installed package.
    """
    sources = Path(__file__).parents[2]
    return describe(sources, "--always", "--dirty", "--abbrev=40", "--exclude", "*") or None
