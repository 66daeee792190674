"""In blocks of integers the native graph's sums are exact: no split and no neighbour changes a bit."""

import numpy as np
import pytest

import dijiang
from tests.conftest import RUNNABLE
from tests.graph.test_families import NAMED, logits_in_pieces
from tests.random_models import write

pytestmark = pytest.mark.skipif("native" not in RUNNABLE, reason="no compiled operator")
LENGTH = 17
SPLITS = {"whole": (), "one-by-one": tuple(range(1, LENGTH)), "pieces": (1, 9, 12)}


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("name", NAMED)
def test_split_and_batch_change_no_bit(name, precision, tmp_path):
    folder = write(tmp_path, NAMED[name], trained=False, seed=2)
    bundle = dijiang.export(
        folder, tmp_path / "b", precision=precision, graph="native", calibration_tokens=0, verify=False
    )
    model = dijiang.load(bundle.path)
    ids = np.random.default_rng(0).integers(0, model.spec.vocab_size, (3, LENGTH))
    every = np.ones_like(ids)
    alone = [logits_in_pieces(model, row[None], (), every[:1]) for row in ids]
    for split, cuts in SPLITS.items():
        found = logits_in_pieces(model, ids, cuts, every)
        for row, expected in enumerate(alone):
            assert np.array_equal(found[row], expected[0]), (split, row)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_prefill_of_the_example_has_the_bits_of_its_steps(exported, precision):
    model = dijiang.load(exported("tiny-python", precision=precision, graph="native", calibration_tokens=0))
    ids = np.random.default_rng(1).integers(0, model.spec.vocab_size, (1, 80))
    whole, steps = (logits_in_pieces(model, ids, cuts, np.ones_like(ids)) for cuts in ((), range(1, 80)))
    assert np.array_equal(whole, steps)
