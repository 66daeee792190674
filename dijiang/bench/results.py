"""From samples to figures: one result a test and model, ratios of sides in turn, slopes over depth."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from ..machine.sensors import Meter
from ..runtime.sessions.inference import CPU_PROVIDER
from .matrix import Failure, Test, series_of
from .measure import Samples, Turn
from .statistics import NOISY, describe, ratio, slope, slope_of_samples, spread
from .subject import Side
from .traffic import Traffic

#: Change of time over a range of depths up to which a model counts as flat.
FLAT = 0.02
#: Part of the predicted ratio below which bytes are said not to explain the result.
EXPLAINED = 0.90
SERIES = ("model", "kind", "tokens", "batch", "threads")
Found = Mapping[tuple[str, Test], Samples]


def summarise(
    groups: Sequence[Sequence[Side]],
    tests: Sequence[Test],
    found: Found,
    bandwidth: Mapping[int | None, float],
    idle: Meter,
) -> dict[str, Any]:
    """`results`, `ratios` and `flatness` of a report, and `failures` to add to its errors.

    Args:
        found: by side and test.
        bandwidth: bytes a second, by the threads that tests ask for.
    """
    results, ratios, failures = [], [], []
    order = ((group, test) for series in series_of(tests) for group in groups for test in series)
    for group, test in order:
        pairs = [(side, found.get((side.name, test))) for side in group]
        done = [(side, samples) for side, samples in pairs if samples and samples.turns]
        for side, samples in pairs:
            if samples and not samples.turns and samples.disturbed:
                message = "other processes ran in every repetition; end them and run it again"
                failures.append(Failure(side.name, test.label, message))
        results += [result_of(s, test, samples, bandwidth[test.threads], idle) for s, samples in done]
        for ours, other in ((done[0], other) for other in done[1:] if done[0][0] is group[0]):
            used = {ours[1].provider, other[1].provider}
            if other[0].baseline_of and len(used) > 1:
                message = f"ran on {' and '.join(sorted(used))}: no ratio; use --provider cpu"
                failures.append(Failure(group[0].name, test.label, message))
            else:
                ratios.append(ratio_of(ours, other, test, bandwidth[test.threads]))
    flatness = flatness_of(results)
    return {"results": results, "ratios": ratios, "flatness": flatness, "failures": failures}


def result_of(side: Side, test: Test, samples: Samples, bandwidth: float, idle: Meter) -> dict[str, Any]:
    """One entry of the report's `results`; its fields are described in schema.json."""
    totals = samples.totals
    tokens = test.batch * test.tokens
    middle = float(np.median(totals))
    target = {
        "memory": _memory(samples),
        "latency": describe(totals),
        "throughput": {"unit": "tokens/s", "value": tokens / middle},
        "energy": _energy(samples, tokens, idle),
    }
    decode = not test.prompt
    steps = np.concatenate([turn.seconds for turn in samples.turns])
    whole = decode and len(steps) == test.tokens * len(totals)
    bound = samples.provider == CPU_PROVIDER and bandwidth and side.traffic.weights
    noise, load = spread(totals), samples.load_seconds
    return {
        "model": side.name,
        **test.to_dict(),
        "provider": samples.provider,
        "session": samples.facts,
        "load_model": None if load is None else {"latency": describe([load])},
        "prefill": None if decode else target,
        "decode": target if decode else None,
        "per_token": {"latency": describe(steps)} if whole else None,
        "ttft_s": None if decode else middle,
        "tpot_s": middle / test.tokens if decode else None,
        "tokens_per_second": tokens / middle,
        "spread": noise,
        "noisy": noise > NOISY,
        "alone": samples.alone,
        "interleaved": samples.interleaved,
        "contention": {
            "turns": [turn.number for turn in samples.turns],
            "waited": [turn.waited for turn in samples.turns],
            "stolen": [turn.stolen for turn in samples.turns],
            "disturbed": [asdict(turn) for turn in samples.disturbed],
        },
        "roofline": roofline(side.traffic, test, middle, bandwidth) if decode and bound else None,
    }


def samples_of(result: dict[str, Any]) -> Samples:
    """The samples that a result was made of; single tokens are not taken apart again."""
    target, other, load = (
        result["decode"] or result["prefill"],
        result["contention"],
        result["load_model"],
    )
    values, peak = target["latency"]["values"], target["memory"]["max_ram"]
    pairs = zip(other["turns"], values, other["waited"], other["stolen"], strict=True)
    return Samples(
        load and load["latency"]["mean"],
        result["provider"],
        result["session"],
        [Turn(number, [seconds], waited, stolen) for number, seconds, waited, stolen in pairs],
        [Turn(**turn) for turn in other["disturbed"]],
        {"host": None if peak is None else round(1e6 * peak)},
        alone=result["alone"],
        interleaved=result["interleaved"],
    )


