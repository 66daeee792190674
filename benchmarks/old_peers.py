"""Results of the peers from before they were reports, and reports of one commit joined."""

from __future__ import annotations

from statistics import median
from typing import Any

from dijiang.bench.matrix import Test
from dijiang.bench.measure import QUIET, Samples, Turn
from dijiang.bench.report import SCHEMA_VERSION, Report
from dijiang.bench.results import samples_of, summarise
from dijiang.bench.runner import model_of
from dijiang.bench.subject import Side, load_bundle
from dijiang.bench.traffic import Traffic
from dijiang.machine.sensors import Meter

#: Precision -> bytes a weight in the layers and in the head, without scales.
WEIGHT_BYTES = {"fp32": (4.0, 4.0), "int8": (1.0, 1.0), "int4": (0.5, 1.0)}
#: Pairs of blocks in one process, by their old name -> what each of the two was.
PAIRS = {"loop": ({"way": "generate"}, {"way": "bare"}), "depth": ({"depth": 10**6}, {"depth": 0})}
Found = dict[tuple[str, Test], Samples]


def read(document: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs of a file of records: group and report of each."""
    return [{"group": record["group"], "report": of_record(record)} for record in document["records"]]


def of_record(record: dict[str, Any]) -> Report:
    """One record as a report."""
    found: Found = {}
    for sample in record["samples"]:
        blocks = PAIRS.get(sample["test"], ({},))
        for index, block in enumerate(blocks):
            seconds = sample["seconds"][index :: len(blocks)]
            test = _test(sample, record["threads"], block)
            samples = found.setdefault((sample["side"], test), Samples(None, "CPUExecutionProvider"))
            samples.interleaved |= bool(block)
            kept = samples.turns if sample["waited"] <= QUIET else samples.disturbed
            first = sample["round"] * len(seconds)
            load = (sample["waited"], sample["stolen"])
            kept += [Turn(first + i, [one], *load) for i, one in enumerate(seconds)]
    each = max(len(t.turns) + len(t.disturbed) for t in found.values()) // len(record["bandwidth"])
    rates = [{"bytes_per_second": rate, "threads": record["threads"]} for rate in record["bandwidth"]]
    turns = [rate | {"turn": i * each + j} for i, rate in enumerate(rates) for j in range(each)]
    rest = {key: value for key, value in record["environment"].items() if key != "commit"}
    header = {"created": record["started"], "commit": record["environment"]["commit"]}
    header |= {"environment": {"gpus": [], "jetson": None} | rest}
    return _report(header, [_side(record, name) for name in record["sides"]], found, turns)


def _test(sample: dict[str, Any], threads: int, block: dict[str, Any]) -> Test:
    if sample["test"].startswith("pp"):
        return Test("pp", int(sample["test"][2:]), threads=threads)
    depth = int(sample["test"].rpartition("@ d")[2]) if "@" in sample["test"] else 0
    return Test("tg", sample["tokens"], **({"depth": depth, "threads": threads} | block))


def _side(record: dict[str, Any], name: str) -> Side:
    kind, _, precision = name.partition("-")
    counts, size = record["models"]["parameters"], record["models"]["bytes"].get(name, 0)
    layer, head = WEIGHT_BYTES.get(precision.partition("-")[0], (0, 0)) if kind == "dijiang" else (0, 0)
    read = layer * (counts["step"] - counts["head"]) + head * counts["head"]
    facts = {"kind": kind, "precision": precision, "graph": None, "bytes": size, "spec": None}
    return Side(name, "", load_bundle, Traffic(round(read)), facts | {"parameters": counts})


def joined(before: Report, after: Report) -> Report:
    """Two reports of one group and commit as one, the turns of the second after those of the first."""
    found: Found = {(r["model"], Test.of(r)): samples_of(r) for r in before["results"]}
    first = 1 + max(turn["turn"] or 0 for turn in before["bandwidth"])
    for result in after["results"]:
        later = samples_of(result)
        for name in ("turns", "disturbed"):
            moved = [Turn(t.number + first, t.seconds, t.waited, t.stolen) for t in getattr(later, name)]
            setattr(later, name, moved)
        samples = found.setdefault((result["model"], Test.of(result)), later)
        if samples is not later:
            samples.turns += later.turns
            samples.disturbed += later.disturbed
    moved = [b | {"turn": None if b["turn"] is None else b["turn"] + first} for b in after["bandwidth"]]
    sides = [
        Side(m["name"], m["path"], load_bundle, Traffic(**m["traffic"]), m, m["baseline_of"])
        for m in after["models"]
    ]
    errors = {"errors": before["errors"] + after["errors"]}
    return _report(after, sides, found, before["bandwidth"] + moved) | errors


def _report(header: Report, sides: list[Side], found: Found, bandwidth: list[Report]) -> Report:
    middle = median(b["bytes_per_second"] for b in bandwidth if b["turn"] is not None)
    tests = list(dict.fromkeys(test for _, test in found))
    figures = summarise([sides], tests, found, {test.threads: middle for test in tests}, Meter([]))
    failures = [vars(failure) for failure in figures.pop("failures")]
    known = {"schema_version": SCHEMA_VERSION, "idle": {"sensor": "unknown", "watts": None}}
    models = [model_of(side) for side in sides]
    return header | known | figures | {"bandwidth": bandwidth, "models": models, "errors": failures}
