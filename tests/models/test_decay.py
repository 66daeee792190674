"""Decay analysis: u and w make the recurrence exact; damaged tables are recovered or refused."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import dijiang
from dijiang.models.decay import analyse, initial_gamma, position_limit, without_tables
from dijiang.models.load import load_checkpoint
from tests.conftest import GOLDEN
from tests.graph.test_families import NAMED
from tests.random_models import POSITIONS, write

DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16]


def tables(heads, positions, dtype=np.float32, gamma=None):
    gamma = initial_gamma(heads) if gamma is None else gamma
    t = np.arange(positions)
    with np.errstate(over="ignore"):
        return tuple((gamma[:, None] ** p).astype(np.float32).astype(dtype) for p in (t, -t))


def test_initial_gamma_of_one_and_eight_heads():
    assert initial_gamma(1) == pytest.approx([1 - 1 / 32])
    eight = initial_gamma(8)
    assert (eight[0], eight[-1]) == pytest.approx((1 - 1 / 32, 1 - 1 / 512))
    assert (np.diff(eight) > 0).all()


@pytest.mark.parametrize("positions", [1, 63, 512, 2048])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
def test_untouched_tables_are_analytic_in_every_dtype(dtype, positions):
    d1, d2 = tables(8, positions, dtype)
    found = analyse(d1, d2, layer=0)
    assert found.kind == "analytic"
    np.testing.assert_array_equal(found.gamma, initial_gamma(8))


def test_overflown_half_precision_tables_are_recovered_and_noted():
    d1, d2 = tables(8, 400, np.float16)
    assert np.isinf(d2).any()
    found = analyse(d1, d2, layer=3)
    assert found.kind == "analytic"
    assert "layer 3" in found.notes[0]
    assert "recovered" in found.notes[0]


@pytest.mark.parametrize("table", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=lambda d: np.dtype(d).name)
def test_value_off_by_its_last_bit_was_trained_and_is_kept(dtype, table):
    """An optimizer cannot move a value of 16 bits by less. 40 positions of it moved logits by up to 2 %."""
    stored = tables(8, 63, dtype)
    stored[table].view(np.uint16)[2, 30] += 1
    found = analyse(*stored, layer=0)
    assert found.kind == "tabled"
    power = found.gamma[2] ** 30.0
    assert (found.u[2, 30] * power, found.w[2, 30] / power) == pytest.approx([float(x[2, 30]) for x in stored])


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
def test_gamma_that_was_rounded_before_its_powers_were_taken_is_fitted(dtype):
    """As in a model that was made in 16 bits."""
    gamma = initial_gamma(8).astype(dtype).astype(np.float64)
    found = analyse(*tables(8, 900, dtype, np.minimum(gamma, 1 - 2.0**-8)), layer=0)
    assert found.kind == "analytic"
    np.testing.assert_allclose(found.gamma, np.minimum(gamma, 1 - 2.0**-8), rtol=1e-5)


def test_other_analytic_gamma_is_fitted():
    gamma = np.array([0.9, 0.95, 0.999])
    found = analyse(*tables(3, 200, gamma=gamma), layer=0)
    assert found.kind == "analytic"
    np.testing.assert_allclose(found.gamma, gamma, rtol=1e-6)


@given(seed=st.integers(0, 1000), heads=st.sampled_from([1, 3, 8]), positions=st.sampled_from([2, 63]))
def test_u_and_w_with_gamma_give_back_trained_tables(seed, heads, positions):
    random = np.random.default_rng(seed)
    d1, d2 = (t * random.normal(size=t.shape).astype(np.float32) for t in tables(heads, positions))
    found = analyse(d1, d2, layer=0)
    t = np.arange(positions)
    np.testing.assert_allclose(found.u * found.gamma[:, None] ** t, d1, rtol=1e-9)
    np.testing.assert_allclose(found.w * found.gamma[:, None] ** -t, d2, rtol=1e-9)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_tables_of_ones_are_no_decay(dtype):
    """Any gamma near 1 fits, and would forget."""
    found = analyse(np.ones((3, 512), dtype), np.ones((3, 512), dtype), layer=0)
    assert found.kind == "analytic"
    assert found.gamma.tolist() == [1.0] * 3


def test_fitted_gamma_is_one_that_float32_has_where_the_tables_allow_it():
    powers = 0.9987 ** np.arange(200.0)[None]
    for dtype in (ml_dtypes.bfloat16, np.float16, np.float32):  # the last two know it better than that
        found = analyse(powers.astype(dtype), (1 / powers).astype(dtype), layer=0)
        assert found.kind == "analytic"
        assert (found.gamma[0] == float(np.float32(found.gamma[0]))) == (dtype == ml_dtypes.bfloat16)
        assert found.gamma[0] == pytest.approx(0.9987, rel=1e-4)


def test_analytic_heads_of_a_mixed_layer_have_scales_of_one():
    d1, d2 = tables(4, 100)
    d1[2, 5] *= 1.5
    found = analyse(d1, d2, layer=0)
    assert found.kind == "tabled"
    np.testing.assert_array_equal(found.u[[0, 1, 3]], 1)
    assert found.u[2, 5] == pytest.approx(1.5)


def test_lost_values_of_a_trained_head_need_consent():
    d1, d2 = tables(8, 400, np.float16)
    d1[0, :10] *= np.float16(1.5)
    lost = int(np.argmax(np.isinf(d2[0])))
    with pytest.raises(dijiang.DecayError, match=f"D2 of head 0 is infinite from position {lost}"):
        analyse(d1, d2, layer=1)
    repaired = analyse(d1, d2, layer=1, repair=True)
    assert repaired.w[0, lost] == 1
    assert "--repair-decay" in repaired.notes[0]


def test_repair_of_tables_that_are_lost_to_both_ends_leaves_plain_decay_there():
    """At 32,768 positions float64 has lost gamma^t, too."""
    with np.errstate(over="ignore", under="ignore"):
        d1, d2 = tables(4, 32_768)
    d1[0, 5] *= 1.5
    found = analyse(d1, d2, layer=0, repair=True)
    assert (found.kind, found.u[0, 5]) == ("tabled", pytest.approx(1.5))
    np.testing.assert_array_equal([found.u[0, -1], found.w[0, -1]], 1)


def test_nan_is_refused():
    d1, d2 = tables(2, 10)
    d1[1, 3] = np.nan
    with pytest.raises(dijiang.DecayError, match="layer 5: D1 or D2 holds NaN"):
        analyse(d1, d2, layer=5, repair=True)


def test_tables_without_a_bounded_state_are_refused():
    d1, d2 = tables(1, 2048)
    d1[0] = 3e38
    with pytest.raises(dijiang.DecayError, match="no bounded state"):
        analyse(d1, d2, layer=0)


def test_position_limit_is_that_of_the_shortest_table():
    analytic = analyse(*tables(2, 50), layer=0)
    d1, d2 = tables(2, 40)
    tabled = analyse(d1 * 2, d2, layer=0)
    assert position_limit([analytic, analytic]) is None
    assert position_limit([analytic, tabled]) == 40


def test_dropping_the_tables_lifts_the_limit():
    d1, d2 = tables(2, 40)
    dropped = without_tables(d1 * 2, d2)
    assert dropped.kind == "analytic"
    np.testing.assert_array_equal(dropped.gamma, initial_gamma(2))


def test_export_of_damaged_tables_says_how_to_go_on(edit_tensors, tmp_path):
    def damage(tensors):
        tensors["gpt_neox.layers.0.attention.D2"][0, 1, 20:] = np.inf
        tensors["gpt_neox.layers.0.attention.D1"][0, 1, 3] *= 2

    broken = edit_tensors("neox-base", damage)
    with pytest.raises(dijiang.DecayError, match=r"layer 0.*--repair-decay"):
        dijiang.export(broken, tmp_path / "b")
    bundle = dijiang.export(broken, tmp_path / "b", repair_decay=True)
    assert bundle.manifest.decay == "repaired"
    assert "key scales set to 1" in bundle.manifest.warnings[0]


def test_leave_to_repair_changes_nothing_where_nothing_is_lost(tmp_path):
    plain = dijiang.export(GOLDEN["neox-trained-decay"], tmp_path / "a", verify=False)
    asked = dijiang.export(GOLDEN["neox-trained-decay"], tmp_path / "b", verify=False, repair_decay=True)
    assert asked.manifest.decay == "exact"
    assert asked.manifest.fingerprint == plain.manifest.fingerprint


def test_half_precision_golden_case_says_what_was_recovered(exported):
    bundle = dijiang.load(exported("neox-fp16-bin")).bundle
    assert bundle.manifest.positions_limit is None
    assert any("recovered" in warning for warning in bundle.manifest.warnings)


def test_why_positions_end(tmp_path):
    trained = load_checkpoint(GOLDEN["neox-trained-decay"])
    assert f"were trained, or rounded, and stored for {trained.positions_limit} positions" in trained.limit_reason
    free = load_checkpoint(GOLDEN["neox-trained-decay"], decay="analytic")
    assert (free.positions_limit, free.limit_reason) == (None, None)
    learned = load_checkpoint(write(tmp_path, NAMED["opt-350m-like"]))
    assert learned.limit_reason == f"this model has learned embeddings for {POSITIONS} positions"
