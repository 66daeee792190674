"""A report as Markdown, JSON, JSON lines, CSV or one HTML page."""

from __future__ import annotations

import csv
import io
import json
import string
import sys
from collections.abc import Callable, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..errors import BenchError
from ..files import write_file
from .llama_bench import to_llama_bench
from .matrix import Test
from .plots import panels
from .report import Report, seconds_of, target
from .statistics import FEWEST, NOISY

UNKNOWN = "unknown"
FIGURES = json.loads(files(__package__).joinpath("figures.json").read_text(encoding="utf-8"))
#: Figure -> its formula, as --explain prints them.
FORMULAS: dict[str, str] = FIGURES["formulas"]
#: Columns of the tables: where a member has the value (`a to b`: an interval), and the factor of its unit.
TABLES: dict[str, dict[str, tuple[str, float]]] = FIGURES["tables"]
#: Heading of the page -> table of the report.
HEADINGS = {"Results": "results", "Side by side": "ratios", "Change over depth": "flatness"}
Rows = list[dict[str, Any]]


def explain() -> str:
    """The formulas, one a paragraph."""
    return "\n".join(f"{name:16} {text}" for name, text in FORMULAS.items())


def rows_of(name: str, members: Sequence[Report]) -> Rows:
    """The rows of a table."""
    return [{column: _value(member, *at) for column, at in TABLES[name].items()} for member in members]


def _value(member: Any, path: str, factor: float | None = None) -> Any:
    if " to " in path:
        ends = [_value(member, end, factor) for end in path.split(" to ")]
        return "" if None in ends else " to ".join(map(figure, ends))
    for key in path.split("."):
        member = member and member[int(key) if isinstance(member, list) else key]
    return member if member is None or factor is None else factor * member


def _members(report: Report, name: str) -> list[Report]:
    """What a table has a row of, with what only the table says."""
    precisions = {model["name"]: model["precision"] for model in report["models"]}
    more: dict[str, Callable[[Report], Report]] = {
        "results": lambda r: {"target": target(r), "precision": precisions[r["model"]]},
        "ratios": lambda r: {"note": r["note"] or ""},
        "flatness": lambda f: {"test": f"{f['kind']}{f['tokens']}", "verdict": _verdict(f)},
    }
    return [member | more[name](member) for member in report[name]]


def _verdict(flatness: Report) -> str:
    time = flatness["time"]
    if time["low"] is None:
        return f"unknown: fewer than {FEWEST} repetitions"
    if flatness["flat"]:
        return "flat"
    if time["low"] <= 0 <= time["high"]:
        return "unclear: more noise than change"
    return "grows" if time["change"] > 0 else "falls"


def report_rows(report: Report, name: str) -> Rows:
    """Rows of a table of a report; of results, without columns that are empty."""
    rows = rows_of(name, _members(report, name))
    empty = {key for key in TABLES[name] if name == "results" and all(row[key] is None for row in rows)}
    return [{key: value for key, value in row.items() if key not in empty} for row in rows]


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
    noisy = [f"{r['model']}, {Test.of(r).label} ({_noise(r)})" for r in report["results"] if r["noisy"]]
    advice = (
        f"NOISY: repetitions spread over more than {100 * NOISY:.0f} %, or are fewer than {FEWEST}: "
        "close other programs and run again with -r 10 before quoting"
    )
    return ([f"{advice} {'; '.join(noisy)}"] if noisy else []) + [f"FAILED: {_said(e)}" for e in report["errors"]]


def _noise(result: Report) -> str:
    """What makes a result noisy."""
    count = len(seconds_of(result))
    return f"{count} repetitions" if count < FEWEST else f"{100 * result['spread']:.0f} %"


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
    parts = [table(rows) for name in HEADINGS.values() if (rows := report_rows(report, name))]
    said = "\n".join(f"- {line}" for line in remarks(report))
    return [*parts, said] if said else parts


def to_markdown(report: Report) -> str:
    """The report for people: machine, results, ratios, slopes, what failed."""
    header = "\n".join(f"- {line}" for line in header_lines(report))
    return "\n\n".join(("# dijiang bench", header, *tables(report)))


def to_html(report: Report) -> str:
    """One page without scripts that run, without links, without anything from a network."""

    def cell(value: Any) -> str:
        kind = ' class="text"' if isinstance(value, str) else ""
        return f"<td{kind}>{escape(figure(value))}</td>"

    def shown(rows: Rows) -> str:
        head = "".join(f"<th>{escape(name)}</th>" for name in rows[0])
        body = "".join(f"<tr>{''.join(map(cell, row.values()))}</tr>" for row in rows)
        return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'

    found = {title: report_rows(report, name) for title, name in HEADINGS.items()}
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
    writer = csv.DictWriter(text, list(TABLES["results"]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows_of("results", _members(report, "results")))
    return text.getvalue().rstrip("\n")


#: -o -> how a report is written.
FORMATS: dict[str, Callable[[Report], str]] = {
    "md": to_markdown,
    "json": to_json,
    "jsonl": to_jsonl,
    "csv": to_csv,
    "html": to_html,
    "llama-bench": to_llama_bench,
}


def write(text: str, file: Path | None) -> None:
    """Text to a file, or to stdout; BenchError if the file cannot be written.

    What is no Unicode, as names of files can be, is written as an escape.
    """
    if file is None:
        sys.stdout.write(text + "\n")
        return
    try:
        write_file(file, f"{text}\n".encode(errors="backslashreplace"), BenchError)
    except BenchError as error:
        sys.stdout.write(text + "\n")
        raise BenchError(f"{error}; the report is on stdout instead") from error


def require(report: Report) -> None:
    """BenchError if anything could not be measured."""
    errors = report["errors"]
    if errors:
        more = f" (and {len(errors) - 1} more, listed in the report)" if len(errors) > 1 else ""
        measured = f"{len(report['results'])} tests were measured, {len(errors)} were not"
        raise BenchError(f"{measured}: {_said(errors[0])}{more}")
