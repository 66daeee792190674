"""Generation against a naive twin that sorts and filters the whole vocabulary."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import dijiang
from dijiang.errors import InputError, SessionError
from dijiang.runtime.options import Generation
from dijiang.runtime.sampling import SHORTLIST, Draws, Sampler, candidates, largest
from dijiang.runtime.snapshot import COUNT, Seam


def naive_distribution(logits, options):
    """Probabilities [vocab] after temperature, top-k, top-p and min-p, one plain step each."""
    scaled = (logits - logits.max()).astype(np.float64) / options.temperature
    p = np.exp(scaled) / np.exp(scaled).sum()
    order = np.argsort(-scaled, kind="stable")
    if options.top_k:
        p[order[options.top_k :]] = 0
        p /= p.sum()
    if options.top_p < 1:
        before = 0.0
        for token in order:
            p[token], before = (p[token] if before < options.top_p else 0), before + p[token]
        p /= p.sum()
    p[p < options.min_p * p.max()] = 0
    return p / p.sum()


filters = st.builds(
    Generation,
    temperature=st.sampled_from([0.1, 0.7, 1.0, 3.0]),
    top_k=st.sampled_from([0, 1, 5, 63, 5000]),
    top_p=st.sampled_from([1e-6, 0.3, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
)


@given(
    options=filters,
    vocab=st.sampled_from([1, 2, 63, 500, SHORTLIST + 1, 4000]),
    spread=st.sampled_from([0.01, 1.0, 5.0]),
    seed=st.integers(0, 99),
)
def test_candidates_have_the_naive_distribution(options, vocab, spread, seed):
    logits = np.random.default_rng(seed).normal(size=vocab).astype(np.float32) * spread
    tokens, weights = candidates(logits, options)
    found = np.zeros(vocab)
    found[tokens] = weights / weights.sum()
    np.testing.assert_allclose(found, naive_distribution(logits, options), atol=1e-9)


@given(
    count=st.sampled_from([1, 2, 7, 50, 500]),
    length=st.sampled_from([1, 17, 500, 1023, 1024, 1025, 9001]),
    distinct=st.sampled_from([2, 10, 10**6]),
    seed=st.integers(0, 99),
)
def test_largest_are_those_of_a_sort(count, length, distinct, seed):
    values = np.random.default_rng(seed).integers(distinct, size=length).astype(np.float32)
    found = largest(values, min(count, length))
    assert len(set(found.tolist())) == min(count, length)
    np.testing.assert_array_equal(values[found], np.sort(values)[::-1][:count])


def test_draws_follow_the_distribution():
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    sampler = Sampler(Generation(temperature=1.0, seed=7), np.zeros(4, bool))
    counts = np.bincount([sampler(logits, at) for at in range(20_000)], minlength=4) / 20_000
    np.testing.assert_allclose(counts, np.exp(logits), atol=0.012)  # 3.4 standard deviations


def test_temperature_zero_takes_the_most_likely_token():
    assert Sampler(Generation(), np.zeros(3, bool))(np.array([1, 3, 2], np.float32), 0) == 1


def test_top_k_one_is_greedy_at_any_temperature():
    sampler = Sampler(Generation(temperature=100.0, top_k=1), np.zeros(50, bool))
    logits = np.random.default_rng(0).normal(size=50).astype(np.float32)
    assert {sampler(logits, at) for at in range(20)} == {int(logits.argmax())}


@pytest.mark.parametrize("logits", [[3.0, 2.9, -1.0], [-1.0, -1.1, -9.0]])
def test_repetition_penalty_lowers_seen_tokens_of_either_sign(logits):
    logits = np.array(logits, np.float32)
    sampler = Sampler(Generation(repetition_penalty=1.5), np.array([True, False, False]))
    assert [sampler(logits, 0), sampler(logits, 1)] == [1, 0]  # then 1 is seen too, and 0 leads again


def test_seed_none_draws_a_new_seed():
    logits = np.zeros(10_000, np.float32)
    draws = {Sampler(Generation(temperature=1.0), np.zeros(10_000, bool))(logits, 0) for _ in range(5)}
    assert len(draws) > 1


def test_draws_are_a_function_of_seed_and_position():
    forwards, backwards = Draws(3), Draws(3)
    found = [forwards(at) for at in range(100)]
    assert [backwards(at) for at in reversed(range(100))] == found[::-1]
    assert len(set(found)) == 100
    assert 0.4 < np.mean(found) < 0.6
    assert Draws(4)(0) != Draws(3)(0)
    assert Draws(2**64 - 1)(2**62) != Draws(0)(2**62)


@pytest.mark.parametrize("lost", [np.nan, np.inf])
def test_logits_that_hold_nan_or_infinity_are_one_error(lost):
    logits = np.array([1, lost, 2], np.float32)
    for options in (Generation(), Generation(temperature=1.0), Generation(temperature=1.0, top_k=2)):
        with pytest.raises(SessionError, match="the logits at position 7 hold NaN"):
            Sampler(options, np.zeros(3, bool))(logits, 7)


@pytest.mark.parametrize(
    ("option", "value"),
    [("top_p", None), ("top_k", 2.5), ("temperature", "1"), ("seed", 1.0), ("top_k", True)],
)
def test_options_of_the_wrong_kind_are_one_error(option, value):
    with pytest.raises(InputError, match=f"{option} is {value!r}, expected a"):
        Generation(**{option: value})


def test_penalties_by_counts_are_those_of_openais_api():
    """mu[j] - c[j] * frequency - (c[j] > 0) * presence, where c counts the tokens of the answer alone."""
    random, options = np.random.default_rng(5), Generation(presence_penalty=0.6, frequency_penalty=0.25)
    sampler, counts = Sampler(options, np.ones(6, bool)), np.zeros(6)
    for position in range(200):
        logits = random.normal(size=6).astype(np.float32)
        expected = int(np.argmax(logits - counts * 0.25 - (counts > 0) * 0.6))
        assert sampler(logits, position) == expected
        counts[expected] += 1
        assert len(sampler.counts) == counts.size * np.dtype(COUNT).itemsize  # each token costs the same
    assert np.frombuffer(sampler.counts, COUNT).tolist() == counts.tolist()
    assert Sampler(Generation(), np.zeros(6, bool)).counts == b""


def test_counts_begin_anew_with_a_prompt(exported):
    model = dijiang.load(exported("tiny-python"))
    hot = {"frequency_penalty": 2.0, "max_tokens": 12, "ignore_eos": True}
    one, two = model.new_state(), model.new_state()
    answer = [r.token for r in model.generate([5, 6], state=one, **hot)]
    list(model.generate([5, 6, *answer[:-1]], state=two, max_tokens=1))  # the same tokens, none of them an answer
    two.leave(0, Seam(answer[-1], 13))
    again = [[r.token for r in model.generate([9], state=state, **hot)] for state in (one, two)]
    assert again[0] == again[1]
    plain = [r.token for r in model.generate([5, 6], max_tokens=12, ignore_eos=True)]
    assert len(set(plain)) < len(set(answer))
