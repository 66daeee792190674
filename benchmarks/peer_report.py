"""From samples to tables: medians, ratios of the sides of one round, and the numbers to reach."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median, quantiles
from typing import Any

from peer_cases import PAIRS, QUIET, TARGETS, Target

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


def block_pairs(record: Record) -> list[tuple[float, float]]:
    """Seconds of both blocks of every undisturbed pair."""
    quiet = (sample["seconds"] for sample in record["samples"] if sample["waited"] <= QUIET)
    return [pair for seconds in quiet for pair in zip(seconds[::2], seconds[1::2], strict=True)]


def _pair(record: Record, _: Target) -> list[float]:
    """The first time of each pair over the second."""
    return [first / second for first, second in block_pairs(record)]


def _overhead(record: Record, target: Target) -> list[float]:
    """Time that the first of each pair takes beyond the second, as a share."""
    return [ratio - 1 for ratio in _pair(record, target)]


def _size(record: Record, _: Target) -> list[float]:
    return [record["models"]["bytes"][record["sides"][0]] / record["models"]["parameters"]["all"]]


def read_seconds(record: Record) -> float | None:
    """Seconds to read the weights of a step of our side once, scales not counted."""
    name, _, kind = record["sides"][0].partition("-")
    if name != "dijiang":
        return None
    counts, (layer, head) = record["models"]["parameters"], WEIGHT_BYTES[kind]
    read: float = layer * (counts["step"] - counts["head"]) + head * counts["head"]
    return read / median(record["bandwidth"])


def limit(record: Record, side: str, test: str) -> float | None:
    """Our side over another, if ours only read its weights: for every token, or once for a prompt."""
    peer, reading = rates(record, side, test), read_seconds(record)
    if not peer or not reading:
        return None
    tokens = 1 if test.startswith("tg") else _tokens(record, test)
    return tokens / reading / median(peer)


def _tokens(record: Record, test: str) -> int:
    return next(int(sample["tokens"]) for sample in record["samples"] if sample["test"] == test)


def asked(record: Record, side: str, test: str) -> str:
    """The ratio that must be reached in a test, if there is one."""
    for target in TARGETS:
        measured = (target.group, *record["sides"][1:2], target.test)
        if target.kind == "ratio" and measured == (record["group"], side, test):
            return _number(target.kind, target.must)
    return ""


def _target_limit(record: Record, target: Target) -> float | None:
    """What reading alone would give for a target: of a pair nothing is left between its two."""
    if target.kind == "ratio":
        return limit(record, record["sides"][1], target.test)
    return {"share": 1.0, "pair": 1.0, "overhead": 0.0}.get(target.kind)


KINDS: dict[str, Callable[[Record, Target], list[float]]] = {
    "share": _share,
    "ratio": _ratio,
    "pair": _pair,
    "overhead": _overhead,
    "size": _size,
}
#: Kinds printed in percent.
PERCENT = ("share", "overhead")


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
                _number(target.kind, _target_limit(groups[target.group], target)),
            )
        )
    return rows


RATE_HEADER = ("test", "side", "tokens/s", "lowest to highest", "samples")
RATIO_HEADER = ("asked", "lowest to highest", "memory limit")


def rate_rows(record: Record) -> list[tuple[str, ...]]:
    """RATE_HEADER of every test and side, the first side over this one, and RATIO_HEADER."""
    rows = []
    first = record["sides"][0]
    for test in test_names(record):
        for side in record["sides"]:
            found = rates(record, side, test)
            if not found:
                rows.append((test, side, "no undisturbed sample", "", "0", "", "", "", ""))
                continue
            rates_found = (f"{median(found):,.1f}", f"{min(found):,.1f} to {max(found):,.1f}")
            ratio = [] if side == first else ratios(record, first, side, test)
            compared = ("",) * 4
            if ratio:
                compared = (
                    f"{median(ratio):.2f}x",
                    asked(record, side, test),
                    f"{min(ratio):.2f} to {max(ratio):.2f}",
                    _number("ratio", limit(record, side, test)),
                )
            rows.append((test, side, *rates_found, str(len(found)), *compared))
    return rows


def pair_table(record: Record, labels: tuple[str, str]) -> str:
    """The times of a pair's blocks, and what one is of the other."""
    tokens = record["samples"][0]["tokens"]
    blocks = block_pairs(record)
    if len(blocks) < 2:
        return "Too few undisturbed pairs.\n"
    found = sorted(first / second for first, second in blocks)
    low, middle, high = (f"{value:.3f}" for value in quantiles(found, n=4))
    times = (f"{median(pair[i] for pair in blocks) / tokens * 1e3:.3f}" for i in range(2))
    header = (*(f"{label}, ms a token" for label in labels), "ratio", "middle half")
    row = (*times, middle, f"{low} to {high}", f"{found[0]:.3f} to {found[-1]:.3f}", str(len(found)))
    return table((*header, "lowest to highest", f"pairs of {tokens} tokens"), [row])


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
    if pair := PAIRS.get(samples[0]["test"]):
        body = pair_table(record, pair.labels)
    else:
        header = (*RATE_HEADER, f"{record['sides'][0]} / side", *RATIO_HEADER)
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
        "512. Memory limit: the ratio at which our side would only read its weights, once a token or a "
        "prompt.\n",
        *(["## Numbers to reach\n", table(header, numbers)] if numbers else []),
        "## Groups\n",
        *(_section(record) for record in groups.values()),
    ]
    return "\n".join(parts)
