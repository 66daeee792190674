"""Numbers to reach, and how far reports are from them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dijiang.bench.render import table
from dijiang.bench.report import Report, by_turn, seconds_of
from dijiang.bench.results import in_turn
from dijiang.bench.statistics import Ratio, ratio

#: Kinds printed in percent, kinds of which less is better, and what a kind gives if only memory takes time.
PERCENT, COSTS = ("weights", "roofline", "beyond", "agreement"), ("time", "beyond", "size")
LIMITS = {"weights": 1, "time": 1, "flat": 1, "beyond": 0}
MISSING = {"measured": "not measured", "95 % interval": "", "reached": "", "memory limit": ""}


@dataclass(frozen=True)
class Target:
    """A number to reach.

    kind: over: times as fast as `theirs`.  time: the time of ours over that of theirs.  beyond: the same
    less one.  weights: weights of a step at one byte each x steps a second / bandwidth of the turn.
    roofline: the report's share of the bandwidth.  size: bundle bytes / parameters.  flat: as time, but
    less is no better.  agreement: of parity, `run` names all cases and `ours` the one.
    run: the report that has it.  ours, theirs: (model, test) of the report.
    """

    run: str
    label: str
    kind: str
    must: float
    ours: tuple[str, str]
    theirs: tuple[str, str] | None = None
    stretch: float | None = None

    def found(self, report: Report) -> Ratio | None:
        """The figure and its interval; None if it was not measured."""
        if self.kind == "agreement":
            logits = report.get(self.ours[0], {}).get("logits")
            return logits and _exactly(logits["top1_agreement"])
        model = next((m for m in report["models"] if m["name"] == self.ours[0]), None)
        if self.kind == "size":
            return model and _exactly(model["bytes"] / model["parameters"]["all"])
        rows = {(r["model"], r["test"]): r for r in report["results"]}
        ours, theirs = rows.get(tuple(self.ours)), rows.get(tuple(self.theirs or self.ours))
        if ours is None or theirs is None:
            return None
        if self.kind == "roofline":
            return ours["roofline"] and _exactly(ours["roofline"]["percent"] / 100)
        if self.kind == "weights":
            return _share(report, ours, model["parameters"]["step"])
        found = times_as_fast(*((ours, theirs) if self.kind == "over" else (theirs, ours)))
        return Ratio(*(value and value - 1 for value in found)) if self.kind == "beyond" else found

    def row(self, report: Report) -> dict[str, str]:
        """The target, what was measured, and whether that reaches it."""
        row = {"what": self.label, "must reach": self._shown(self.must), "stretch": self._shown(self.stretch)}
        found = self.found(report)
        if found is None:
            return row | MISSING
        pair = (self.ours[0], *(self.theirs or ()))
        limits = {(r["model"], r["baseline"], r["test"]): r["limit"] for r in report.get("ratios", ())}
        return row | {
            "measured": self._shown(found.value),
            "95 % interval": "" if found.low is None else f"{self._shown(found.low)} to {self._shown(found.high)}",
            "reached": self._verdict(round(found.value, 9)),
            "memory limit": self._shown(LIMITS.get(self.kind, limits.get(pair))),
        }

    def _shown(self, value: float | None) -> str:
        if value is None:
            return ""
        return f"{value:.1%}" if self.kind in PERCENT else f"{value:.3g}"

    def _verdict(self, value: float) -> str:
        if self.kind == "flat":
            return "reached" if abs(value - 1) <= self.must - 1 else "missed"
        for name, goal in (("stretch", self.stretch), ("reached", self.must)):
            if goal is not None and (value <= goal if self.kind in COSTS else value >= goal):
                return name
        return "missed"


def _exactly(value: float) -> Ratio:
    return Ratio(value, value, value)


def times_as_fast(ours: Report, theirs: Report) -> Ratio:
    """Turn by turn, where both were in one run; else of the medians."""
    mine, other = in_turn(ours, theirs)
    if mine and ours.get("run") == theirs.get("run"):
        return ratio(other, mine, paired=True)
    return ratio(seconds_of(theirs), seconds_of(ours))


def _share(report: Report, ours: Report, weights: int) -> Ratio | None:
    """Of the bandwidth of each turn: what reading the weights at one byte each takes."""
    rate = {b["turn"]: b["bytes_per_second"] for b in report["bandwidth"]}
    turns = {number: seconds for number, seconds in by_turn(ours).items() if number in rate}
    bound = [ours["tokens"] * weights / rate[number] for number in turns]
    return ratio(bound, list(turns.values()), paired=True) if turns else None


def target_rows(targets: Iterable[Target], reports: Mapping[str, Report]) -> list[dict[str, Any]]:
    """A row of every target whose report is there."""
    return [one.row(reports[one.run]) for one in targets if one.run in reports]


def target_table(targets: Iterable[Target], reports: Mapping[str, Report]) -> str:
    """Markdown; empty if nothing was asked of these reports."""
    rows = target_rows(targets, reports)
    return table(rows) if rows else ""
