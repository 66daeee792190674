"""A report as Markdown, JSON, JSON lines or CSV."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import BenchError
from .report import Report, target

UNKNOWN = "unknown"


def to_json(report: Report) -> str:
    """The whole report, raw samples included."""
    return json.dumps(report, indent=1)


def to_jsonl(report: Report) -> str:
    """One result a line, each with what is needed to compare it with one of another day."""
    header = {key: report[key] for key in ("schema_version", "created", "commit", "environment")}
    models = {model["name"]: model for model in report["models"]}
    return "\n".join(
        json.dumps(result | {"model": models[result["model"]]} | header) for result in report["results"]
    )


#: Column -> its value in a result; the one place that says what a row shows.
COLUMNS: dict[str, Callable[[Report, Report], Any]] = {
    "model": lambda _, r: r["model"],
    "precision": lambda model, _: model["precision"],
    "test": lambda _, r: r["test"],
    "batch": lambda _, r: r["batch"],
    "threads": lambda _, r: r["threads"],
    "tokens/s": lambda _, r: r["tokens_per_second"],
    "TTFT ms": lambda _, r: _milli(r["ttft_s"]),
    "TPOT ms": lambda _, r: _milli(r["tpot_s"]),
    "ITL p50 ms": lambda _, r: _itl(r, "p50"),
    "p90": lambda _, r: _itl(r, "p90"),
    "p95": lambda _, r: _itl(r, "p95"),
    "p99": lambda _, r: _itl(r, "p99"),
    "spread %": lambda _, r: 100 * r["spread"],
    "load s": lambda _, r: r["load_model"] and r["load_model"]["latency"]["mean"],
    "peak MB": lambda _, r: target(r)["memory"]["max_ram"],
    "GPU MB": lambda _, r: target(r)["memory"]["max_process_vram"],
    "MB/token": lambda _, r: r["roofline"] and r["roofline"]["bytes_per_token"] / 1e6,
    "% of roofline": lambda _, r: r["roofline"] and r["roofline"]["percent"],
    "J/token": lambda _, r: target(r)["energy"]["gross"],
    "J/token less idle": lambda _, r: target(r)["energy"]["idle_subtracted"],
}


def _milli(seconds: float | None) -> float | None:
    return None if seconds is None else 1e3 * seconds


def _itl(result: Report, percentile: str) -> float | None:
    latency = result["per_token"] and result["per_token"]["latency"]
    return _milli(latency and latency[percentile])


def _rows(report: Report) -> list[dict[str, Any]]:
    models = {model["name"]: model for model in report["models"]}
    return [{name: value(models[r["model"]], r) for name, value in COLUMNS.items()} for r in report["results"]]


def to_csv(report: Report) -> str:
    """One row a result; an unknown value is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(COLUMNS), lineterminator="\n")
    writer.writeheader()
    writer.writerows(_rows(report))
    return text.getvalue().rstrip("\n")


