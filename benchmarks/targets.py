"""Numbers to reach, and how far reports are from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dijiang.bench.render import table
from dijiang.bench.report import Report, target
from dijiang.bench.results import in_turn, samples_of
from dijiang.bench.statistics import Ratio, ratio

#: Kinds printed in percent, and what a kind gives if nothing but memory takes time.
PERCENT = ("weights", "roofline", "beyond", "agreement")
LIMITS = {"weights": 1, "time": 1, "flat": 1, "beyond": 0}
#: (model, test) of a report.
Row = tuple[str, str]


@dataclass(frozen=True)
class Target:
    """A number to reach.

    kind: over: times as fast as `theirs`.  time: the time of ours over that of theirs.  beyond: the same
    less one.  weights: weights of a step at one byte each x steps a second / bandwidth of the turn.
    roofline: the report's share of the bandwidth.  size: bundle bytes / parameters.  flat: as time, but
    less is no better.  agreement: of parity, `run` names all cases and `ours` the one.
    run: the report that has it.  at_most: for costs.
    """

    run: str
    label: str
    kind: str
    must: float
    stretch: float | None
    ours: Row
    theirs: Row | None = None

    @property
    def at_most(self) -> bool:
        """Whether less is better."""
        return self.kind in ("time", "beyond", "size")

    def found(self, report: Report) -> Ratio | None:
        """The figure and its interval; None if it was not measured."""
        return KINDS[self.kind](report, self)

    def limit(self, report: Report) -> float | None:
        """What reading the weights alone would give."""
        same = (r for r in report.get("ratios", ()) if self.theirs == (r["baseline"], r["test"]))
        return LIMITS.get(self.kind, next((r["limit"] for r in same if r["model"] == self.ours[0]), None))

    def shown(self, value: float | None) -> str:
        """A value of this kind."""
        if value is None:
            return ""
        return f"{value:.1%}" if self.kind in PERCENT else f"{value:.3g}"


def _exactly(value: float) -> Ratio:
    return Ratio(value, value, value)


def result(report: Report, model: str, test: str) -> dict[str, Any] | None:
    """A row of a report."""
    rows = (r for r in report["results"] if (r["model"], r["test"]) == (model, test))
    return next(rows, None)


def times_as_fast(ours: dict[str, Any], theirs: dict[str, Any]) -> Ratio:
    """Turn by turn, where both were in one run; else of the medians."""
    mine, other = in_turn(samples_of(ours), samples_of(theirs))
    if mine and ours.get("run") == theirs.get("run"):
        return ratio(other, mine, paired=True)
    mine, other = (target(one)["latency"]["values"] for one in (ours, theirs))
    return ratio(other, mine)


def _over(report: Report, one: Target) -> Ratio | None:
    return _faster(report, one.ours, one.theirs)


def _time(report: Report, one: Target) -> Ratio | None:
    return _faster(report, one.theirs, one.ours)


def _faster(report: Report, *rows: Row | None) -> Ratio | None:
    ours, theirs = (row and result(report, *row) for row in rows)
    return times_as_fast(ours, theirs) if ours and theirs else None


def _beyond(report: Report, one: Target) -> Ratio | None:
    found = _time(report, one)
    return found and Ratio(found.value - 1, found.low - 1, found.high - 1)


def _weights(report: Report, one: Target) -> Ratio | None:
    mine = result(report, *one.ours)
    rate = {b["turn"]: b["bytes_per_second"] for b in report["bandwidth"]}
    turns = [turn for turn in samples_of(mine).turns if turn.number in rate] if mine else []
    if not mine or not turns:
        return None
    step = _model(report, one)["parameters"]["step"]
    bound = [mine["tokens"] * step / rate[turn.number] for turn in turns]
    return ratio(bound, [sum(turn.seconds) for turn in turns], paired=True)


def _roofline(report: Report, one: Target) -> Ratio | None:
    mine = result(report, *one.ours)
    return _exactly(mine["roofline"]["percent"] / 100) if mine and mine["roofline"] else None


def _size(report: Report, one: Target) -> Ratio | None:
    model = _model(report, one)
    return _exactly(model["bytes"] / model["parameters"]["all"])


def _agreement(results: Report, one: Target) -> Ratio | None:
    logits = results.get(one.ours[0], {}).get("logits")
    return logits and _exactly(logits["top1_agreement"])


def _model(report: Report, one: Target) -> dict[str, Any]:
    found: dict[str, Any] = next(m for m in report["models"] if m["name"] == one.ours[0])
    return found


KINDS = {
    "over": _over,
    "time": _time,
    "flat": _time,
    "beyond": _beyond,
    "weights": _weights,
    "roofline": _roofline,
    "size": _size,
    "agreement": _agreement,
}


def target_rows(targets: tuple[Target, ...], reports: Mapping[str, Report]) -> list[dict[str, str]]:
    """A row of every target whose report is there."""
    rows = []
    for one in targets:
        if one.run not in reports:
            continue
        report = reports[one.run]
        found = one.found(report)
        row = {"what": one.label, "must reach": one.shown(one.must), "stretch": one.shown(one.stretch)}
        if found is None:
            row |= {"measured": "not measured", "95 % interval": "", "reached": "", "memory limit": ""}
        else:
            row |= {
                "measured": one.shown(found.value),
                "95 % interval": f"{one.shown(found.low)} to {one.shown(found.high)}",
                "reached": _verdict(one, round(found.value, 9)),
                "memory limit": one.shown(one.limit(report)),
            }
        rows.append(row)
    return rows


def _verdict(one: Target, value: float) -> str:
    if one.kind == "flat":
        return "reached" if abs(value - 1) <= one.must - 1 else "missed"
    for name, goal in (("stretch", one.stretch), ("reached", one.must)):
        if goal is not None and (value <= goal if one.at_most else value >= goal):
            return name
    return "missed"


def target_table(targets: tuple[Target, ...], reports: Mapping[str, Report]) -> str:
    """Markdown; empty if nothing was asked of these reports."""
    rows = target_rows(targets, reports)
    return table(rows) if rows else ""
