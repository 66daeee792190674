"""Rounding weights by blocks: w = code * scale, one scale for `block` consecutive input channels.

Codes run from -2^(bits-1) to 2^(bits-1) - 1. Where the scale's sign is free, the largest weight of a
block, whatever its own sign, takes the code that exists on one side only. Where a scale must be
positive, as TensorRT demands, it takes the largest code of both sides. Scales are float32 arrays; those
that are stored in two bytes are rounded to bfloat16 before the codes are chosen.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
from scipy.linalg import lapack

from ..machine.limits import usable_cores
from ..runtime.operators import gptq, has_library

Array = np.ndarray
#: Starting scales tried at 4 bits, as factors of the one that just covers the largest weight.
STARTS = (1.0, 0.94, 0.88, 0.82)
#: Output channels that one thread rounds at once: bounds the temporaries.
ROWS = 64
#: Input channels that GPTQ corrects one by one; what they lost reaches those behind them in one product.
STRIPE = 128
#: Added to the second moment's diagonal, in means of it: channels that were never seen stay solvable.
DAMPING = 0.01


def covering_scale(blocks: Array, bits: int, *, positive: bool = False) -> Array:
    """The scale [..., 1] at which a block's largest weight takes its code (see above)."""
    low, high = blocks.min(-1, keepdims=True), blocks.max(-1, keepdims=True)
    bound = 2.0 ** (bits - 1)
    signed, unsigned = np.where(-low >= high, low, high) / -bound, np.maximum(-low, high) / (bound - 1)
    scale = unsigned if positive else signed
    return np.where(scale == 0, 1, scale).astype(np.float32)


def stored_scale(scale: Array, scale_bytes: int) -> Array:
    """Scales float32 as their stored type holds them: bfloat16 (2 bytes) or float32 (4)."""
    return scale if scale_bytes == 4 else scale.astype(ml_dtypes.bfloat16).astype(np.float32)


def codes_of(blocks: Array, scale: Array, bits: int) -> Array:
    """Nearest codes, float32 integers."""
    bound = 2 ** (bits - 1)
    codes: Array = blocks * (1 / scale)
    np.rint(codes, out=codes)
    return np.clip(codes, -bound, bound - 1, out=codes)


def best_scale(
    blocks: Array, bits: int, importance: Array | float = 1.0, *, positive: bool = False, scale_bytes: int = 4
) -> tuple[Array, Array]:
    """Codes and scale [..., 1] of least weighted squared error; blocks [..., block] float32.

    At 4 bits several starting scales are tried, each refitted to its codes q: <w, q> / <q, q>, which
    has the sign of the start.
    """
    start = covering_scale(blocks, bits, positive=positive)
    if bits > 4:
        start = stored_scale(start, scale_bytes)
        return codes_of(blocks, start, bits), start
    best_gain = np.full(start.shape, -np.inf, np.float32)
    best_codes, best = np.zeros_like(blocks), start.copy()
    for factor in STARTS:
        codes = codes_of(blocks, start * np.float32(factor), bits)
        weighted = importance * codes
        norm = (weighted * codes).sum(-1, keepdims=True)
        fit = (weighted * blocks).sum(-1, keepdims=True)
        # The error is <w, w> - fit^2 / norm: the more is subtracted, the better.
        gain = np.where(norm > 0, fit * fit / np.maximum(norm, 1e-30), 0)
        better = gain > best_gain
        np.copyto(best_gain, gain, where=better)
        np.copyto(best_codes, codes, where=better)
        np.copyto(best, fit / np.maximum(norm, 1e-30), where=better & (fit != 0))
    return best_codes, stored_scale(best, scale_bytes)


