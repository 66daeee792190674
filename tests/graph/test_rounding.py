"""Rounding by blocks, and GPTQ: what codes and scales stand for."""

import numpy as np
import pytest

from dijiang.graph import rounding
from dijiang.graph.rounding import Inputs, hadamard, pack, reverse, rotate, rotate_both, round_gptq, round_nearest


def restored(codes, scales, bits, rows):
    """[in, out] from codes and scales, by the definition."""
    values = (codes.astype(np.float64) - 2 ** (bits - 1)) * scales[..., None]
    return values.reshape(len(codes), -1)[:, :rows].T


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("rows", "columns", "block"), [(64, 3, 32), (63, 1, 16), (500, 7, 128)])
def test_rounded_weight_is_within_half_a_step(rows, columns, block, bits):
    weight = np.random.default_rng(rows).normal(size=(rows, columns)).astype(np.float32)
    codes, scales = round_nearest(weight, bits, block)
    assert codes.shape == (columns, -(-rows // block), block)
    assert codes.max() < 2**bits
    error = np.abs(restored(codes, scales, bits, rows) - weight)
    steps = np.repeat(np.abs(scales), block, axis=1)[:, :rows].T
    if bits == 8:  # only the code +128 is missing: a block's second largest weight may clip to +127
        assert (error <= (1 + 1e-3) * steps).all()
    # At 4 bits the scale is refitted to the codes, and the largest weights (codes at the edge) may clip.
    inner = ((codes > 0) & (codes < 2**bits - 1)).reshape(columns, -1).T[:rows]
    assert (error <= (0.501 if bits == 8 else 0.7) * steps)[inner].all()


def test_search_never_loses_to_the_covering_scale():
    weight = np.random.default_rng(0).normal(size=(256, 40)).astype(np.float32)
    codes, scales = round_nearest(weight, 4, 32)
    blocks = weight.T.reshape(40, 8, 32).astype(np.float64)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(-1)[..., None], -1) / -8
    covered = np.clip(np.rint(blocks / largest), -8, 7) * largest
    found = restored(codes, scales, 4, 256).T.reshape(blocks.shape)
    error, covering = (((x - blocks) ** 2).sum(-1) for x in (found, covered))
    assert (error <= covering * (1 + 1e-5)).all()
    assert error.sum() < 0.95 * covering.sum()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("large", [1e13, 1e20, 1e30, 6e36])
def test_weights_of_any_size_are_rounded_alike(bits, large):
    """Beside blocks of ordinary ones, and of zeros: no square is beyond float32."""
    weight = np.random.default_rng(0).standard_normal((192, 5)).astype(np.float32)
    weight[64:128] = 0
    factors = np.repeat(np.exp2(np.round(np.log2([1, 1, large]))), 64).astype(np.float32)[:, None]
    expected, scales = rounding.round_nearest(weight, bits, 64, rounding.BFLOAT16)
    with np.errstate(over="raise", invalid="raise"):
        codes, found = rounding.round_nearest(weight * factors, bits, 64, rounding.BFLOAT16)
    assert np.array_equal(codes, expected)
    assert np.array_equal(found, scales * factors[::64, 0])


def test_weights_that_are_zero_stay_zero():
    codes, scales = round_nearest(np.zeros((32, 2), np.float32), 4, 16)
    assert (codes == 8).all()
    assert np.isfinite(scales).all()


KINDS = {
    "float32": rounding.FLOAT32,
    "bfloat16": rounding.BFLOAT16,
    "float16": rounding.FLOAT16,
    "positive": rounding.POSITIVE,
}
#: What weight decay leaves of channels that a model does not use.
DEAD = [0, 1e-44, 1e-41, 1e-39, 1e-37]


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("size", DEAD)
def test_dead_weights_have_scales_that_can_be_divided_by(size, bits, kind):
    weight = np.random.default_rng(0).normal(size=(64, 6)).astype(np.float32)
    alive = round_nearest(weight, bits, 16, kind)
    weight[16:32, 2] *= size
    weight[:, 4] *= size
    codes, scales = round_nearest(weight, bits, 16, kind)
    dead = scales == kind.least
    assert dead.sum() == 5
    assert (codes[dead] == 2 ** (bits - 1)).all()
    for found, expected in zip((codes, scales), alive, strict=True):
        assert (found[~dead] == expected[~dead]).all()


@pytest.mark.parametrize("rows", [64, 100])
def test_gptq_changes_the_output_less_than_nearest_values(rows):
    random = np.random.default_rng(1)
    inputs = random.normal(size=(400, rows)) @ random.normal(size=(rows, rows))
    weight = random.normal(size=(rows, 24)).astype(np.float32)
    moment = (inputs.T @ inputs).astype(np.float32)
    error = [
        np.linalg.norm(inputs @ (restored(*rounded, 4, rows) - weight))
        for rounded in (round_nearest(weight, 4, 32), round_gptq(weight, 4, 32, Inputs.of(moment.copy(), 32)))
    ]
    assert error[1] < 0.7 * error[0]


def test_four_bit_codes_lie_two_in_a_byte():
    assert pack(np.array([[[1, 2, 15, 0]]], np.uint8), 4).tolist() == [[[0x21, 0x0F]]]


@pytest.mark.parametrize("kind", list(KINDS.values())[:3], ids=list(KINDS)[:3])
@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-6])
@pytest.mark.parametrize("bits", [4, 8])
def test_scales_are_numbers_that_their_type_has_and_codes_are_the_nearest(bits, size, kind):
    """However they are rounded. In float16 small ones have few bits."""
    weight = (size * np.random.default_rng(2).normal(size=(64, 8))).astype(np.float32)
    inputs = Inputs.of(np.eye(64, dtype=np.float32), 16)
    for codes, scales in (round_nearest(weight, bits, 16, kind), round_gptq(weight, bits, 16, inputs, kind)):
        np.testing.assert_array_equal(scales.astype(kind.dtype).astype(np.float32), scales)
        blocks, bound = rounding.by_blocks(weight, 16), 2 ** (bits - 1)
        exact = np.clip(np.rint(blocks / scales[..., None]), -bound, bound - 1) + bound
        np.testing.assert_allclose(codes, exact, atol=1)
        assert (codes == exact).mean() > 0.99  # but for halves


