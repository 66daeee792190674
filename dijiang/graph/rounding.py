"""Rounding weights by blocks: w = code * scale, one scale for `block` consecutive input channels.

Codes run from -2^(bits-1) to 2^(bits-1) - 1. Where the scale's sign is free, the largest weight of a
block, whatever its own sign, takes the code that exists on one side only. Where a scale must be
positive, as TensorRT demands, it takes the largest code of both sides. Scales are float32 arrays, of numbers
that the type has in which they are stored: codes are chosen for those.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
from scipy.linalg import lapack

from ..machine.limits import usable_cores
from ..runtime.operators import gptq, has_library
from .builder import row_major

Array = np.ndarray
#: Starting scales tried at 4 bits, as factors of the one that just covers the largest weight.
STARTS = (1.0, 0.94, 0.88, 0.82)
#: Output channels that one thread rounds at once: bounds the temporaries.
ROWS = 64
#: The same for GPTQ.
OUTPUTS = 256
#: Columns that are mixed at once: they stay in the processor's cache.
COLUMNS = 2048
#: Input channels that GPTQ corrects one by one; what they lost reaches those behind them in one product.
STRIPE = 128

#: Scales beyond which blocks are looked at in units of their own.
LARGE = 1e12
#: Added to the second moment's diagonal, in means of it: channels that were never seen stay solvable.
DAMPING = 0.01


@dataclass(frozen=True)
class ScaleType:
    """How scales are stored.

    number: what the compiled library calls it.
    least: blocks of a smaller scale are dead. They take this one, which has an inverse in float32, and with which
        kernels that sum in floats add nothing.
    positive: scales have no sign.
    """

    dtype: Any
    number: int
    least: float = 2.0**-119
    positive: bool = False


FLOAT32 = ScaleType(np.float32, 0)
BFLOAT16 = ScaleType(ml_dtypes.bfloat16, 1)
FLOAT16 = ScaleType(np.float16, 2, 2.0**-24)
POSITIVE = replace(FLOAT16, positive=True)


def covering_scale(blocks: Array, bits: int, scales: ScaleType) -> Array:
    """The scale [..., 1] at which a block's largest weight takes its code (see above); the smallest at least."""
    low, high = blocks.min(-1, keepdims=True), blocks.max(-1, keepdims=True)
    bound = 2.0 ** (bits - 1)
    signed, unsigned = np.where(-low >= high, low, high) / -bound, np.maximum(-low, high) / (bound - 1)
    scale = (unsigned if scales.positive else signed).astype(np.float32)
    least = np.float32(scales.least)
    return np.where(np.abs(scale) < least, least, scale)


def stored_scale(scale: Array, scales: ScaleType) -> Array:
    """Scales float32 as their stored type holds them; one beyond it is refused when it is stored."""
    most = float(ml_dtypes.finfo(scales.dtype).max)
    held = np.clip(scale, -most, most).astype(scales.dtype).astype(np.float32)
    return np.where(np.abs(scale) > most, scale, held)


def codes_of(blocks: Array, scale: Array, bits: int) -> Array:
    """Nearest codes, float32 integers."""
    bound = 2 ** (bits - 1)
    codes: Array = blocks * (1 / scale)
    np.rint(codes, out=codes)
    return np.clip(codes, -bound, bound - 1, out=codes)


def best_scale(
    blocks: Array, bits: int, importance: Array | float = 1.0, scales: ScaleType = FLOAT32
) -> tuple[Array, Array]:
    """Codes and scale [..., 1] of least weighted squared error; blocks [..., block] float32.

    At 4 bits several starting scales are tried, each refitted to its codes q: <w, q> / <q, q>, which
    has the sign of the start.
    """
    start = covering_scale(blocks, bits, scales)
    if bits > 4:
        start = stored_scale(start, scales)
        return codes_of(blocks, start, bits), start
    whole, unit, large = blocks, np.float32(1), np.abs(start) > LARGE
    if large.any():  # in units of a power of two, as exact: squares would be beyond float32
        unit = np.where(large, np.exp2(np.floor(np.log2(np.abs(start)))), np.float32(1))
        blocks, start = whole / unit, start / unit
    best_gain, best = np.full(start.shape, -np.inf, np.float32), start.copy()
    for factor in STARTS:
        codes = codes_of(blocks, start * np.float32(factor), bits)
        weighted = importance * codes
        norm = (weighted * codes).sum(-1, keepdims=True)
        fit = (weighted * blocks).sum(-1, keepdims=True)
        # The error is <w, w> - fit^2 / norm: the more is subtracted, the better.
        norm[norm == 0] = 1  # and fit is 0
        refitted, gain = fit / norm, fit * fit / norm
        better = gain > best_gain
        np.copyto(best_gain, gain, where=better)
        np.copyto(best, refitted, where=better & (np.abs(refitted * unit) >= scales.least))
    best = stored_scale(best * unit, scales)
    return codes_of(whole, best, bits), best


