"""A report as Markdown, JSON, JSON lines, CSV or one HTML page."""

from __future__ import annotations

import csv
import io
import json
import string
import sys
from collections.abc import Callable
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..errors import BenchError
from .plots import panels
from .report import Report, target

UNKNOWN = "unknown"
#: The formula of every figure, as --explain prints them: a name of at most 16 characters, then the text.
EXPLANATION = files(__package__).joinpath("explain.txt").read_text(encoding="utf-8")
FORMULAS = {line[:16].strip(): line[17:] for line in EXPLANATION.splitlines()}
#: Column -> where a result has it (target: prefill or decode), and the factor of its unit.
COLUMNS: dict[str, tuple[str, float | None]] = {
    "model": ("model", None),
    "precision": ("precision", None),
    "test": ("test", None),
    "batch": ("batch", None),
    "threads": ("threads", None),
    "tokens/s": ("tokens_per_second", 1),
    "TTFT ms": ("ttft_s", 1e3),
    "TPOT ms": ("tpot_s", 1e3),
    "ITL p50 ms": ("per_token.latency.p50", 1e3),
    "p90": ("per_token.latency.p90", 1e3),
    "p95": ("per_token.latency.p95", 1e3),
    "p99": ("per_token.latency.p99", 1e3),
    "spread %": ("spread", 100),
    "load s": ("load_model.latency.mean", 1),
    "peak MB": ("target.memory.max_ram", 1),
    "GPU MB": ("target.memory.max_process_vram", 1),
    "MB/token": ("roofline.bytes_per_token", 1e-6),
    "% of roofline": ("roofline.percent", 1),
    "J/token": ("target.energy.gross", 1),
    "J/token less idle": ("target.energy.idle_subtracted", 1),
}
Rows = list[dict[str, Any]]


def _rows(report: Report) -> Rows:
    precisions = {model["name"]: model["precision"] for model in report["models"]}

    def value(found: Any, path: str, factor: float | None) -> Any:
        for key in path.split("."):
            found = found and found[key]
        return found if found is None or factor is None else factor * found

    known = [r | {"target": target(r), "precision": precisions[r["model"]]} for r in report["results"]]
    return [{name: value(result, *column) for name, column in COLUMNS.items()} for result in known]


def result_rows(report: Report) -> Rows:
    """Rows of results, without columns that are empty."""
    rows = _rows(report)
    empty = {name for name in COLUMNS if all(row[name] is None for row in rows)}
    return [{name: value for name, value in row.items() if name not in empty} for row in rows]


def _ratio_rows(report: Report) -> Rows:
    """Measured ratios beside the predicted ones."""
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


def _flatness_rows(report: Report) -> Rows:
    """Slopes over depth."""
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


def _verdict(flatness: Report) -> str:
    time = flatness["time"]
    if flatness["flat"]:
        return "flat"
    if time["low"] <= 0 <= time["high"]:
        return "unclear: more noise than change"
    return "grows" if time["change"] > 0 else "falls"


#: Heading of the page -> rows.
TABLES = {"Results": result_rows, "Side by side": _ratio_rows, "Change over depth": _flatness_rows}


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


def remarks(report: Report) -> list[str]:
    """What a reader must know before quoting a figure."""
    noisy = [
        f"{r['model']}, {r['test']}, batch {r['batch']} ({100 * r['spread']:.0f} %)"
        for r in report["results"]
        if r["noisy"]
    ]
    advice = "NOISY: repetitions spread over more than 10 %: close other programs and run again before quoting"
    return ([f"{advice} {'; '.join(noisy)}"] if noisy else []) + [f"FAILED: {_said(e)}" for e in report["errors"]]


def _said(error: dict[str, Any]) -> str:
    return ": ".join(part for part in (error["model"], error["test"], error["message"]) if part)


