"""Percentiles, spread, slope over depth and ratios with a confidence interval."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

#: Spread above which a result is not called good.
NOISY = 0.10
#: Resamples of a bootstrap, and the ends of its interval.
RESAMPLES, ENDS = 4000, (2.5, 97.5)
#: Samples below which there is no interval: of one, it would have no width; of three, it would hold 3 in 4 truths.
FEWEST = 5


def describe(seconds: Sequence[float] | np.ndarray) -> dict[str, Any]:
    """Latency in the layout of optimum-benchmark's reports: raw values first, then their summary."""
    values = np.asarray(seconds, np.float64)
    mean, deviation = float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else 0.0
    return {
        "unit": "s",
        "values": [float(f"{v:.6g}") for v in values],
        "count": len(values),
        "total": float(values.sum()),
        "mean": mean,
        **{f"p{p}": float(np.percentile(values, p)) for p in (50, 90, 95, 99)},
        "stdev": deviation,
        "stdev_": 100 * deviation / mean,
    }


def spread(seconds: Sequence[float]) -> float:
    """(p90 - p10) / median of the repetitions."""
    low, middle, high = np.percentile(np.asarray(seconds), (10, 50, 90))
    return float((high - low) / middle)


class Ratio(NamedTuple):
    """A ratio, with the 95 % interval that resampling gives; None: of fewer than FEWEST samples."""

    value: float
    low: float | None
    high: float | None


def ratio(over: Sequence[float], under: Sequence[float], *, paired: bool = False) -> Ratio:
    """How many times `over` is `under`; the interval is a percentile bootstrap.

    paired: the samples were taken in turn: the median of the ratios of neighbours, so that what slows
    both down for a while cancels. Else the ratio of the medians of independent samples.
    """
    a, b = np.asarray(over, np.float64), np.asarray(under, np.float64)
    random = np.random.default_rng(0)
    if paired:
        turns = a[: len(b)] / b[: len(a)]
        value, resampled, fewest = np.median(turns), _medians(random, turns), len(turns)
    else:
        value, resampled = np.median(a) / np.median(b), _medians(random, a) / _medians(random, b)
        fewest = min(len(a), len(b))
    return Ratio(float(value), *_interval(resampled, fewest))


def _interval(resampled: Any, fewest: int) -> tuple[float | None, float | None]:
    """Where 95 % of resampled values are; `fewest`: samples of what has the fewest."""
    if fewest < FEWEST:
        return None, None
    low, high = map(float, np.percentile(resampled, ENDS))
    return low, high


def _medians(random: np.random.Generator, values: np.ndarray) -> Any:
    return np.median(random.choice(values, (RESAMPLES, len(values))), axis=1)


def slope(depths: Sequence[int], values: Sequence[float] | np.ndarray) -> dict[str, Any]:
    """Least-squares line over at least two different depths.

    first, last: depths of the range.  per_1000: change of the value in 1,000 tokens of depth.
    change: change over the whole range, as a fraction of the value at the first depth.
    """
    rise = float(np.polyfit(np.asarray(depths, np.float64), np.asarray(values, np.float64), 1)[0])
    first, last = min(depths), max(depths)
    change = rise * (last - first) / float(values[int(np.argmin(depths))])
    return {"first": first, "last": last, "per_1000": 1000 * rise, "change": change}


def slope_of_samples(depths: Sequence[int], samples: Sequence[Sequence[float]], *, paired: bool) -> dict[str, Any]:
    """The line through the median of the samples at each depth, and the interval (low, high) of its change.

    paired, interval: as of `ratio`; neighbours are the samples at the smallest depth.
    """
    random, first = np.random.default_rng(0), int(np.argmin(depths))
    turns: Any
    if paired:
        count = min(map(len, samples))
        turns = np.array([np.asarray(one, np.float64)[:count] for one in samples])
        turns *= np.median(samples[first]) / turns[first]
        resampled = np.median(turns[:, random.integers(count, size=(RESAMPLES, count))], axis=2)
    else:
        turns = [np.asarray(one) for one in samples]
        resampled = np.array([_medians(random, one) for one in turns])
    rise = np.polyfit(np.asarray(depths, np.float64), resampled, 1)[0]
    changes = rise * (max(depths) - min(depths)) / resampled[first]
    low, high = _interval(changes, min(map(len, turns)))
    return slope(depths, [float(np.median(one)) for one in turns]) | {"low": low, "high": high}
