"""Options of a generation: what they are when nothing is asked for, and how far each of them goes."""

import pytest

import dijiang
from dijiang.runtime.options import Generation, Loading

#: The least and the most, and what lies just beyond.
LIMITS = {
    "max_tokens": (1, 2**40, 0, 2**40 + 1),
    "repetition_penalty": (1e-3, 1e3, 9e-4, 1e3 + 1),
    "presence_penalty": (-2, 2, -2.1, 2.1),
    "frequency_penalty": (-2, 2, -2.1, 2.1),
    "temperature": (0, 1e3, -1e-9, 1e3 + 1e-9),
    "top_p": (1e-9, 1, 0, 1.1),
    "min_p": (0, 1, -0.1, 1.1),
    "seed": (0, 2**64 - 1, -1, 2**64),
}


@pytest.mark.parametrize("name", LIMITS)
def test_options_reach_their_limits_and_no_further(name):
    least, most, below, above = LIMITS[name]
    for value in (least, most):
        assert getattr(Generation(**{name: value}), name) == value
    for value in (below, above):
        with pytest.raises(dijiang.InputError, match=rf"{name} is .*, expected a .*number from .* to "):
            Generation(**{name: value})


def test_without_options_the_most_likely_token_is_taken_128_times_at_most():
    plain = Generation()
    assert plain.is_argmax
    assert (plain.max_tokens, plain.stops, plain.seed) == (128, (), None)


@pytest.mark.parametrize("option", ["temperature", "presence_penalty", "frequency_penalty"])
def test_each_of_these_options_can_change_the_token(option):
    assert not Generation(**{option: 0.5}).is_argmax


def test_only_numbers_have_bounds_in_the_message():
    with pytest.raises(dijiang.InputError, match=r"provider is 3, expected text; change the option"):
        Loading(provider=3)


def test_drawn_seeds_differ_and_a_given_one_stays():
    assert Generation().seeded() != Generation().seeded()
    assert Generation(seed=0).seeded().seed == 0
    attempts = [Generation(seed=seed).attempt(number).seed for seed in (0, 1, 2**64 - 1) for number in range(4)]
    assert attempts[::4] == [0, 1, 2**64 - 1]
    assert len(set(attempts)) == 12
    assert all(0 <= seed < 2**64 for seed in attempts)