def by_blocks(weight: Array, block: int) -> Array:
    """[in, out] -> [out, blocks, block] float32; a last block that is not full is padded with 0."""
    rows, columns = weight.shape
    blocks = -(-rows // block)
    if rows == blocks * block:
        return row_major(weight.T, np.float32).reshape(columns, blocks, block)
    padded = np.zeros((columns, blocks * block), np.float32)
    padded[:, :rows] = weight.T
    return padded.reshape(columns, blocks, block)


def round_nearest(weight: Array, bits: int, block: int, scales: ScaleType = FLOAT32) -> tuple[Array, Array]:
    """Round a weight [in, out], each block by itself.

    Returns codes uint8 [out, blocks, block], offset by 2^(bits-1), and scales float32 [out, blocks].
    """
    rows, columns = weight.shape
    codes = np.empty((columns, -(-rows // block), block), np.uint8)
    found = np.empty(codes.shape[:2], np.float32)

    def fill(start: int) -> None:
        part = slice(start, start + ROWS)
        blocks = by_blocks(weight[:, part], block)
        rounded, scale = best_scale(blocks, bits, scales=scales)
        codes[part] = rounded + np.float32(2 ** (bits - 1))
        found[part] = scale[..., 0]

    with ThreadPoolExecutor(usable_cores()) as pool:
        list(pool.map(fill, range(0, columns, ROWS)))
    return codes, found


@dataclass(frozen=True)
class Inputs:
    """What GPTQ knows of a weight's inputs, padded to whole blocks.

    importance: float32 [in], the second moment's diagonal.  factor: float32 [in, in], upper T with T T^T
    = moment + damping; of padding it is the identity.
    """

    importance: Array
    factor: Array

    @classmethod
    def of(cls, moment: Array, block: int) -> Inputs:
        """From their second moment [in, in] float32, which is overwritten, and the channels that share a scale.

        T is a Cholesky factor of the channels in reverse. The damping is far above the rounding of float32.
        LAPACK reads by columns, where the lower triangle is the upper one; its own routine for that one is
        several times as fast.
        """
        rows, padding = len(moment), -len(moment) % block
        if padding:
            backwards = np.eye(rows + padding, dtype=np.float32)
            backwards[padding:, padding:] = moment[::-1, ::-1]
        else:
            backwards = reverse(moment)
        diagonal = np.einsum("ii->i", backwards)[padding:]
        importance = np.pad(diagonal[::-1] + np.finfo(np.float32).tiny, (0, padding))
        diagonal += DAMPING * max(float(diagonal.mean()), 1e-30)
        factor, failed = lapack.spotrf(backwards.T, lower=False, clean=True, overwrite_a=True)
        assert not failed, "a damped moment is positive definite"
        return cls(importance, reverse(factor.T))


def round_gptq(
    weight: Array, bits: int, block: int, inputs: Inputs, scales: ScaleType = FLOAT32
) -> tuple[Array, Array]:
    """Round a weight [in, out] so that its output changes least (GPTQ, arXiv 2210.17323).

    Input channels are rounded one after the other; what one loses is taken up by those that follow. Returns
    what `round_nearest` returns. The compiled library does it where there is one, many times as fast as
    `round_gptq_plain`.

    Stripe by stripe: with E what the channels before one lost and U the inverse of its own part of T, it
    takes up E T U. So no more than that part is inverted.
    """
    blocks = by_blocks(weight, block)
    codes, found = np.empty(blocks.shape, np.uint8), np.empty(blocks.shape[:2], np.float32)
    left = blocks.reshape(len(blocks), -1)  # and, of the channels that are done, what they lost
    if np.may_share_memory(left, weight):
        left = left.copy()
    fast, plain = partial(gptq, scale_type=scales.number), partial(round_gptq_plain, scales=scales)
    some, width = (fast if has_library() else plain), max(1, STRIPE // block)
    with ThreadPoolExecutor(usable_cores()) as pool:
        for first in range(0, blocks.shape[1], width):
            stripe, begin = slice(first, first + width), first * block
            here = slice(begin, begin + width * block)
            upper = _inverse(inputs.factor[here, here])
            taken = left[:, :begin] @ inputs.factor[:begin, here] @ upper
            left[:, here] += taken

            def fill(start: int, here: slice = here, stripe: slice = stripe, upper: Array = upper) -> None:
                part, importance = slice(start, start + OUTPUTS), inputs.importance[here]
                errors = np.ascontiguousarray(left[part, here])
                codes[part, stripe], found[part, stripe] = some(errors, upper, importance, bits, block)
                left[part, here] = errors

            list(pool.map(fill, range(0, len(left), OUTPUTS)))
            left[:, here] = left[:, here] @ upper - taken
    return codes, found


def round_gptq_plain(
    left: Array, upper: Array, importance: Array, bits: int, block: int, scales: ScaleType = FLOAT32
) -> tuple[Array, Array]:
    """The twin of `runtime.operators.gptq`: rows [out, in] of whole blocks; `left` then has their errors."""
    bound, rows = 2 ** (bits - 1), len(left)
    codes = np.empty((rows, left.shape[1] // block, block), np.uint8)
    found = np.empty(codes.shape[:2], np.float32)
    for index in range(codes.shape[1]):
        here = slice(index * block, (index + 1) * block)
        scale = best_scale(left[:, here], bits, importance[here], scales)[1][:, 0]
        current = np.asfortranarray(left[:, here])
        errors = np.empty_like(current)
        within = upper[here, here]
        for j in range(block):
            code = np.clip(np.rint(current[:, j] / scale), -bound, bound - 1)
            errors[:, j] = (current[:, j] - code * scale) / within[j, j]
            current[:, j + 1 :] -= errors[:, j, None] * within[j, j + 1 :]
            codes[:, index, j] = code + bound
        found[:, index] = scale
        left[:, here] = errors
        left[:, here.stop :] -= errors @ upper[here, here.stop :]
    return codes, found


def _inverse(triangle: Array) -> Array:
    """The inverse of an upper triangle [n, n] float32, row-major."""
    inverse, failed = lapack.strtri(triangle, lower=False)
    assert not failed, "a factor has no 0 on its diagonal"
    return np.ascontiguousarray(inverse)


def hadamard(size: int) -> Array:
    """The orthonormal, symmetric Hadamard matrix [size, size] float32; size: a power of two."""
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix * np.float32(size**-0.5)


def rotate(weight: Array, size: int) -> Array:
    """Each `size` consecutive rows of [in, out] mixed by a Hadamard matrix: H W, with H W of that W again.

    (x H) (H W) = x W: a large input channel is spread over its neighbours, and rounds better
    (QuaRot, arXiv 2404.00456).
    """
    if size <= 1:
        return weight
    mixed = np.array(weight, np.float32, order="C")
    for start in range(0, len(mixed), size):
        for column in range(0, mixed.shape[1], COLUMNS):
            _mix(mixed[start : start + size, column : column + COLUMNS])
    return mixed


def _mix(rows: Array) -> None:
    """`hadamard(size)` times [size, n], in place: sums and differences, whose bits no number of threads changes."""
    size, half = len(rows), 1
    while half < size:
        pairs = rows.reshape(size // (2 * half), 2, half, -1)
        first, second = pairs[:, 0], pairs[:, 1]
        difference = first - second
        first += second
        second[:] = difference
        half *= 2
    rows *= np.float32(size**-0.5)


def rotate_both(moment: Array, size: int) -> Array:
    """Rows and columns of [in, in] mixed as `rotate` does rows: in place, so that no second one is in memory."""
    matrix = hadamard(size)
    for start in range(0, len(moment) if size > 1 else 0, size):
        strip = slice(start, start + size)
        moment[strip] = ((matrix @ moment[strip]).reshape(-1, size) @ matrix).reshape(size, -1)
    return moment


def reverse(matrix: Array) -> Array:
    """[n, n] in C order with rows and columns in reverse, in place."""
    flat, step = matrix.ravel(), 1 << 16
    assert np.shares_memory(flat, matrix)
    for start in range(0, len(flat) // 2, step):
        stop = min(start + step, len(flat) // 2)
        front, back = slice(start, stop), slice(len(flat) - stop, len(flat) - start)
        flat[front], flat[back] = flat[back][::-1].copy(), flat[front][::-1].copy()
    return matrix


def restored(codes: Array, scales: Array, bits: int, rows: int, size: int) -> Array:
    """The weight [rows, out] float32 that codes [out, blocks, block] and scales [out, blocks] stand for.

    size: channels that were mixed before they were rounded, see `rotate`.
    """
    values = (codes - np.float32(2 ** (bits - 1))) * scales[..., None]
    return rotate(values.reshape(len(codes), -1)[:, :rows].T, size)


def pack(codes: Array, bits: int) -> Array:
    """Two 4-bit codes a byte, the earlier one in the low half; 8-bit codes as they are."""
    return codes if bits == 8 else codes[..., ::2] | codes[..., 1::2] << 4