def figure(value: Any) -> str:
    """A value for a table: four significant digits, counts whole."""
    if not isinstance(value, float):
        return "" if value is None else str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def table(rows: Rows) -> str:
    """A Markdown table of rows that have the same keys; figures to the right."""
    ends = ["---" if isinstance(value, str) else "---:" for value in rows[0].values()]
    lines = [f"| {' | '.join(rows[0])} |", f"|{'|'.join(ends)}|"]
    return "\n".join(lines + [f"| {' | '.join(map(figure, row.values()))} |" for row in rows])


def tables(report: Report) -> list[str]:
    """Results, ratios, slopes and remarks in Markdown: those that there are."""
    parts = [table(rows) for rows_of in TABLES.values() if (rows := rows_of(report))]
    said = "\n".join(f"- {line}" for line in remarks(report))
    return [*parts, said] if said else parts


def to_markdown(report: Report) -> str:
    """The report for people: machine, results, ratios, slopes, what failed."""
    header = "\n".join(f"- {line}" for line in header_lines(report))
    return "\n\n".join(("# dijiang bench", header, *tables(report)))


def to_html(report: Report) -> str:
    """One page without scripts that run, without links, without anything from a network."""

    def cell(value: Any) -> str:
        return f"<td{' class=text' * isinstance(value, str)}>{escape(figure(value))}</td>"

    def shown(rows: Rows) -> str:
        head = "".join(f"<th>{escape(name)}</th>" for name in rows[0])
        body = "".join(f"<tr>{''.join(map(cell, row.values()))}</tr>" for row in rows)
        return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'

    found = {title: rows_of(report) for title, rows_of in TABLES.items()}
    pictures = panels(report).items()
    return string.Template(files(__package__).joinpath("page.html").read_text(encoding="utf-8")).substitute(
        header="".join(f"<li>{escape(line)}</li>" for line in header_lines(report)),
        remarks="".join(f'<p class="remark">{escape(line)}</p>' for line in remarks(report)),
        pictures="".join(f"<figure><figcaption>{escape(t)}</figcaption>{svg}</figure>" for t, svg in pictures),
        tables="".join(f"<h2>{title}</h2>{shown(rows)}" for title, rows in found.items() if rows),
        formulas=shown([{"figure": name, "formula": text} for name, text in FORMULAS.items()]),
        report=to_json(report).replace("<", "\\u003c"),  # so that it cannot end its script element
    )


def to_json(report: Report) -> str:
    """The whole report, raw samples included."""
    return json.dumps(report, indent=1)


def to_jsonl(report: Report) -> str:
    """One result a line, each with what is needed to compare it with one of another day."""
    header = {key: report[key] for key in ("schema_version", "created", "commit", "environment")}
    models = {model["name"]: model for model in report["models"]}
    return "\n".join(json.dumps(r | {"model": models[r["model"]]} | header) for r in report["results"])


def to_csv(report: Report) -> str:
    """One row a result; an unknown value is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(COLUMNS), lineterminator="\n")
    writer.writeheader()
    writer.writerows(_rows(report))
    return text.getvalue().rstrip("\n")


#: -o -> how a report is written.
FORMATS: dict[str, Callable[[Report], str]] = {
    "md": to_markdown,
    "json": to_json,
    "jsonl": to_jsonl,
    "csv": to_csv,
    "html": to_html,
}


def write(text: str, file: Path | None) -> None:
    """Text to a file, or to stdout; BenchError if the file cannot be written."""
    try:
        if file is not None:
            file.write_text(text + "\n", encoding="utf-8")
            return
    except OSError as error:
        sys.stdout.write(text + "\n")
        message = f"{file}: cannot be written ({error.strerror}); the report is on stdout instead"
        raise BenchError(message) from error
    sys.stdout.write(text + "\n")


def require(report: Report) -> None:
    """BenchError if anything could not be measured."""
    errors = report["errors"]
    if errors:
        more = f" (and {len(errors) - 1} more, listed in the report)" if len(errors) > 1 else ""
        measured = f"{len(report['results'])} tests were measured, {len(errors)} were not"
        raise BenchError(f"{measured}: {_said(errors[0])}{more}")
