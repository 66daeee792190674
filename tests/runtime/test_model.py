"""Model.forward: any split gives the same logits; states are values; bad input touches nothing."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dijiang
from tests.conftest import RUNNABLE, Golden


@pytest.fixture(scope="module")
def model(exported):
    return dijiang.load(exported("neox-base"))


@pytest.fixture(scope="module")
def ids():
    return Golden.load("neox-base").ids


@pytest.fixture(scope="module")
def whole(model, ids):
    return model.forward(ids, model.new_state(len(ids)), all_logits=True)


@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_any_split_gives_the_same_logits_and_state(model, ids, whole, data):
    length = ids.shape[1]
    cuts = data.draw(st.sets(st.integers(1, length - 1), max_size=8))
    state = model.new_state(len(ids))
    edges = [0, *sorted(cuts), length]
    parts = [model.forward(ids[:, start:stop], state, all_logits=True) for start, stop in pairwise(edges)]
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, atol=2e-5)
    assert state.position.tolist() == [length] * len(ids)


@pytest.mark.parametrize("length", [1, 63, 64, 65, 128, 200])
def test_long_prompts_go_through_in_pieces(model, monkeypatch, length):
    monkeypatch.setattr(model.session, "longest", 64, raising=False)
    prompt = np.random.default_rng(length).integers(0, model.spec.vocab_size, (2, length))
    state = model.new_state(2)
    last = model.forward(prompt, state)
    steps = model.new_state(2)
    for token in range(length):
        expected = model.forward(prompt[:, token : token + 1], steps)
    np.testing.assert_allclose(last, expected, atol=2e-5)
    for found, step in zip(state.layers, steps.layers, strict=True):
        np.testing.assert_allclose(found, step, atol=1e-5)


def test_last_logits_are_the_last_row_of_all_logits(model, ids, whole):
    last = model.forward(ids, model.new_state(len(ids)))
    assert (last.shape, last.dtype) == ((len(ids), model.spec.vocab_size), np.float32)
    np.testing.assert_array_equal(last, whole[:, -1])


def test_returned_logits_survive_the_next_step(model):
    state = model.new_state()
    first = model.forward(np.array([[1]]), state)
    kept = first.copy()
    model.forward(np.array([[2]]), state)
    np.testing.assert_array_equal(first, kept)


def test_two_states_do_not_mix(model, ids):
    a, b = model.new_state(), model.new_state()
    for token in range(20):  # in turn, on one session
        from_a = model.forward(ids[:1, token : token + 1], a)
        from_b = model.forward(ids[1:2, token : token + 1], b)
    for row, found in ((ids[:1, :20], from_a), (ids[1:2, :20], from_b)):
        np.testing.assert_allclose(found, model.forward(row, model.new_state()), atol=2e-5)


def test_clone_forks_a_sequence(model, ids):
    state = model.new_state()
    model.forward(ids[:1, :10], state)
    fork = state.clone()
    one = model.forward(ids[:1, 10:20], state)
    other = model.forward(ids[:1, 10:20], fork)
    np.testing.assert_array_equal(one, other)
    assert not any(np.shares_memory(a, b) for a, b in zip(state.layers, fork.layers, strict=True))


def test_state_has_the_same_size_at_any_position(model, ids):
    state = model.new_state(len(ids))
    before = state.nbytes
    model.forward(ids, state)
    assert state.nbytes == before == len(ids) * model.spec.state_bytes


BAD = {
    "too large": (lambda v: [[v]], r"token id \d+ is out of range, expected 0 to"),
    "negative": (lambda _: [[3, -1]], "token id -1 is out of range"),
    "empty": (lambda _: np.empty((1, 0), int), "no tokens, expected at least one"),
    "flat": (lambda _: [1, 2], r"expected integers \[batch, tokens\]"),
    "floats": (lambda _: [[1.5]], "ids are float64"),
    "batch": (lambda _: [[1], [2]], r"use new_state\(2\)"),
    "ragged": (lambda _: [[1, 2], [3]], "ids are no array"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_ids_are_refused_and_the_state_is_untouched(model, case):
    make, message = BAD[case]
    state = model.new_state()
    model.forward(np.array([[5]]), state)
    before = state.clone()
    with pytest.raises(dijiang.InputError, match=message):
        model.forward(make(model.spec.vocab_size), state)
    assert state.position.tolist() == before.position.tolist()
    for now, then in zip(state.layers, before.layers, strict=True):
        np.testing.assert_array_equal(now, then)


@pytest.mark.parametrize("shape", [(2, 4), (2, 2), (3, 3), (1, 3)])
def test_mask_of_another_shape_is_refused(model, shape):
    with pytest.raises(dijiang.InputError, match=rf"ids \[2, 3\] with mask \[{shape[0]}, {shape[1]}\] and a state"):
        model.forward(np.ones((2, 3), int), model.new_state(2), mask=np.ones(shape, int))


def test_padding_alone_is_refused(model):
    with pytest.raises(dijiang.InputError, match="sequence 1 is all padding"):
        model.forward(np.ones((2, 3), int), model.new_state(2), mask=np.array([[1, 1, 1], [0, 0, 0]]))


def test_state_of_another_model_is_refused(model, exported):
    other = dijiang.load(exported("tiny-python"))
    with pytest.raises(dijiang.InputError, match="state is of another model"):
        model.forward(np.array([[1]]), other.new_state())


def test_positions_past_the_limit_are_refused_before_any_work(exported):
    model = dijiang.load(exported("tiny-python-published"))
    limit = model.manifest.positions_limit
    state = model.new_state()
    model.forward(np.ones((1, limit), int), state)
    with pytest.raises(dijiang.InputError, match=rf"position {limit + 1} is past the limit {limit}"):
        model.forward(np.array([[1]]), state)
    assert state.position[0] == limit


def test_batch_of_nothing_is_refused(model):
    with pytest.raises(dijiang.InputError, match="batch is 0, expected at least 1"):
        model.new_state(0)


def test_prompt_text_needs_a_tokenizer(model):
    assert not model.has_tokenizer
    with pytest.raises(dijiang.InputError, match="no tokenizer in the bundle; pass token ids"):
        model.generate("text")


@pytest.mark.parametrize("graph", RUNNABLE)
def test_bound_step_is_forward_of_one_token(exported, graph):
    model = dijiang.load(exported("tiny-python", graph=graph))
    states = [model.new_state(2) for _ in range(2)]
    prompt = np.array([[7, 8, 9], [1, 2, 3]])
    for state in states:
        model.forward(prompt, state)
    for token in (1, 30, 5):
        ids = np.array([[token], [token + 1]])
        expected = model.forward(ids, states[0])
        step = model.session.step(states[1])
        step.ids[...], step.positions[:, 0] = ids, states[1].position
        output = model.session.run(step, states[1])
        assert (output.logits[:, 0] == expected).all()
        assert output.tokens[:, 0].tolist() == expected.argmax(-1).tolist()
        assert states[0].position.tolist() == states[1].position.tolist()
    for expected, found in zip(*(s.layers for s in states), strict=True):
        assert (found == expected).all()


def test_bound_step_goes_on_where_the_state_was_moved_to(exported):
    """Another state, a masked step and a set position in between leave it right."""
    model = dijiang.load(exported("tiny-python"))
    state, other = model.new_state(), model.new_state()
    model.forward(np.array([[3]]), other)
    model.forward(np.array([[5]]), state)
    model.forward(np.array([[6]]), state, mask=np.array([[0]]))
    state.position[:] = 40
    twin = state.clone()
    step = model.session.step(state)
    step.ids[...], step.positions[...] = 8, 40
    found = model.session.run(step, state).logits[:, 0].copy()
    assert (found == model.forward(np.array([[8]]), twin)).all()
    assert state.position == twin.position == 41


def test_ids_under_padding_are_never_looked_up(model):
    ids, mask = np.array([[10**9, 5, 6]]), np.array([[0, 1, 1]])
    found = model.forward(ids, model.new_state(), mask=mask)
    np.testing.assert_allclose(found, model.forward(ids[:, 1:], model.new_state()), atol=2e-5)


@pytest.mark.parametrize("length", [2, 3, 64, 65, 150])
def test_score_is_the_log_softmax_of_forward(model, monkeypatch, length):
    monkeypatch.setattr(model.session, "longest", 64, raising=False)
    ids = np.random.default_rng(length).integers(0, model.spec.vocab_size, (2, length))
    logits = model.forward(ids, model.new_state(2), all_logits=True).astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    found = model.score(ids)
    assert found.shape == (2, length - 1)
    for row in range(2):
        wanted = [expected[row, t, ids[row, t + 1]] for t in range(length - 1)]
        np.testing.assert_allclose(found[row], wanted, atol=1e-5)


def test_score_needs_two_tokens(model):
    with pytest.raises(dijiang.InputError, match="2 or more tokens"):
        model.score([[1]])


def test_likelihood_is_that_of_each_text_alone(model, ids, monkeypatch):
    monkeypatch.setattr(model.session, "longest", 7, raising=False)
    lengths, rows = [20, 7, 2], [0, 1, 0]
    mask = np.arange(20) < np.array(lengths)[:, None]
    batch = np.where(mask, ids[rows, :20], -1)  # what stands under padding does not matter
    state = model.new_state(3)
    nats, best = model.likelihood(batch, state, mask=mask)
    assert state.position.tolist() == lengths
    for row, length in enumerate(lengths):
        alone = ids[rows[row], :length][None]
        logits = model._forward(alone, model.new_state(), all_logits=True)[:, :-1].astype(np.float64)
        expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        chosen = np.take_along_axis(expected, alone[:, 1:, None], -1)[0, :, 0]
        np.testing.assert_allclose(nats[row, : length - 1], chosen, atol=1e-5)
        np.testing.assert_array_equal(best[row, : length - 1], logits[0].argmax(-1) == alone[0, 1:])
        np.testing.assert_allclose(model.score(alone)[0], chosen, atol=1e-5)


def test_likelihood_looks_at_few_logits_at_a_time(model, ids, monkeypatch):
    expected = model.score(ids[:, :30])
    seen, forward = [], model._forward

    def counted(*given, **options):
        seen.append(forward(*given, **options))
        return seen[-1]

    monkeypatch.setattr(model, "_forward", counted)
    monkeypatch.setattr("dijiang.runtime.model.LOGITS", 4 * len(ids) * model.spec.vocab_size)
    np.testing.assert_allclose(model.score(ids[:, :30]), expected, atol=1e-5)
    assert [logits.shape[1] for logits in seen] == [4] * 7 + [2]
    monkeypatch.setattr("dijiang.runtime.model.LOGITS", 1)
    np.testing.assert_allclose(model.score(ids[:, :5]), expected[:, :4], atol=1e-5)


def test_a_greedy_text_is_the_most_likely_everywhere(model):
    prompt = [1, 2, 3]
    found = [record.token for record in model.generate(prompt, max_tokens=9, ignore_eos=True)]
    assert model.likelihood([prompt + found])[1][0, 2:].all()
    assert not model.likelihood([[*prompt, (found[0] + 1) % model.spec.vocab_size]])[1][0, 2]


def test_greedy_is_the_very_likeliest(exported, monkeypatch):
    model = dijiang.load(exported("neox-base"))
    ids, forward = np.array([[5, 6, 7]]), model._forward

    def close(*given, **more):
        logits = forward(*given, **more)
        logits[...] = 0
        logits[0, 0, 6] = -1e-3
        return logits

    monkeypatch.setattr(model, "_forward", close)
    assert model.likelihood(ids)[1].tolist() == [[False, True]]
