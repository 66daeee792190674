"""Exported graphs against the published code's logits: every case, every graph, every split."""

import numpy as np
import pytest

import dijiang
from tests.conftest import GOLDEN, RUNNABLE, Golden

GATE = 1e-4


def random_pieces(length):
    cuts = np.random.default_rng(length).integers(1, length, 7)
    return np.diff(sorted({0, length, *cuts.tolist()})).tolist()


SPLITS = {
    "whole": lambda length: [length],
    "one-by-one": lambda length: [1] * length,
    "random": random_pieces,
}


def check_logits(model, golden, split):
    """The model's logits, in pieces, against the published ones."""
    state, logits, start = model.new_state(len(golden.ids)), [], 0
    for length in SPLITS[split](golden.ids.shape[1]):
        logits.append(model.forward(golden.ids[:, start : start + length], state, all_logits=True))
        start += length
    assert golden.error(np.concatenate(logits, axis=1)) <= GATE
    assert (state.position == golden.ids.shape[1]).all()


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("graph", RUNNABLE)
@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_bundle_meets_published_logits(exported, name, graph, split):
    check_logits(dijiang.load(exported(name, graph=graph)), Golden.load(name), split)


#: Cases with several sequences, and where their padding is.
PADDED, SIDES = ["neox-base", "neox-trained-decay", "neox-sequential-straddle"], ["left", "right", "scattered"]


def check_padding(model, golden, side):
    """A padded batch against the published logits."""
    batch, length = golden.ids.shape
    lengths = np.array([length, *(length // (3 + row) for row in range(1, batch))])
    random = np.random.default_rng(0)
    ids = random.integers(0, model.spec.vocab_size, (batch, length + 3))
    mask = np.zeros_like(ids)
    for row, count in enumerate(lengths):
        where = {
            "left": np.arange(length + 3 - count, length + 3),
            "right": np.arange(count),
            "scattered": np.sort(random.permutation(length + 3)[:count]),
        }[side]
        ids[row, where], mask[row, where] = golden.ids[row, :count], 1
    state = model.new_state(batch)
    last = model.forward(ids, state, mask=mask)
    expected = golden.logits[np.arange(batch), lengths - 1]
    assert np.abs(last - expected).max() <= GATE
    assert state.position.tolist() == lengths.tolist()
    everything = model.forward(ids, model.new_state(batch), mask=mask, all_logits=True)
    for row, count in enumerate(lengths):
        assert np.abs(everything[row, mask[row] == 1] - golden.logits[row, :count]).max() <= GATE


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("graph", RUNNABLE)
@pytest.mark.parametrize("name", PADDED)
def test_padded_batch_meets_published_logits(exported, name, graph, side):
    check_padding(dijiang.load(exported(name, graph=graph)), Golden.load(name), side)


def test_published_checkpoint_stops_at_its_last_position_and_says_why(exported):
    model = dijiang.load(exported("tiny-python-published"))
    *_, last = model.generate("def main(", max_tokens=1000, ignore_eos=True)
    prompt = last.prompt_tokens
    assert (last.finish_reason, prompt + last.generated) == ("length", 513)  # 512 positions were read
    assert "trained" in last.detail
    assert "512 positions" in last.detail


def test_analytic_decay_lifts_the_position_limit(exported):
    model = dijiang.load(exported("tiny-python-published", decay="analytic"))
    *_, last = model.generate([1, 2, 3], max_tokens=520, ignore_eos=True)
    assert (last.finish_reason, last.generated) == ("limit", 520)
