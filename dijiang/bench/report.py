"""A report of the one schema (schema.json), and files that hold one: of this version or an older one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import BenchError

Report = dict[str, Any]
SCHEMA_VERSION = 2
OLDEST_VERSION = 1


def target(result: Report) -> Report:
    """The measurements of a result, of either kind."""
    found: Report = result["decode"] or result["prefill"]
    return found


def read_report(path: str | Path) -> Report:
    """A report that `dijiang bench -o json` wrote, as this version has it; BenchError if it is none."""
    again = "write it with dijiang bench -o json"
    try:
        report = json.loads(Path(path).read_text(encoding="utf-8"))
        version = report["schema_version"]
        _ = [(model["name"], model["baseline_of"]) for model in report["models"]]
        _ = [(r["model"], r["test"], target(r)["latency"]["values"]) for r in report["results"]]
    except (OSError, UnicodeDecodeError) as error:
        raise BenchError(f"{path}: cannot be read ({error}); {again}") from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise BenchError(f"{path}: not a report of dijiang bench ({error}); {again}") from error
    if not OLDEST_VERSION <= version <= SCHEMA_VERSION:
        raise BenchError(
            f"{path}: layout {version}, expected {OLDEST_VERSION} to {SCHEMA_VERSION}; {again} of this version"
        )
    return upgraded(report)


def upgraded(report: Report) -> Report:
    """An older report in the layout of this version: what was not measured then is empty."""
    results, ratios = report["results"], report.get("ratios", [])
    for result in results:
        count = len(target(result)["latency"]["values"])
        nothing = {"waited": [0.0] * count, "stolen": [0.0] * count, "disturbed": []}
        result.setdefault("contention", {"turns": list(range(count)), **nothing})
        result.setdefault("session", {})
        result.setdefault("way", "")
    for ratio in ratios:
        ratio.setdefault("way", "")
        ratio.setdefault("limit", None)
    for bandwidth in report.get("bandwidth", []):
        bandwidth.setdefault("turn", None)
    for model in report["models"]:
        model.setdefault("graph", model.pop("dialect", None))
    return report | {"schema_version": SCHEMA_VERSION}
