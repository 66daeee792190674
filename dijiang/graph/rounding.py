"""Rounding weights by blocks: w = code * scale, one scale for `block` consecutive input channels.

Codes run from -2^(bits-1) to 2^(bits-1) - 1. Where the scale's sign is free, the largest weight of a
block, whatever its own sign, takes the code that exists on one side only. Where a scale must be
positive, as TensorRT demands, it takes the largest code of both sides.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
from scipy.linalg import lapack

from ..machine.limits import usable_cores

Array = np.ndarray
#: Starting scales tried at 4 bits, as factors of the one that just covers the largest weight.
STARTS = (1.0, 0.94, 0.88, 0.82)
#: Output channels that one thread rounds at once: bounds the temporaries.
ROWS = 64
#: Added to the second moment's diagonal, in means of it: channels that were never seen stay solvable.
DAMPING = 0.01


def covering_scale(blocks: Array, bits: int, *, positive: bool = False) -> Array:
    """The scale [..., 1] at which a block's largest weight takes its code (see above)."""
    low, high = blocks.min(-1, keepdims=True), blocks.max(-1, keepdims=True)
    bound = 2.0 ** (bits - 1)
    signed, unsigned = np.where(-low >= high, low, high) / -bound, np.maximum(-low, high) / (bound - 1)
    scale = unsigned if positive else signed
    return np.where(scale == 0, 1, scale).astype(np.float32)


def codes_of(blocks: Array, scale: Array, bits: int) -> Array:
    """Nearest codes, float32 integers."""
    bound = 2 ** (bits - 1)
    codes: Array = blocks * (1 / scale)
    np.rint(codes, out=codes)
    return np.clip(codes, -bound, bound - 1, out=codes)


def best_scale(
    blocks: Array, bits: int, importance: Array | float = 1.0, *, positive: bool = False
) -> tuple[Array, Array]:
    """Codes and scale [..., 1] of least weighted squared error; blocks [..., block] float32.

    At 4 bits several starting scales are tried, each refitted to its codes q: <w, q> / <q, q>, which
    has the sign of the start.
    """
    start = covering_scale(blocks, bits, positive=positive)
    if bits > 4:
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
    return best_codes, best


def by_blocks(weight: Array, block: int) -> Array:
    """[in, out] -> [out, blocks, block] float32; a last block that is not full is padded with 0."""
    rows, columns = weight.shape
    blocks = -(-rows // block)
    if rows == blocks * block:
        return np.ascontiguousarray(weight.T, np.float32).reshape(columns, blocks, block)
    padded = np.zeros((columns, blocks * block), np.float32)
    padded[:, :rows] = weight.T
    return padded.reshape(columns, blocks, block)


def round_nearest(weight: Array, bits: int, block: int, *, positive: bool = False) -> tuple[Array, Array]:
    """Round a weight [in, out], each block by itself; scales above 0 if `positive`.

    Returns codes uint8 [out, blocks, block], offset by 2^(bits-1), and scales float32 [out, blocks].
    """
    rows, columns = weight.shape
    codes = np.empty((columns, -(-rows // block), block), np.uint8)
    scales = np.empty(codes.shape[:2], np.float32)

    def fill(start: int) -> None:
        part = slice(start, start + ROWS)
        rounded, scale = best_scale(by_blocks(weight[:, part], block), bits, positive=positive)
        codes[part] = rounded + np.float32(2 ** (bits - 1))
        scales[part] = scale[..., 0]

    with ThreadPoolExecutor(usable_cores()) as pool:
        list(pool.map(fill, range(0, columns, ROWS)))
    return codes, scales


def round_gptq(weight: Array, bits: int, block: int, moment: Array) -> tuple[Array, Array]:
    """Round a weight [in, out] so that its output changes least (GPTQ, arXiv 2210.17323).

    moment [in, in]: second moment of the inputs. Input channels are rounded one after the other; what
    one loses is taken up by those that follow. Returns what `round_nearest` returns.
    """
    blocks = by_blocks(weight, block)
    count, rows = blocks.shape[1] * block, weight.shape[0]
    left = blocks.reshape(len(blocks), count)
    upper = _inverse_factor(moment, rows, count)
    importance = np.zeros(count, np.float32)
    importance[:rows] = np.diag(moment) + np.finfo(np.float32).tiny
    bound = 2 ** (bits - 1)
    codes = np.empty(blocks.shape, np.uint8)
    scales = np.empty(blocks.shape[:2], np.float32)
    for index in range(blocks.shape[1]):
        here = slice(index * block, (index + 1) * block)
        scale = best_scale(left[:, here], bits, importance[here])[1][:, 0]
        current = np.asfortranarray(left[:, here])
        errors = np.empty_like(current)
        within = upper[here, here]
        for j in range(block):
            code = np.clip(np.rint(current[:, j] / scale), -bound, bound - 1)
            errors[:, j] = (current[:, j] - code * scale) / within[j, j]
            current[:, j + 1 :] -= errors[:, j, None] * within[j, j + 1 :]
            codes[:, index, j] = code + bound
        scales[:, index] = scale
        left[:, here.stop :] -= errors @ upper[here, here.stop :]
    return codes, scales


def _inverse_factor(moment: Array, rows: int, count: int) -> Array:
    """Upper U [count, count] float32 with U^T U = (moment + damping)^-1; padding is the identity."""
    full = np.eye(count, order="F")
    full[:rows, :rows] = moment
    diagonal = np.diag(moment)
    full[np.arange(rows), np.arange(rows)] += DAMPING * max(float(diagonal.mean()), 1e-30)
    # Each step overwrites its input: a moment of 11,008 channels is 1 GB in float64.
    factor, _ = lapack.dpotrf(full, overwrite_a=True)
    inverse, _ = lapack.dpotri(factor, overwrite_c=True)
    inverse_factor, failed = lapack.dpotrf(inverse, overwrite_a=True)
    assert not failed, "a damped moment is positive definite"
    upper: Array = np.triu(inverse_factor.astype(np.float32))
    return upper


def pack(codes: Array, bits: int) -> Array:
    """Two 4-bit codes a byte, the earlier one in the low half; 8-bit codes as they are."""
    return codes if bits == 8 else codes[..., ::2] | codes[..., 1::2] << 4
