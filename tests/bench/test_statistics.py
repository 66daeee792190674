"""Figures against their definitions."""

import numpy as np
import pytest

from dijiang.bench.statistics import FEWEST, describe, ratio, slope, slope_of_samples, spread
from dijiang.bench.subject import Traffic


def test_describe_keeps_raw_values_and_their_summary():
    values = [4.0, 1.0, 2.0, 3.0]
    found = describe(values)
    assert (found["values"], found["count"], found["total"]) == (values, 4, 10.0)
    assert (found["mean"], found["p50"]) == (2.5, 2.5)
    assert found["p99"] == pytest.approx(3.97)
    assert found["stdev"] == pytest.approx(np.std(values, ddof=1))
    assert describe([7.0])["stdev"] == 0


def test_spread_leaves_a_tenth_out_on_each_side():
    assert spread(list(np.arange(0, 101) / 100 + 1)) == pytest.approx(0.8 / 1.5)
    assert spread([2.0] * 10) == 0


def test_slope_of_a_line_is_exact():
    line = slope([2000, 4000, 8000], [10.0, 10.5, 11.5])
    assert (line["first"], line["last"]) == (2000, 8000)
    assert line["per_1000"] == pytest.approx(0.25)
    assert line["change"] == pytest.approx(0.15)


def test_slope_in_turn_cancels_what_slows_all_depths_down():
    drift = np.exp(np.random.default_rng(0).standard_normal(30))
    samples = [1.00 * drift, 1.02 * drift[:20], 1.08 * drift]
    line = slope_of_samples([0, 2000, 8000], samples, paired=True)
    assert (line["change"], line["low"], line["high"]) == pytest.approx((0.08, 0.08, 0.08))
    assert line["per_1000"] == pytest.approx(0.01 * np.median(drift))
    line = slope_of_samples([0, 2000, 8000], samples, paired=False)
    assert line["low"] < -0.2 < 0.4 < line["high"]


def test_interval_of_a_slope_covers_the_truth_and_narrows():
    random, widths = np.random.default_rng(1), []
    for paired in (False, True):
        samples = [random.normal(level, 0.01, 40) for level in (1.0, 1.05, 1.1)]
        line = slope_of_samples([1, 2, 3], samples, paired=paired)
        assert line["low"] < 0.1 < line["high"]
        assert line["low"] <= line["change"] <= line["high"]
        widths.append(line["high"] - line["low"])
        few = slope_of_samples([1, 2, 3], [one[:10] for one in samples], paired=paired)
        assert few["high"] - few["low"] > widths[-1]


def test_ratio_interval_covers_the_truth_and_narrows():
    random = np.random.default_rng(0)
    few, many = (ratio(random.normal(3, 0.1, n), random.normal(2, 0.1, n)) for n in (10, 1000))
    for found in (few, many):
        assert found.low < 1.5 < found.high
        assert found.low <= found.value <= found.high
    assert many.high - many.low < few.high - few.low


@pytest.mark.parametrize("batch", [1, 16])
def test_bytes_of_a_step(batch):
    dijiang = Traffic(weights=1000, rows=8, state=50)
    transformer = Traffic(weights=900, rows=8, cache=2)
    assert dijiang.step(batch, 500) == 1000 + batch * (8 + 2 * 50)
    assert transformer.step(batch, 500) == 900 + batch * (8 + 500 * 2 + 2)
    assert dijiang.step(batch, 0) == dijiang.step(batch, 10**7)
    assert transformer.resident(batch, 500) == batch * 1000


def test_paired_ratio_cancels_what_slows_both_down():
    drift = np.exp(np.random.default_rng(0).standard_normal(30))
    paired = ratio(3 * drift, 2 * drift, paired=True)
    assert (paired.value, paired.low, paired.high) == pytest.approx((1.5, 1.5, 1.5))
    alone = ratio(3 * drift, 2 * drift)
    assert alone.low < 1.4 < 1.6 < alone.high


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("count", [FEWEST, 10])
def test_interval_holds_the_truth_nine_times_in_ten(paired, count):
    random = np.random.default_rng(0)
    held = [
        found.low <= 1 <= found.high
        for found in (ratio(*random.normal(1, 0.05, (2, count)), paired=paired) for _ in range(200))
    ]
    assert np.mean(held) >= 0.9


def test_fewer_samples_have_no_interval():
    assert FEWEST == 5
    for count in range(1, FEWEST):
        short, long = [1.0 + 0.1 * at for at in range(count)], [1.0] * 10
        for pair in ((short, long), (long, short)):
            assert ratio(*pair)[1:] == ratio(*pair, paired=True)[1:] == (None, None)
        for paired in (True, False):
            line = slope_of_samples([0, 9], [short, long], paired=paired)
            assert (line["low"], line["high"]) == (None, None)
            assert np.isfinite(line["change"])


def test_paired_ratio_leaves_out_what_has_no_partner():
    assert ratio([3.0, 3.0], [2.0, 2.0, 9.0], paired=True).value == 1.5