def by_blocks(weight: Array, block: int) -> Array:
    """[in, out] -> [out, blocks, block] float32; a last block that is not full is padded with 0."""
    rows, columns = weight.shape
    blocks = -(-rows // block)
    if rows == blocks * block:
        return np.ascontiguousarray(weight.T, np.float32).reshape(columns, blocks, block)
    padded = np.zeros((columns, blocks * block), np.float32)
    padded[:, :rows] = weight.T
    return padded.reshape(columns, blocks, block)


def round_nearest(
    weight: Array, bits: int, block: int, *, positive: bool = False, scale_bytes: int = 4
) -> tuple[Array, Array]:
    """Round a weight [in, out], each block by itself; scales above 0 if `positive`.

    Returns codes uint8 [out, blocks, block], offset by 2^(bits-1), and scales float32 [out, blocks].
    """
    rows, columns = weight.shape
    codes = np.empty((columns, -(-rows // block), block), np.uint8)
    scales = np.empty(codes.shape[:2], np.float32)

    def fill(start: int) -> None:
        part = slice(start, start + ROWS)
        blocks = by_blocks(weight[:, part], block)
        rounded, scale = best_scale(blocks, bits, positive=positive, scale_bytes=scale_bytes)
        codes[part] = rounded + np.float32(2 ** (bits - 1))
        scales[part] = scale[..., 0]

    with ThreadPoolExecutor(usable_cores()) as pool:
        list(pool.map(fill, range(0, columns, ROWS)))
    return codes, scales


def round_gptq(weight: Array, bits: int, block: int, moment: Array, *, scale_bytes: int = 4) -> tuple[Array, Array]:
    """Round a weight [in, out] so that its output changes least (GPTQ, arXiv 2210.17323).

    moment [in, in]: second moment of the inputs. Input channels are rounded one after the other; what
    one loses is taken up by those that follow. Returns what `round_nearest` returns. The compiled
    library does it where there is one, many times as fast as `round_gptq_plain`.
    """
    blocks = by_blocks(weight, block)
    codes, scales = np.empty(blocks.shape, np.uint8), np.empty(blocks.shape[:2], np.float32)
    left = blocks.reshape(len(blocks), -1)  # and, of the channels that are done, their errors
    upper = _inverse_factor(moment, len(weight), left.shape[1])
    importance = np.zeros(left.shape[1], np.float32)
    importance[: len(weight)] = np.diag(moment) + np.finfo(np.float32).tiny
    some, width = (gptq if has_library() else round_gptq_plain), max(1, STRIPE // block)
    with ThreadPoolExecutor(usable_cores()) as pool:
        for first in range(0, blocks.shape[1], width):
            stripe, begin = slice(first, first + width), first * block
            here = slice(begin, begin + width * block)
            if begin:
                left[:, here] -= left[:, :begin] @ upper[:begin, here]
            within = np.ascontiguousarray(upper[here, here])

            def fill(start: int, here: slice = here, stripe: slice = stripe, within: Array = within) -> None:
                part = slice(start, start + ROWS)
                errors = np.ascontiguousarray(left[part, here])
                codes[part, stripe], scales[part, stripe] = some(
                    errors, within, importance[here], bits, block, scale_bytes
                )
                left[part, here] = errors

            list(pool.map(fill, range(0, len(left), ROWS)))
    return codes, scales


def round_gptq_plain(
    left: Array, upper: Array, importance: Array, bits: int, block: int, scale_bytes: int = 4
) -> tuple[Array, Array]:
    """The twin of `runtime.operators.gptq`: rows [out, in] of whole blocks; `left` then has their errors."""
    bound, rows = 2 ** (bits - 1), len(left)
    codes = np.empty((rows, left.shape[1] // block, block), np.uint8)
    scales = np.empty(codes.shape[:2], np.float32)
    for index in range(codes.shape[1]):
        here = slice(index * block, (index + 1) * block)
        scale = best_scale(left[:, here], bits, importance[here], scale_bytes=scale_bytes)[1][:, 0]
        current = np.asfortranarray(left[:, here])
        errors = np.empty_like(current)
        within = upper[here, here]
        for j in range(block):
            code = np.clip(np.rint(current[:, j] / scale), -bound, bound - 1)
            errors[:, j] = (current[:, j] - code * scale) / within[j, j]
            current[:, j + 1 :] -= errors[:, j, None] * within[j, j + 1 :]
            codes[:, index, j] = code + bound
        scales[:, index] = scale
        left[:, here] = errors
        left[:, here.stop :] -= errors @ upper[here, here.stop :]
    return codes, scales


def _inverse_factor(moment: Array, rows: int, count: int) -> Array:
    """Upper U [count, count] float32 with U^T U = (moment + damping)^-1; padding is the identity.

    With the channels in reverse, a Cholesky factor L L^T of the moment is U^-1 (U^-1)^T. Each step
    overwrites its input: a moment of 11,008 channels is 1 GB in float64. LAPACK reads by columns, where
    the lower triangle is the upper one; its own routines for that one are several times as fast.
    """
    backwards = np.eye(count)
    backwards[count - rows :, count - rows :] = moment[::-1, ::-1]
    diagonal = np.einsum("ii->i", backwards)[count - rows :]
    diagonal += DAMPING * max(float(diagonal.mean()), 1e-30)
    factor, _ = lapack.dpotrf(backwards.T, lower=False, clean=True, overwrite_a=True)
    inverse, failed = lapack.dtrtri(factor, lower=False, overwrite_c=True)
    assert not failed, "a damped moment is positive definite"
    upper: Array = np.ascontiguousarray(inverse.T[::-1, ::-1], np.float32)
    return upper


def hadamard(size: int) -> Array:
    """The orthonormal, symmetric Hadamard matrix [size, size] float32; size: a power of two."""
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    scaled: Array = matrix * np.float32(size**-0.5)
    return scaled


def rotate(weight: Array, size: int) -> Array:
    """Each `size` consecutive rows of [in, out] mixed by a Hadamard matrix: H W, with H W of that W again.

    (x H) (H W) = x W: a large input channel is spread over its neighbours, and rounds better
    (QuaRot, arXiv 2404.00456).
    """
    if size <= 1:
        return weight
    mixed, matrix = np.empty(weight.shape, np.float32), hadamard(size)
    for start in range(0, len(weight), size):  # no copy of the whole
        np.matmul(matrix, weight[start : start + size], out=mixed[start : start + size])
    return mixed


def pack(codes: Array, bits: int) -> Array:
    """Two 4-bit codes a byte, the earlier one in the low half; 8-bit codes as they are."""
    return codes if bits == 8 else codes[..., ::2] | codes[..., 1::2] << 4
