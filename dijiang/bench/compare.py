"""Two reports side by side: ratios with their confidence interval, and what got slower."""

from __future__ import annotations

from typing import Any

from ..errors import BenchError
from .matrix import Test
from .render import rows_of, table
from .report import Report, seconds_of, target
from .statistics import FEWEST, ratio


def compare(before: Report, after: Report, *, threshold: float) -> dict[str, Any]:
    """Throughput of every test of both reports, after over before.

    A test has regressed if its ratio is below 1 - threshold and its whole interval is below 1: noise
    alone is no regression. Without an interval, of few repetitions, nothing has.

    Args:
        threshold: loss of throughput that is allowed, as a fraction.

    Returns:
        `rows` (one a common test), `only_before`, `only_after` (names of the others), `regressions`.

    Raises:
        BenchError: no test is in both, or the threshold is no fraction.
    """
    if not 0 <= threshold < 1:
        raise BenchError(f"threshold {100 * threshold:g} %, expected from 0 to less than 100; change --threshold")
    old, new = _by_name(before), _by_name(after)
    rows = [_row(name, old[name], new[name], threshold) for name in old if name in new]
    if not rows:
        raise BenchError("the reports have no test in common; run both with the same -p, -n, -d, -b, -t")
    return {
        "rows": rows,
        "only_before": [name for name in old if name not in new],
        "only_after": [name for name in new if name not in old],
        "regressions": [row["name"] for row in rows if row["regressed"]],
    }


def _by_name(report: Report) -> dict[str, Report]:
    """Results by model and test. A report's only bundle is called `bundle`, as folders' names differ."""
    bundles = [m["name"] for m in report["models"] if m["baseline_of"] is None]
    names = {bundles[0]: "bundle"} if len(bundles) == 1 else {}
    results = [r for r in report["results"] if seconds_of(r)]
    return {f"{names.get(r['model'], r['model'])}: {Test.of(r).label}": r for r in results}


def _row(name: str, before: Report, after: Report, threshold: float) -> dict[str, Any]:
    found = ratio(seconds_of(before), seconds_of(after))
    memory = [target(side)["memory"]["max_ram"] for side in (before, after)]
    return {
        "name": name,
        "before": before["tokens_per_second"],
        "after": after["tokens_per_second"],
        "ratio": found.value,
        "low": found.low,
        "high": found.high,
        "memory_ratio": None if None in memory else memory[1] / memory[0],
        "noisy": before["noisy"] or after["noisy"],
        "regressed": found.value < 1 - threshold and found.high is not None and found.high < 1,
    }


def _remark(row: dict[str, Any]) -> str:
    if row["regressed"]:
        return "REGRESSED"
    if row["high"] is None:
        return f"not judged: fewer than {FEWEST} repetitions"
    return "noisy" if row["noisy"] else ""


def to_markdown(comparison: dict[str, Any]) -> str:
    """The comparison for people."""
    rows = [row | {"remark": _remark(row)} for row in comparison["rows"]]
    lines = [f"- only in the first report: {name}" for name in comparison["only_before"]]
    lines += [f"- only in the second report: {name}" for name in comparison["only_after"]]
    return "\n\n".join(part for part in (table(rows_of("compare", rows)), "\n".join(lines)) if part)


def require(comparison: dict[str, Any], threshold: float) -> None:
    """BenchError if a test has regressed."""
    slow = comparison["regressions"]
    if slow:
        tests = f"{len(slow)} of {len(comparison['rows'])} tests are slower by more than {100 * threshold:g} %"
        raise BenchError(f"{tests}: {'; '.join(slow)}")