def _memory(samples: Samples) -> dict[str, Any]:
    host, device = samples.peaks.get("host"), samples.peaks.get("device")
    return {
        "unit": "MB",
        "max_ram": None if host is None else host / 1e6,
        "max_process_vram": None if device is None else device / 1e6,
    }


def _energy(samples: Samples, tokens: int, idle: Meter) -> dict[str, Any]:
    gross = net = None
    if samples.joules is not None:
        count = tokens * len(samples.turns)
        gross = samples.joules / count
        if idle.watts is not None:
            net = (samples.joules - idle.watts * samples.joules_seconds) / count
    return {"unit": "J/token", "sensor": idle.name, "gross": gross, "idle_subtracted": net}


def mean_depth(test: Test) -> float:
    """Tokens in the state in the middle of a tg test."""
    return test.depth + (test.tokens - 1) / 2


def roofline(traffic: Traffic, test: Test, seconds: float, bandwidth: float) -> dict[str, Any]:
    """What memory allows of a decode test whose repetition takes `seconds`."""
    moved = traffic.step(test.batch, mean_depth(test))
    return {
        "bytes_per_step": moved,
        "bytes_per_token": moved / test.batch,
        "bandwidth": bandwidth,
        "bound_s": moved / bandwidth,
        "percent": 100 * moved / bandwidth / (seconds / test.tokens),
    }


def in_turn(ours: Samples, other: Samples) -> tuple[list[float], list[float]]:
    """Seconds of those turns that both have."""
    first, second = ({t.number: sum(t.seconds) for t in samples.turns} for samples in (ours, other))
    both = [number for number in first if number in second]
    return [first[number] for number in both], [second[number] for number in both]


def ratio_of(
    ours: tuple[Side, Samples], other: tuple[Side, Samples], test: Test, bandwidth: float
) -> dict[str, Any]:
    """Throughput of a side over another's, beside what bytes alone predict."""
    mine, theirs = in_turn(ours[1], other[1])
    paired = bool(mine) and not ours[1].alone
    if not paired:
        mine, theirs = ours[1].totals, other[1].totals
    measured = ratio(theirs, mine, paired=paired)
    predicted = limit = None
    depth = mean_depth(test)
    if other[0].baseline_of and not test.prompt:
        predicted = other[0].traffic.step(test.batch, depth) / ours[0].traffic.step(test.batch, depth)
    if bandwidth and ours[0].traffic.weights:
        steps = 1 if test.prompt else test.tokens
        limit = float(np.median(theirs)) / steps * bandwidth / ours[0].traffic.weights
    return {
        "model": ours[0].name,
        "baseline": other[0].name,
        **test.to_dict(),
        "measured": measured.value,
        "low": measured.low,
        "high": measured.high,
        "predicted": predicted,
        "limit": limit,
        "note": _note(measured.value, predicted, [ours[1], other[1]]),
    }


def _note(measured: float, predicted: float | None, samples: list[Samples]) -> str | None:
    notes = []
    if any(spread(one.totals) > NOISY for one in samples):
        notes.append("noisy")
    if predicted is not None and measured < EXPLAINED * predicted:
        notes.append("below what bytes predict: arithmetic or overhead sets the pace, not memory")
    if predicted is not None and measured > predicted / EXPLAINED:
        notes.append("above what bytes predict: the Transformer is further from its roofline")
    if samples[0].alone:
        notes.append("too large to be in memory together, so not in turn")
    return "; ".join(notes) or None


def flatness_of(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each series over depth: the change of time and of peak memory.

    Of depths that took turns the change of time is that of neighbours, so that what slows all of them
    down for a while cancels.
    """
    series: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for result in results:
        if not result["way"]:
            series[tuple(result[key] for key in SERIES)].append(result)
    return [
        dict(zip(SERIES, key, strict=True)) | _flatness(members)
        for key, members in series.items()
        if len({m["depth"] for m in members}) > 1
    ]


def _flatness(members: list[dict[str, Any]]) -> dict[str, Any]:
    depths = [m["depth"] for m in members]
    targets = [m["decode"] or m["prefill"] for m in members]
    interleaved = all(m["interleaved"] for m in members)
    tokens = members[0]["batch"] * members[0]["tokens"]
    taken = [m["contention"]["turns"] for m in members]
    both = set(taken[0]).intersection(*taken) if interleaved else set()
    seconds = [
        [
            total / tokens
            for turn, total in zip(turns, target["latency"]["values"], strict=True)
            if turn in both or not both
        ]
        for turns, target in zip(taken, targets, strict=True)
    ]
    time, low, high = slope_of_samples(depths, seconds, paired=interleaved and bool(both))
    peaks = [target["memory"]["max_ram"] for target in targets]
    return {
        "depths": sorted(depths),
        "interleaved": interleaved,
        "time": asdict(time) | {"low": low, "high": high},
        "memory": None if None in peaks else asdict(slope(depths, peaks)),
        "flat": abs(time.change) <= FLAT,
    }
