"""From samples to tables: medians, ratios of the sides of one round, and the numbers to reach."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

from peer_cases import LOOP, QUIET, TARGETS, Target

Record = dict[str, Any]
#: Precision -> bytes a weight in the layers and in the head, without scales.
WEIGHT_BYTES = {"fp32": (4.0, 4.0), "int8": (1.0, 1.0), "int4": (0.5, 1.0)}


def newest(records: list[Record]) -> dict[str, Record]:
    """The latest record of each group, with the rounds of earlier ones of the same commit."""
    groups: dict[str, Record] = {}
    for record in sorted(records, key=lambda r: r["started"]):
        before = groups.get(record["group"])
        same = before and before["environment"]["commit"] == record["environment"]["commit"]
        groups[record["group"]] = _joined(before, record) if before and same else record
    return groups


def _joined(before: Record, after: Record) -> Record:
    first = len(before["bandwidth"])
    later = [sample | {"round": first + sample["round"]} for sample in after["samples"]]
    bandwidth = before["bandwidth"] + after["bandwidth"]
    return after | {"bandwidth": bandwidth, "samples": before["samples"] + later}


def by_round(record: Record, side: str, test: str) -> dict[int, list[float]]:
    """Round -> tokens a second of its samples; rounds in which other processes ran are left out."""
    return {
        sample["round"]: [sample["tokens"] / seconds for seconds in sample["seconds"]]
        for sample in record["samples"]
        if sample["side"] == side and sample["test"] == test and sample["waited"] <= QUIET
    }


def rates(record: Record, side: str, test: str) -> list[float]:
    """Tokens a second of every undisturbed sample, in order."""
    return [rate for found in by_round(record, side, test).values() for rate in found]


def _pairs(ours: dict[int, list[float]], theirs: dict[int, list[float]]) -> list[float]:
    """Quotients of the samples of those rounds that both have."""
    rounds = [(ours[turn], theirs[turn]) for turn in ours if turn in theirs]
    return [a / b for mine, other in rounds for a, b in zip(mine, other, strict=True)]


def test_names(record: Record) -> list[str]:
    """The tests of a record in their order."""
    return list(dict.fromkeys(sample["test"] for sample in record["samples"]))


def ratios(record: Record, side: str, other: str, test: str) -> list[float]:
    """side over other, sample by sample: both were measured within one round."""
    return _pairs(by_round(record, side, test), by_round(record, other, test))


def _share(record: Record, _: Target) -> list[float]:
    """Weights that a step reads, at one byte each, x tokens/s / bandwidth of the same round."""
    weights = record["models"]["parameters"]["step"]
    found = by_round(record, record["sides"][0], "tg @ d0")
    return [weights * rate / record["bandwidth"][turn] for turn in found for rate in found[turn]]


def _ratio(record: Record, target: Target) -> list[float]:
    return ratios(record, *record["sides"][:2], target.test)


def _endless(record: Record, _: Target) -> list[float]:
    """Time per token of the deepest test over the first."""
    first, *_, last = test_names(record)
    side = record["sides"][0]
    return _pairs(by_round(record, side, first), by_round(record, side, last))


def _size(record: Record, _: Target) -> list[float]:
    return [record["models"]["bytes"][record["sides"][0]] / record["models"]["parameters"]["all"]]


def _loop(record: Record, _: Target) -> list[float]:
    """Time that `Model.generate` adds to its bare session, as a share."""
    quiet = (sample["seconds"] for sample in record["samples"] if sample["waited"] <= QUIET)
    return [looped / bare - 1 for looped, bare in quiet]


def limit(record: Record, target: Target) -> float | None:
    """The ratio at which our side would do nothing but read its weights, scales not counted."""
    kind = record["sides"][0].rpartition("-")[2]
    if target.kind != "ratio" or not target.test.startswith("tg") or kind not in WEIGHT_BYTES:
        return None
    counts, (layer, head) = record["models"]["parameters"], WEIGHT_BYTES[kind]
    read = layer * (counts["step"] - counts["head"]) + head * counts["head"]
    peer = rates(record, record["sides"][1], target.test)
    return median(record["bandwidth"]) / read / median(peer) if peer else None


KINDS: dict[str, Callable[[Record, Target], list[float]]] = {
    "share": _share,
    "ratio": _ratio,
    "endless": _endless,
    "size": _size,
    "loop": _loop,
}
#: Kinds printed in percent.
PERCENT = ("share", "loop")


def _number(kind: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.1%}" if kind in PERCENT else f"{value:.3g}"


def target_rows(groups: dict[str, Record]) -> list[tuple[str, ...]]:
    """(label, must, stretch, median, lowest to highest, verdict, limit) of every target measured."""
    rows = []
    for target in TARGETS:
        if target.group not in groups:
            continue
        values = KINDS[target.kind](groups[target.group], target)
        goals = (_number(target.kind, target.must), _number(target.kind, target.stretch))
        if not values:
            rows.append((target.label, *goals, "no undisturbed sample", "", "", ""))
            continue
        middle = median(values)
        reached = [
            name
            for name, goal in (("reached", target.must), ("stretch", target.stretch))
            if goal is not None and (middle <= goal if target.at_most else middle >= goal)
        ]
        low, high = (_number(target.kind, value) for value in (min(values), max(values)))
        rows.append(
            (
                target.label,
                *goals,
                _number(target.kind, middle),
                f"{low} to {high}",
                reached[-1] if reached else "no",
                _number(target.kind, limit(groups[target.group], target)),
            )
        )
    return rows


def rate_rows(record: Record) -> list[tuple[str, ...]]:
    """(test, side, median tokens/s, lowest to highest, samples, first side over this one, spread)."""
    rows = []
    first = record["sides"][0]
    for test in test_names(record):
        for side in record["sides"]:
            found = rates(record, side, test)
            if not found:
                rows.append((test, side, "no undisturbed sample", "", "0", "", ""))
                continue
            ratio = [] if side == first else ratios(record, first, side, test)
            rows.append(
                (
                    test,
                    side,
                    f"{median(found):,.1f}",
                    f"{min(found):,.1f} to {max(found):,.1f}",
                    str(len(found)),
                    f"{median(ratio):.2f}x" if ratio else "",
                    f"{min(ratio):.2f} to {max(ratio):.2f}" if ratio else "",
                )
            )
    return rows


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _section(record: Record) -> str:
    bandwidth = sorted(rate / 1e9 for rate in record["bandwidth"])
    samples = record["samples"]
    quiet = [sample for sample in samples if sample["waited"] <= QUIET]
    again = sum(len(sample["disturbed"]) for sample in samples)
    stolen = max((sample["stolen"] for sample in quiet), default=0)
    environment = record["environment"]
    facts = (
        f"{record['preset']}, {record['threads']} threads, {record['started']}, "
        f"commit {environment['commit']}; "
        f"read bandwidth {median(bandwidth):.1f} GB/s ({bandwidth[0]:.1f} to {bandwidth[-1]:.1f}); "
        f"other processes ran: {again} measured again, {len(samples) - len(quiet)} of {len(samples)} "
        f"left out; the hypervisor took at most {stolen:.1%} of one that counts"
    )
    if record["samples"][0]["test"] == LOOP:
        pairs = [sample["seconds"] for sample in record["samples"]]
        tokens = record["samples"][0]["tokens"]
        rows = [
            (name, f"{median(tokens / pair[i] for pair in pairs):,.1f}", str(len(pairs)))
            for i, name in enumerate(("Model.generate", "bare run_with_iobinding"))
        ]
        body = table(("loop", "tokens/s", "samples"), rows)
    else:
        first = record["sides"][0]
        header = (
            "test",
            "side",
            "tokens/s",
            "lowest to highest",
            "samples",
            f"{first} / side",
            "spread",
        )
        body = table(header, rate_rows(record))
    return f"### {record['group']}\n\n{facts}\n\n{body}"


def markdown(document: dict[str, Any]) -> str:
    """The whole report of a results file."""
    groups = newest(document["records"])
    latest = max(groups.values(), key=lambda record: record["started"])
    environment = latest["environment"]
    cpu, memory = environment["cpu"], environment["memory"]["total_bytes"]
    machine = (
        f"{cpu['model']}, {cpu['physical_cores']} cores, {', '.join(cpu['features'])}, "
        f"{memory / 2**30:.0f} GiB; {environment['system']}; Python {environment['python']}; "
        + ", ".join(f"{name} {version}" for name, version in environment["packages"].items())
    )
    llama = ", ".join(f"{value}" for value in document.get("llama.cpp", {}).values())
    header = (
        "what",
        "must reach",
        "stretch",
        "measured (median)",
        "lowest to highest",
        "reached",
        "memory limit",
    )
    numbers = target_rows(groups)
    parts = [
        "# Side by side with peers\n",
        f"{machine}; {llama}\n",
        "Written by `benchmarks/peers.py`; every sample is in the JSON file of the same name. Ratios "
        "pair the samples of one round. `tg @ d2048`: decoding after 2,048 tokens; `pp512`: a prompt of "
        "512. Memory limit: the ratio at which our side would only read its weights.\n",
        *(["## Numbers to reach\n", table(header, numbers)] if numbers else []),
        "## Groups\n",
        *(_section(record) for record in groups.values()),
    ]
    return "\n".join(parts)
