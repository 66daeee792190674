"""Percentiles, spread, slope over depth and ratios with a confidence interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

#: Spread above which a result is not called good.
NOISY = 0.10
#: Resamples of a bootstrap.
RESAMPLES = 4000


def describe(seconds: Sequence[float] | np.ndarray) -> dict[str, Any]:
    """Latency in the layout of optimum-benchmark's reports: raw values first, then their summary."""
    values = np.asarray(seconds, np.float64)
    p50, p90, p95, p99 = (float(np.percentile(values, p)) for p in (50, 90, 95, 99))
    deviation = float(values.std(ddof=1)) if len(values) > 1 else 0.0
    return {
        "unit": "s",
        "values": [float(f"{v:.6g}") for v in values],
        "count": len(values),
        "total": float(values.sum()),
        "mean": float(values.mean()),
        "p50": p50,
        "p90": p90,
        "p95": p95,
        "p99": p99,
        "stdev": deviation,
        "stdev_": 100 * deviation / float(values.mean()),
    }


def spread(seconds: Sequence[float]) -> float:
    """(p90 - p10) / median of the repetitions."""
    low, middle, high = np.percentile(np.asarray(seconds), (10, 50, 90))
    return float((high - low) / middle)


@dataclass(frozen=True)
class Slope:
    """A straight line through (depth, value).

    first, last: depths of the range.  per_1000: change of the value in 1,000 tokens of depth.
    change: change over the whole range, as a fraction of the value at the first depth.
    """

    first: int
    last: int
    per_1000: float
    change: float


def slope(depths: Sequence[int], values: Sequence[float]) -> Slope:
    """Least-squares line over at least two different depths."""
    rise = float(np.polyfit(np.asarray(depths, np.float64), np.asarray(values, np.float64), 1)[0])
    first, last = min(depths), max(depths)
    return Slope(first, last, 1000 * rise, rise * (last - first) / values[int(np.argmin(depths))])


@dataclass(frozen=True)
class Ratio:
    """A ratio, with the 95 % interval that resampling gives."""

    value: float
    low: float
    high: float


def ratio(over: Sequence[float], under: Sequence[float], *, paired: bool = False, seed: int = 0) -> Ratio:
    """How many times `over` is `under`; the interval is a percentile bootstrap.

    paired: the samples were taken in turn: the median of the ratios of neighbours, so that what slows
    both down for a while cancels. Else the ratio of the medians of independent samples.
    """
    a, b = np.asarray(over, np.float64), np.asarray(under, np.float64)
    random = np.random.default_rng(seed)

    def medians(values: np.ndarray) -> np.ndarray:
        found: np.ndarray = np.median(random.choice(values, (RESAMPLES, len(values))), axis=1)
        return found

    if paired:
        count = min(len(a), len(b))
        turns = a[:count] / b[:count]
        value, resampled = float(np.median(turns)), medians(turns)
    else:
        value, resampled = float(np.median(a) / np.median(b)), medians(a) / medians(b)
    low, high = np.percentile(resampled, (2.5, 97.5))
    return Ratio(value, float(low), float(high))


def slope_of_samples(
    depths: Sequence[int], samples: Sequence[Sequence[float]], *, paired: bool, seed: int = 0
) -> tuple[Slope, float, float]:
    """The line through the median of the samples at each depth, and the interval of its change.

    paired, interval: as of `ratio`; neighbours are the samples at the smallest depth.
    """
    random, first = np.random.default_rng(seed), int(np.argmin(depths))
    start = float(np.median(samples[first]))
    if paired:
        count = min(map(len, samples))
        turns = np.array([np.asarray(one, np.float64)[:count] for one in samples])
        turns *= start / turns[first]
        resampled = np.median(turns[:, random.integers(count, size=(RESAMPLES, count))], axis=2)
        levels = np.median(turns, axis=1)
    else:
        levels = np.array([np.median(one) for one in samples])
        resampled = np.array([np.median(random.choice(s, (RESAMPLES, len(s))), axis=1) for s in samples])
    rise = np.polyfit(np.asarray(depths, np.float64), resampled, 1)[0]
    changes = rise * (max(depths) - min(depths)) / resampled[first]
    low, high = np.percentile(changes, (2.5, 97.5))
    return slope(depths, levels.tolist()), float(low), float(high)