@pytest.mark.parametrize("kind", list(KINDS.values())[:3], ids=list(KINDS)[:3])
@pytest.mark.parametrize(("rows", "columns", "block", "bits"), [(130, 33, 16, 4), (256, 70, 64, 4), (96, 5, 32, 8)])
def test_compiled_gptq_rounds_as_its_twin(monkeypatch, rows, columns, block, bits, kind):
    random = np.random.default_rng(rows)
    inputs = (random.normal(size=(2 * rows, rows)) @ random.normal(size=(rows, rows))).astype(np.float32)
    inputs[:, :block] = 0  # never seen
    weight, moment = random.normal(size=(rows, columns)).astype(np.float32), inputs.T @ inputs
    for column, size in enumerate(DEAD):
        weight[:, column] *= size
    fast = round_gptq(weight, bits, block, Inputs.of(moment.copy(), block), kind)
    monkeypatch.setattr(rounding, "has_library", lambda: False)
    plain = round_gptq(weight, bits, block, Inputs.of(moment, block), kind)
    assert (fast[0] == plain[0]).mean() > 0.999
    errors = [np.linalg.norm(inputs @ (restored(*found, bits, rows) - weight)) for found in (fast, plain)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-3)
    for codes, scales in (fast, plain):
        assert (np.abs(scales) >= kind.least).all()
        unseen, alive = (restored(codes, scales, bits, rows) - weight)[:block], slice(len(DEAD), None)
        assert (np.abs(unseen)[:, alive] <= 0.25 * np.abs(weight[:block, alive]).max(0)).all()


def textbook(weight, bits, block, moment):
    """GPTQ as it is written: the inverse of the whole moment in float64, one channel after the other."""
    damped = moment.astype(np.float64) + rounding.DAMPING * np.diag(moment).mean() * np.eye(len(moment))
    upper, left, bound = np.linalg.cholesky(np.linalg.inv(damped)).T, weight.T.astype(np.float64), 2 ** (bits - 1)
    codes, scales = np.empty(left.shape), []
    for j in range(len(moment)):
        if j % block == 0:
            here = slice(j, j + block)
            scale = rounding.best_scale(left[:, here].astype(np.float32), bits, np.diag(moment)[here])[1][:, 0]
            scales.append(scale)
        codes[:, j] = np.clip(np.rint(left[:, j] / scale), -bound, bound - 1)
        error = (left[:, j] - codes[:, j] * scale) / upper[j, j]
        left[:, j:] -= error[:, None] * upper[j, j:]
    return (codes + bound).astype(np.uint8).reshape(len(left), -1, block), np.stack(scales, axis=1)


@pytest.mark.parametrize(("rows", "columns", "block", "bits"), [(320, 33, 64, 4), (256, 7, 128, 8), (48, 5, 16, 4)])
def test_stripes_round_as_the_textbook_does(rows, columns, block, bits):
    random = np.random.default_rng(rows)
    inputs = (random.normal(size=(2 * rows, rows)) @ random.normal(size=(rows, rows))).astype(np.float32)
    weight, moment = random.normal(size=(rows, columns)).astype(np.float32), inputs.T @ inputs
    found, expected = (
        round_gptq(weight, bits, block, Inputs.of(moment.copy(), block)),
        textbook(weight, bits, block, moment),
    )
    assert (found[0] == expected[0]).mean() > 0.995
    errors = [np.linalg.norm(inputs @ (restored(*one, bits, rows) - weight)) for one in (found, expected)]
    assert errors[0] == pytest.approx(errors[1], rel=5e-3)


