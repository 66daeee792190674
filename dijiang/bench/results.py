"""From samples to figures: one result a test and model, ratios of sides in turn, slopes over depth."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from ..machine.sensors import Meter
from ..runtime.sessions.inference import CPU_PROVIDER
from .matrix import Test, failure, series_of
from .measure import Samples
from .report import Report, by_turn, seconds_of, target
from .statistics import FEWEST, NOISY, describe, ratio, slope, slope_of_samples, spread
from .subject import Side, Traffic

#: Change of time over a range of depths up to which a model counts as flat.
FLAT = 0.02
#: Part of the predicted ratio below which bytes are said not to explain the result.
EXPLAINED = 0.90
SERIES = ("model", "kind", "tokens", "batch", "threads")


def summarise(
    groups: Sequence[Sequence[Side]],
    tests: Sequence[Test],
    found: Mapping[tuple[str, Test], Samples],
    bandwidth: Mapping[int | None, float],
    idle: Meter,
    failures: Sequence[Report] = (),
) -> Report:
    """`results`, `ratios`, `flatness`, `idle` and `errors` of a report.

    Args:
        found: by side and test.
        bandwidth: bytes a second, by the threads that tests ask for.
    """
    results: list[Report] = []
    ratios: list[Report] = []
    failed = [*failures]
    order = ((group, test) for series in series_of(tests) for group in groups for test in series)
    for group, test in order:
        done: list[tuple[Side, Report]] = []
        rate = bandwidth.get(test.threads, 0.0)
        for side in group:
            samples = found.get((side.name, test))
            if samples and samples.turns:
                done.append((side, result_of(side, test, samples, rate, idle)))
            elif samples and samples.disturbed:
                message = "other processes ran in every repetition; end them and run it again"
                failed.append(failure(message, side.name, test.label))
        results += [result for _, result in done]
        for other in done[1:] if done and done[0][0] is group[0] else ():
            used = {result["provider"] for _, result in (done[0], other)}
            if other[0].baseline_of and len(used) > 1:
                message = f"ran on {' and '.join(sorted(used))}: no ratio; use --provider cpu"
                failed.append(failure(message, group[0].name, test.label))
            else:
                ratios.append(ratio_of(*done[0], *other, test, rate))
    return {
        "idle": {"sensor": idle.name, "watts": idle.watts},
        "results": results,
        "ratios": ratios,
        "flatness": flatness_of(results),
        "errors": failed,
    }


def _rate(provider: str, facts: Report, host: float) -> float:
    """Bytes a second of the memory that a provider reads; 0: not known."""
    return host if provider == CPU_PROVIDER else float(facts.get("bandwidth") or 0)


def result_of(side: Side, test: Test, samples: Samples, bandwidth: float, idle: Meter) -> Report:
    """One entry of the report's `results`; its fields are described in schema.json."""
    totals, tokens = samples.totals, test.batch * test.tokens
    middle, noise, load = float(np.median(totals)), spread(totals), samples.load_seconds
    gross = net = None
    if samples.joules is not None:
        metered = tokens * samples.joules_turns
        gross = samples.joules / metered
        if idle.watts is not None:
            net = gross - idle.watts * samples.joules_seconds / metered
    peaks = [samples.peaks.get(kind) for kind in ("host", "device")]
    memory = [None if peak is None else peak / 1e6 for peak in peaks]
    measured = {
        "memory": {"unit": "MB", "max_ram": memory[0], "max_process_vram": memory[1]},
        "latency": describe(totals),
        "throughput": {"unit": "tokens/s", "value": tokens / middle},
        "energy": {"unit": "J/token", "sensor": idle.name, "gross": gross, "idle_subtracted": net},
    }
    decode, steps = not test.prompt, np.concatenate([turn.seconds for turn in samples.turns])
    whole = decode and len(steps) == test.tokens * len(totals)
    bandwidth = _rate(samples.provider, samples.facts, bandwidth)
    bound = decode and bandwidth and side.traffic.weights
    return {
        "model": side.name,
        "test": test.name,
        **asdict(test),
        "provider": samples.provider,
        "session": samples.facts,
        "load_model": None if load is None else {"latency": describe([load])},
        "prefill": None if decode else measured,
        "decode": measured if decode else None,
        "per_token": {"latency": describe(steps)} if whole else None,
        "ttft_s": None if decode else middle,
        "tpot_s": middle / test.tokens if decode else None,
        "tokens_per_second": tokens / middle,
        "spread": noise,
        "noisy": noise > NOISY or len(totals) < FEWEST,
        "alone": samples.alone,
        "interleaved": samples.interleaved,
        "contention": {
            "turns": [turn.number for turn in samples.turns],
            "waited": [turn.waited for turn in samples.turns],
            "stolen": [turn.stolen for turn in samples.turns],
            "disturbed": [asdict(turn) for turn in samples.disturbed],
        },
        "roofline": roofline(side.traffic, test, middle, bandwidth) if bound else None,
    }


