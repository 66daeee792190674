"""From samples to figures: one result a test and model, ratios of pairs, slopes over depth."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict
from typing import Any

import numpy as np

from ..machine.sensors import Meter
from .matrix import Test
from .measure import Samples, Side
from .statistics import NOISY, describe, ratio, slope, slope_of_samples, spread

#: The provider whose memory's bandwidth is measured.
CPU = "CPUExecutionProvider"
#: Change of time over a range of depths up to which a model counts as flat.
FLAT = 0.02
#: Part of the predicted ratio below which bytes are said not to explain the result.
EXPLAINED = 0.90


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
    decode, on_cpu = test.kind == "tg", samples.provider == CPU
    noise = spread(totals)
    return {
        "model": side.name,
        **test.to_dict(),
        "provider": samples.provider,
        "load_model": {"latency": describe([samples.load_seconds])},
        "prefill": None if decode else target,
        "decode": target if decode else None,
        "per_token": {"latency": describe(np.concatenate(samples.repetitions))} if decode else None,
        "ttft_s": None if decode else middle,
        "tpot_s": middle / test.tokens if decode else None,
        "tokens_per_second": tokens / middle,
        "spread": noise,
        "noisy": noise > NOISY,
        "alone": samples.alone,
        "interleaved": samples.interleaved,
        "roofline": _roofline(side, test, middle, bandwidth) if decode and on_cpu else None,
    }


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
        count = tokens * len(samples.repetitions)
        gross = samples.joules / count
        if idle.watts is not None:
            net = (samples.joules - idle.watts * samples.joules_seconds) / count
    return {"unit": "J/token", "sensor": idle.name, "gross": gross, "idle_subtracted": net}


def mean_depth(test: Test) -> float:
    """Tokens in the state in the middle of a tg test."""
    return test.depth + (test.tokens - 1) / 2


def _roofline(side: Side, test: Test, seconds: float, bandwidth: float) -> dict[str, Any]:
    moved = side.traffic.step(test.batch, mean_depth(test))
    step = seconds / test.tokens
    return {
        "bytes_per_step": moved,
        "bytes_per_token": moved / test.batch,
        "bandwidth": bandwidth,
        "bound_s": moved / bandwidth,
        "percent": 100 * moved / bandwidth / step,
    }


def ratio_of(ours: tuple[Side, Samples], other: tuple[Side, Samples], test: Test) -> dict[str, Any]:
    """Throughput of a bundle over its baseline's, beside what bytes alone predict."""
    measured = ratio(other[1].totals, ours[1].totals, paired=not ours[1].alone)
    predicted = None
    if test.kind == "tg":
        depth = mean_depth(test)
        predicted = other[0].traffic.step(test.batch, depth) / ours[0].traffic.step(test.batch, depth)
    return {
        "model": ours[0].name,
        "baseline": other[0].name,
        **test.to_dict(),
        "measured": measured.value,
        "low": measured.low,
        "high": measured.high,
        "predicted": predicted,
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
    seconds = [[total / tokens for total in target["latency"]["values"]] for target in targets]
    time, low, high = slope_of_samples(depths, seconds, paired=interleaved)
    peaks = [target["memory"]["max_ram"] for target in targets]
    return {
        "depths": sorted(depths),
        "interleaved": interleaved,
        "time": asdict(time) | {"low": low, "high": high},
        "memory": None if None in peaks else asdict(slope(depths, peaks)),
        "flat": abs(time.change) <= FLAT,
    }


SERIES = ("model", "kind", "tokens", "batch", "threads")