@pytest.mark.parametrize("columns", [1, 5])
def test_gptq_leaves_the_weight_as_it_is(columns):
    """Also where its transpose needs no copy."""
    weight = np.random.default_rng(0).normal(size=(64, columns)).astype(np.float32)
    before = weight.copy()
    round_gptq(weight, 4, 32, Inputs.of(np.eye(64, dtype=np.float32), 32))
    np.testing.assert_array_equal(weight, before)


@pytest.mark.parametrize(("rows", "block"), [(64, 32), (100, 64), (130, 16), (1, 16)])
def test_inputs_are_a_factor_of_the_damped_moment(rows, block):
    x = np.random.default_rng(rows).normal(size=(3 * rows, rows)).astype(np.float32)
    moment = x.T @ x
    inputs, padding = Inputs.of(moment.copy(), block), -rows % block
    expected = np.eye(rows + padding)
    expected[:rows, :rows] = moment + rounding.DAMPING * np.diag(moment).mean() * np.eye(rows)
    factor = inputs.factor.astype(np.float64)
    np.testing.assert_allclose(factor @ factor.T, expected, atol=1e-5 * expected.max())
    assert not np.tril(factor, -1).any()
    np.testing.assert_array_equal(inputs.importance, [*np.diag(moment), *[0] * padding])


@pytest.mark.parametrize("size", [1, 32, 64])
def test_both_sides_of_a_moment_are_mixed_in_place(size):
    x = np.random.default_rng(size).normal(size=(30, 192)).astype(np.float32)
    mixed, moment = rotate(x.T, size).T, x.T @ x
    found = rotate_both(moment, size)
    assert found is moment
    np.testing.assert_allclose(found, mixed.T @ mixed, atol=1e-4)


@pytest.mark.parametrize("size", [1, 2, 7, 300])
def test_matrix_is_reversed_in_place(size):
    matrix = np.random.default_rng(size).normal(size=(size, size)).astype(np.float32)
    expected = matrix[::-1, ::-1].copy()
    assert reverse(matrix) is matrix
    np.testing.assert_array_equal(matrix, expected)


@pytest.mark.parametrize(("rows", "size", "bits"), [(128, 64, 4), (100, 1, 8)])
def test_codes_stand_for_the_weight_that_was_mixed(rows, size, bits):
    weight = np.random.default_rng(rows).normal(size=(rows, 9)).astype(np.float32)
    found = rounding.restored(*round_nearest(rotate(weight, size), bits, 64), bits, rows, size)
    assert found.shape == weight.shape
    assert np.linalg.norm(found - weight) < {4: 0.12, 8: 0.01}[bits] * np.linalg.norm(weight)


def test_rotation_is_exact_and_its_own_inverse():
    random = np.random.default_rng(0)
    x, weight = random.normal(size=(5, 96)).astype(np.float32), random.normal(size=(96, 7)).astype(np.float32)
    mixed = rotate(weight, 32)
    np.testing.assert_allclose(rotate(mixed, 32), weight, atol=1e-6)
    np.testing.assert_allclose(rotate(x.T, 32).T @ mixed, x @ weight, atol=1e-5)
    np.testing.assert_allclose(hadamard(64) @ hadamard(64), np.eye(64), atol=1e-6)


def test_rotation_spreads_a_channel_that_stands_out():
    """What a real model has and random weights have not: int8 of both sides loses less."""
    random = np.random.default_rng(0)
    x, weight = random.normal(size=(64, 256)), random.normal(size=(256, 32))
    x[:, ::64] *= 40
    errors = []
    for size in (1, 64):
        inputs, mixed = rotate(x.T.astype(np.float32), size), rotate(weight.astype(np.float32), size)
        found = [restored(*round_nearest(side, 8, 64), 8, 256) for side in (inputs, mixed)]
        errors.append(np.linalg.norm(found[0].T @ found[1] - x @ weight))
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_are_chosen_by_scales_as_they_are_stored(bits):
    """A scale near 2^-24, the smallest of float16, is rounded by up to a half: codes make up for it."""
    weight = np.random.default_rng(0).normal(size=(256, 8)).astype(np.float32) * 2.0**-18
    codes, scales = round_nearest(weight, bits, 16, rounding.POSITIVE)
    assert (scales == scales.astype(np.float16)).all()
    free = (codes > 0) & (codes < 2**bits - 1)
    left = np.abs(restored(codes, scales, bits, 256) - weight).T.reshape(codes.shape)
    assert (left <= 0.501 * scales[..., None])[free].all()
    assert (
        round_nearest(weight * 2.0**40, bits, 16, rounding.POSITIVE)[1] > 65504
    ).any()  # refused when it is stored
