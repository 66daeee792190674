"""A side of a bench over another."""

from types import SimpleNamespace

import pytest

from dijiang.bench.matrix import Test
from dijiang.bench.results import ratio_of
from dijiang.bench.subject import Traffic


def result(seconds, alone=False):
    latency = {"latency": {"values": seconds}}
    turns = {"turns": list(range(len(seconds)))}
    rest = {"noisy": False, "provider": "CPUExecutionProvider", "session": {}}
    return {"decode": latency, "prefill": None, "contention": turns, "alone": alone} | rest


def side(weights):
    return SimpleNamespace(name="a", baseline_of=None, traffic=Traffic(weights=weights))


@pytest.mark.parametrize(("alone", "measured"), [(False, 2.0), (True, 2.5)])
def test_sides_that_were_not_in_memory_together_are_not_paired(alone, measured):
    """The median of 2, 4.5 and 1.67, or 5 over 2."""
    ours, theirs = result([1.0, 2.0, 3.0], alone), result([2.0, 9.0, 5.0], alone)
    found = ratio_of(side(0), ours, side(0), theirs, Test("tg", 4), 0.0)
    assert found["measured"] == measured
    assert ("too large to be in memory together" in (found["note"] or "")) == alone


def test_limit_of_a_prompt_is_of_all_its_tokens_together():
    """The weights take 2 s: once for a prompt, for each token of a text."""
    sides = side(100), result([1.0]), side(100), result([8.0])
    assert [ratio_of(*sides, Test(kind, 4), 50.0)["limit"] for kind in ("pp", "tg")] == [4.0, 1.0]
