"""What the report of many clients computes."""

import pytest
from load import WATCH, fairness, slope


def test_fairness_is_one_for_equal_shares_and_one_of_n_for_a_single_taker():
    assert fairness([7, 7, 7]) == pytest.approx(1)
    assert fairness([9, 0, 0]) == pytest.approx(1 / 3)
    assert 1 / 3 < fairness([9, 5, 1]) < 1


def test_slope_is_by_the_minute():
    assert slope([5.0, 5.0, 5.0]) == pytest.approx(0)
    assert slope([1.0, 2.0, 3.0]) == pytest.approx(60 / WATCH)