def _mean_depth(test: Test) -> float:
    """Tokens in the state in the middle of a tg test."""
    return test.depth + (test.tokens - 1) / 2


def roofline(traffic: Traffic, test: Test, seconds: float, bandwidth: float) -> Report:
    """What memory allows of a decode test whose repetition takes `seconds`."""
    moved = traffic.step(test.batch, _mean_depth(test))
    return {
        "bytes_per_step": moved,
        "bytes_per_token": moved / test.batch,
        "bandwidth": bandwidth,
        "bound_s": moved / bandwidth,
        "percent": 100 * moved / bandwidth / (seconds / test.tokens),
    }


def in_turn(*results: Report) -> list[list[float]]:
    """Seconds of each result in those turns that all of them have."""
    turns = [by_turn(result) for result in results]
    both = set(turns[0]).intersection(*turns)
    return [[seconds for number, seconds in one.items() if number in both] for one in turns]


def ratio_of(ours: Side, mine: Report, other: Side, theirs: Report, test: Test, bandwidth: float) -> Report:
    """Throughput of a side over another's, beside what bytes alone predict."""
    seconds = in_turn(mine, theirs)
    paired = bool(seconds[0]) and not mine["alone"]
    if not paired:
        seconds = [seconds_of(mine), seconds_of(theirs)]
    measured = ratio(seconds[1], seconds[0], paired=paired)
    predicted = limit = None
    depth, weights = _mean_depth(test), ours.traffic.weights
    bandwidth = _rate(mine["provider"], mine["session"], bandwidth)
    if other.baseline_of and not test.prompt:
        predicted = other.traffic.step(test.batch, depth) / ours.traffic.step(test.batch, depth)
    if bandwidth and weights:
        limit = float(np.median(seconds[1])) / (1 if test.prompt else test.tokens) * bandwidth / weights
    notes = {
        "noisy": mine["noisy"] or theirs["noisy"],
        "below what bytes predict: arithmetic or overhead sets the pace, not memory": predicted
        and measured.value < EXPLAINED * predicted,
        "above what bytes predict: the Transformer is further from its roofline": predicted
        and measured.value > predicted / EXPLAINED,
        "too large to be in memory together, so not in turn": mine["alone"],
    }
    return {
        "model": ours.name,
        "baseline": other.name,
        "test": test.name,
        **asdict(test),
        "measured": measured.value,
        "low": measured.low,
        "high": measured.high,
        "predicted": predicted,
        "limit": limit,
        "note": "; ".join(note for note, holds in notes.items() if holds) or None,
    }


def flatness_of(results: Sequence[Report]) -> list[Report]:
    """For each series over depth: the change of time and of peak memory.

    Of depths that took turns the change of time is that of neighbours, so that what slows all of them
    down for a while cancels.
    """
    series: dict[tuple[Any, ...], list[Report]] = defaultdict(list)
    for result in results:
        if not result["way"]:
            series[tuple(result[key] for key in SERIES)].append(result)
    found = []
    for key, members in series.items():
        depths = [member["depth"] for member in members]
        if len(set(depths)) < 2:
            continue
        interleaved, seconds = all(member["interleaved"] for member in members), in_turn(*members)
        paired = interleaved and bool(seconds[0])
        if not paired:
            seconds = [seconds_of(member) for member in members]
        tokens = members[0]["batch"] * members[0]["tokens"]
        each = [[one / tokens for one in member] for member in seconds]
        time = slope_of_samples(depths, each, paired=paired)
        peaks = [target(member)["memory"]["max_ram"] for member in members]
        found.append(
            dict(zip(SERIES, key, strict=True))
            | {
                "depths": sorted(depths),
                "interleaved": interleaved,
                "time": time,
                "memory": None if None in peaks else slope(depths, peaks),
                "flat": time["low"] is not None and abs(time["change"]) <= FLAT,
            }
        )
    return found
