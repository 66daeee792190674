"""Arrays of any layout in memory, and of any library, say what they say."""

import warnings

import numpy as np
import pytest

import dijiang
from tests.conftest import RUNNABLE


def plain(array):
    return array


def transposed(array):
    """Column after column, as of np.stack(..., axis=1).T or a data frame."""
    return np.asfortranarray(array)


def broadcast(array):
    """One row in the memory of all, as of np.broadcast_to or torch's expand."""
    return np.broadcast_to(array[:1], array.shape)


def every_other(array):
    return np.repeat(array, 2, axis=1)[:, ::2]


def backwards(array):
    return np.ascontiguousarray(array[:, ::-1])[:, ::-1]


def as_torch(array):
    torch = pytest.importorskip("torch")
    return torch.tensor(np.ascontiguousarray(array.T)).t()


LAYOUTS = [plain, transposed, broadcast, every_other, backwards, as_torch]
#: Rows are alike, for `broadcast`; padding is on the left, on the right, and between.
IDS = np.tile(np.random.default_rng(3).integers(0, 90, (1, 7)), (4, 1))
MASK = np.tile(np.array([[0, 1, 1, 0, 1, 1, 0]]), (4, 1))


@pytest.mark.parametrize("graph", RUNNABLE)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_forward_reads_ids_and_masks_of_any_layout(exported, graph, layout):
    model = dijiang.load(exported("neox-base", graph=graph))
    for mask in (None, MASK):
        found, expected = model.new_state(4), model.new_state(4)
        given = None if mask is None else layout(mask)
        whole = model.forward(IDS, expected, mask=mask, all_logits=True)
        real = np.ones_like(IDS, bool) if mask is None else mask.astype(bool)
        for _ in range(2):  # the second step of a shape has memory of its own
            state = model.new_state(4)
            logits = model.forward(layout(IDS), state, mask=given, all_logits=True)
            assert np.array_equal(logits[real], whole[real])
        assert np.array_equal(model.forward(layout(IDS), found, mask=given), whole[:, 5 if mask is not None else 6])
        after = np.full((4, 1), 5)
        assert np.array_equal(model.forward(layout(after), found), model.forward(after, expected))
        for mine, theirs in zip(found.layers, expected.layers, strict=True):
            assert np.array_equal(mine, theirs)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_likelihood_and_generation_read_ids_of_any_layout(exported, layout):
    model = dijiang.load(exported("neox-base"))
    nats, best = model.likelihood(IDS, mask=np.ones_like(IDS))
    found, greedy = model.likelihood(layout(IDS), mask=layout(np.ones_like(IDS)))
    assert np.array_equal(found, nats)
    assert np.array_equal(greedy, best)
    assert np.array_equal(model.score(layout(IDS)), nats)
    prompt = layout(IDS)[0]
    tokens = [[record.token for record in model.generate(one, max_tokens=4)] for one in (prompt, IDS[0].tolist())]
    assert tokens[0] == tokens[1]


def test_rows_of_a_state_in_any_layout_are_taken(exported):
    model = dijiang.load(exported("neox-base"))
    state = model.new_state(4)
    model.forward(IDS + np.arange(4)[:, None], state)
    for rows in (np.arange(8)[::2][::-1] // 2, np.broadcast_to(2, 3)):
        taken = state.take(rows)
        assert all(layer.flags.c_contiguous for layer in taken.layers)
        after = model.forward(np.full((len(rows), 1), 5), taken)
        assert np.array_equal(after, model.forward(np.full((4, 1), 5), state.clone())[rows])


@pytest.mark.parametrize("other", [-np.inf, np.nan, 2, -1, 0.5])
def test_mask_of_other_values_is_refused(exported, other):
    """As transformers' additive masks: 0 for what is read there."""
    model = dijiang.load(exported("neox-base"))
    mask = np.ones(IDS.shape)
    mask[1, 2] = other
    with pytest.raises(dijiang.InputError, match=r"the mask holds .*, expected 1, or 0 where a token is padding"):
        model.forward(IDS, model.new_state(4), mask=mask)


def test_tensors_that_numpy_does_not_take_are_one_line(exported):
    torch = pytest.importorskip("torch")
    model, ids = dijiang.load(exported("neox-base")), torch.tensor(IDS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(dijiang.InputError, match="ids are no array"):
            model.forward(ids.bfloat16(), model.new_state(4))
        for mask in (torch.ones(IDS.shape).bfloat16(), torch.ones(IDS.shape, requires_grad=True)):
            with pytest.raises(dijiang.InputError, match="the mask is no array"):
                model.forward(ids, model.new_state(4), mask=mask)


def test_likelihood_need_not_feed_the_last_token(exported):
    """So a text may have one token more than there are positions."""
    model = dijiang.load(exported("tiny-python-published"))
    limit = model.manifest.positions_limit
    ids = np.random.default_rng(4).integers(0, model.spec.vocab_size, (2, limit + 1))
    with pytest.raises(dijiang.InputError, match="past the limit"):
        model.likelihood(ids)
    state = model.new_state(2)
    nats, best = model.likelihood(ids, state, last=False)
    expected, greedy = model.likelihood(ids[:, :limit])
    assert nats.shape == (2, limit)
    assert np.array_equal(nats[:, :-1], expected)
    assert np.array_equal(best[:, :-1], greedy)
    assert state.position.tolist() == [limit, limit]
    with pytest.raises(dijiang.InputError, match="token id -1 is out of range"):
        model.likelihood(np.array([[1, 2, -1]]), last=False)
    mask = np.ones(ids.shape, np.int64)
    mask[1, 300:] = 0
    padded, _ = model.likelihood(ids, mask=mask, last=False)
    assert np.allclose(padded[0], nats[0])
    assert np.allclose(padded[1, :299], nats[1, :299])
