"""A report of the one schema (schema.json), and files that hold one: of this version or an older one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import BenchError, reason
from ..reading import read_json
from ..typed import check_types
from .matrix import Test

Report = dict[str, Any]
SCHEMA_VERSION = 2


def target(result: Report) -> Report:
    """The measurements of a result, of either kind."""
    return result["decode"] or result["prefill"]


def seconds_of(result: Report) -> list[float]:
    """Seconds of each repetition that counts."""
    return target(result)["latency"]["values"]


def by_turn(result: Report) -> dict[int, float]:
    """Seconds by the number of the turn."""
    return dict(zip(result["contention"]["turns"], seconds_of(result), strict=True))


def read_report(path: str | Path) -> Report:
    """A report that `dijiang bench -o json` wrote, as this version has it; BenchError if it is none."""
    again = "write it with dijiang bench -o json"
    try:
        report = read_json(Path(path))
        version = report["schema_version"]
        if not 1 <= version <= SCHEMA_VERSION:
            raise BenchError(f"{path}: layout {version}, expected 1 to {SCHEMA_VERSION}; {again} of this version")
        for model in report["models"]:
            check_types(_Model(model["name"], model["baseline_of"]))
        for result in report["results"]:
            check_types(_Result.of(result))
        return _upgraded(report)
    except (OSError, UnicodeDecodeError) as error:
        raise BenchError(f"{path}: cannot be read ({error}); {again}") from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError) as error:
        raise BenchError(f"{path}: not a report of dijiang bench ({reason(error)}); {again}") from error


@dataclass(frozen=True)
class _Model:
    """What is read of a model, whoever wrote the report."""

    name: str
    baseline_of: str | None


@dataclass(frozen=True)
class _Result:
    """What is read of a result."""

    model: str
    test: Test
    seconds: tuple[float, ...]
    tokens_per_second: float | None
    max_ram: float | None
    noisy: bool

    @classmethod
    def of(cls, row: Report) -> _Result:
        seconds = tuple(seconds_of(row))
        if not all(0 < value < math.inf for value in seconds):
            raise ValueError("seconds that are none")
        memory = target(row)["memory"]["max_ram"]
        return cls(row["model"], Test.of(row), seconds, row["tokens_per_second"], memory, row["noisy"])


def _upgraded(report: Report) -> Report:
    """An older report in the layout of this version: what was not measured then is empty."""
    for result in report["results"]:
        count = len(seconds_of(result))
        unknown = {"waited": [0.0] * count, "stolen": [0.0] * count, "disturbed": []}
        missing = {"contention": {"turns": list(range(count)), **unknown}, "session": {}, "way": ""}
        result |= {key: value for key, value in missing.items() if key not in result}
    for ratio in report.get("ratios", []):
        ratio |= {"way": ratio.get("way", ""), "limit": ratio.get("limit")}
    for bandwidth in report.get("bandwidth", []):
        bandwidth.setdefault("turn", None)
    for model in report["models"]:
        model.setdefault("graph", model.pop("dialect", None))
    return report | {"schema_version": SCHEMA_VERSION}