def figure(value: Any) -> str:
    """A value for a table: four significant digits, counts whole."""
    if not isinstance(value, float):
        return "" if value is None else str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table of rows that have the same keys; figures to the right."""
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |"]
    lines.append("|" + "|".join("---" if isinstance(rows[0][n], str) else "---:" for n in names) + "|")
    lines += ["| " + " | ".join(figure(row[n]) for n in names) + " |" for row in rows]
    return "\n".join(lines)


def result_rows(report: Report) -> list[dict[str, Any]]:
    """Rows of results, without columns that are empty."""
    rows = _rows(report)
    empty = [n for n in COLUMNS if all(row[n] is None for row in rows)]
    return [{n: v for n, v in row.items() if n not in empty} for row in rows]


def to_markdown(report: Report) -> str:
    """The report for people: machine, results, ratios, slopes, what failed."""
    header = "\n".join(f"- {line}" for line in header_lines(report))
    return "\n\n".join(("# dijiang bench", header, *tables(report)))


def tables(report: Report) -> list[str]:
    """Results, ratios, slopes and remarks in Markdown: those that there are."""
    found = (result_rows(report), ratio_rows(report), flatness_rows(report))
    parts = [table(rows) for rows in found if rows]
    return parts + ["\n".join(lines) for lines in [remarks(report)] if lines]


def header_lines(report: Report) -> list[str]:
    """Machine, versions, bandwidth, sensor, commit."""
    machine = report["environment"]
    cpu, packages = machine["cpu"], machine["packages"]
    rates: dict[int, list[float]] = {}
    for found in report["bandwidth"]:
        rates.setdefault(found["threads"], []).append(found["bytes_per_second"] / 1e9)
    reads = [f"{min(r):.1f} to {max(r):.1f} GB/s by {n} threads" for n, r in rates.items()]
    lines = [
        f"{report['created']}, {machine['system']}, Python {machine['python']}",
        f"{cpu['model']}, {cpu['physical_cores']} cores, {', '.join(cpu['features'])}; "
        f"memory {machine['memory']['total_bytes'] / 1e9:.1f} GB, read at {', '.join(reads) or UNKNOWN}",
        ", ".join(f"{name} {version}" for name, version in packages.items()),
        f"energy sensor: {report['idle']['sensor']}; commit: {report['commit'] or UNKNOWN}",
    ]
    lines += [f"GPU: {gpu['name']}, driver {gpu['driver']}" for gpu in machine["gpus"]]
    if machine["jetson"]:
        lines.append("Jetson: " + ", ".join(f"{k} {v}" for k, v in machine["jetson"].items()))
    return lines


def ratio_rows(report: Report) -> list[dict[str, Any]]:
    """Measured ratios beside the predicted ones; empty without a baseline."""
    return [
        {
            "model": r["model"],
            "test": r["test"],
            "batch": r["batch"],
            "against": r["baseline"],
            "times as fast": r["measured"],
            "95 % interval": f"{figure(r['low'])} to {figure(r['high'])}",
            "bytes predict": r["predicted"],
            "memory limit": r["limit"],
            "note": r["note"] or "",
        }
        for r in report["ratios"]
    ]


def flatness_rows(report: Report) -> list[dict[str, Any]]:
    """Slopes over depth; empty with one depth."""
    return [
        {
            "model": f["model"],
            "test": f"{f['kind']}{f['tokens']}",
            "batch": f["batch"],
            "depths": f"{f['depths'][0]} to {f['depths'][-1]}",
            "change of time, %": 100 * f["time"]["change"],
            "95 % interval": f"{figure(100 * f['time']['low'])} to {figure(100 * f['time']['high'])}",
            "of memory, %": f["memory"] and 100 * f["memory"]["change"],
            "verdict": _verdict(f),
        }
        for f in report["flatness"]
    ]


def _verdict(flatness: dict[str, Any]) -> str:
    time = flatness["time"]
    if flatness["flat"]:
        return "flat"
    if time["low"] <= 0 <= time["high"]:
        return "unclear: more noise than change"
    return "grows" if time["change"] > 0 else "falls"


def remarks(report: Report) -> list[str]:
    """What a reader must know before quoting a figure."""
    noisy = [
        f"{r['model']}, {r['test']}, batch {r['batch']} ({100 * r['spread']:.0f} %)"
        for r in report["results"]
        if r["noisy"]
    ]
    lines = []
    if noisy:
        lines.append(
            "- NOISY: repetitions spread over more than 10 %: close other programs and run again before "
            f"quoting {'; '.join(noisy)}"
        )
    lines += [
        "- FAILED: " + ": ".join(p for p in (e["model"], e["test"], e["message"]) if p) for e in report["errors"]
    ]
    return lines


def write(text: str, file: Path | None) -> None:
    """Text to a file, or to stdout; BenchError if the file cannot be written."""
    if file is None:
        sys.stdout.write(text + "\n")
        return
    try:
        file.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        sys.stdout.write(text + "\n")
        raise BenchError(
            f"{file}: cannot be written ({error.strerror}); the report is on stdout instead"
        ) from error


def require(report: Report) -> None:
    """BenchError if anything could not be measured."""
    errors = report["errors"]
    if errors:
        first = ": ".join(str(p) for p in errors[0].values() if p)
        more = f" (and {len(errors) - 1} more, listed in the report)" if len(errors) > 1 else ""
        raise BenchError(f"{len(report['results'])} tests were measured, {len(errors)} were not: {first}{more}")
