"""Building blocks that all graphs share: norms, the gate, rotary positions."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from ..models.activations import ACTIVATIONS
from ..models.rotary import inverse_frequencies
from ..models.spec import ModelSpec
from .builder import GraphBuilder
from .roles import Role

#: Base of the digits that a position is split into; a table holds cos and sin for each digit.
RADIX = 2048
#: First opset of RMSNormalization.
RMS_OPSET = 23
#: Digits of an endless position: 2048^3 = 8.6e9 tokens.
ENDLESS_DIGITS = 3


def silu(b: GraphBuilder, x: ir.Value, *, fused: bool) -> ir.Value:
    """x * sigmoid(x), of the gate."""
    row = ACTIVATIONS["silu"]
    return (row.fused if fused else row.nodes)(b, x)


def layer_norm(b: GraphBuilder, x: ir.Value, weight: ir.Value, bias: ir.Value, eps: float) -> ir.Value:
    """LayerNorm over the last axis."""
    return b.op("LayerNormalization", x, weight, bias, axis=-1, epsilon=eps)


def rms_norm(b: GraphBuilder, x: ir.Value, weight: ir.Value, eps: float) -> ir.Value:
    """RMSNorm over the last axis: one node where the opset has it."""
    if b.opset >= RMS_OPSET:
        return b.op("RMSNormalization", x, weight, axis=-1, epsilon=eps)
    width = weight.shape[0] if weight.shape is not None else 0
    mean = b.op("Div", _last_sum(b, b.op("Mul", x, x)), b.constant(float(width)))
    return b.op("Mul", b.op("Div", x, b.op("Sqrt", b.op("Add", mean, b.constant(eps)))), weight)


def group_norm(
    b: GraphBuilder, x: ir.Value, weight: ir.Value, bias: ir.Value, spec: ModelSpec, *, fused: bool
) -> ir.Value:
    """GroupNorm of each token's channels, num_groups = head size; x [B, T, d].

    A group whose squared deviations overflow float32 must come out as 0. ONNX Runtime's CPU
    LayerNormalization does that (`fused`), but not with weights [groups, channels] of its own: that
    form sums in float64. Elsewhere two passes in primitives do: x / inf = 0.
    """
    size = spec.num_heads
    grouped = b.op("Reshape", x, b.ints(0, 0, spec.head_size, size))
    if fused:
        one = b.constant(np.ones(size))
        normed = b.op("LayerNormalization", grouped, one, axis=-1, epsilon=spec.group_norm_eps)
    else:
        mean = b.op("Div", _last_sum(b, grouped), b.constant(float(size)))
        centred = b.op("Sub", grouped, mean)
        variance = b.op("Div", _last_sum(b, b.op("Mul", centred, centred)), b.constant(float(size)))
        # Not Sqrt: that of onnxruntime 1.15 makes NaN of infinity.
        deviation = b.op("Pow", b.op("Add", variance, b.constant(spec.group_norm_eps)), b.constant(0.5))
        normed = b.op("Div", centred, deviation)
    flat = b.op("Reshape", normed, b.ints(0, 0, spec.hidden_size))
    return b.op("Add", b.op("Mul", flat, weight), bias)


def _last_sum(b: GraphBuilder, x: ir.Value) -> ir.Value:
    return b.op("ReduceSum", x, b.ints(-1), keepdims=1)


def rotary_angles(
    b: GraphBuilder, positions: ir.Value, spec: ModelSpec, limit: int | None
) -> tuple[ir.Value, ir.Value]:
    """cos and sin [B, T, R/2] of position * frequency, exact at any position.

    The position is written in base RADIX; each digit has a float64-computed table, and the angle
    addition formulas put the digits together. A float32 product would lose the angle instead.
    """
    digits = ENDLESS_DIGITS if limit is None else max(1, math.ceil(math.log(limit, RADIX)))
    cos, sin, rest = None, None, positions
    for digit in range(digits):
        place = RADIX**digit
        last = digit == digits - 1
        index = rest
        if not last:
            radix = b.constant(RADIX, np.int64)
            rest = b.op("Div", index, radix)
            index = b.op("Sub", index, b.op("Mul", rest, radix))  # GPUs have no Mod of int64
        rows = math.ceil(limit / place) if last and limit is not None else RADIX
        angles = np.outer(np.arange(rows) * float(place), inverse_frequencies(spec))
        tables = (b.constant(f(angles), role=Role.TABLE) for f in (np.cos, np.sin))
        c, s = (b.op("Gather", table, index, axis=0) for table in tables)
        if cos is None or sin is None:
            cos, sin = c, s
        else:
            cos, sin = (
                b.op("Sub", b.op("Mul", cos, c), b.op("Mul", sin, s)),
                b.op("Add", b.op("Mul", sin, c), b.op("Mul", cos, s)),
            )
    assert cos is not None
    assert sin is not None
    return cos, sin


def rotate(
    b: GraphBuilder, x: ir.Value, angles: tuple[ir.Value, ir.Value], spec: ModelSpec, *, fused: bool
) -> ir.Value:
    """Half-rotation of the first `rotary_dims` channels of each head; x and result [B, T, heads * K].

    angles: cos and sin [B, T, R/2].
    """
    heads = spec.num_heads + spec.num_kv_heads
    if fused:
        return b.op("RotaryEmbedding", x, *angles, num_heads=heads, rotary_embedding_dim=spec.rotary_dims)
    cos, sin = (b.op("Unsqueeze", angle, b.ints(2)) for angle in angles)
    half, rest = spec.rotary_dims // 2, spec.head_size - spec.rotary_dims
    sizes = [half, half, *([rest] if rest else [])]
    by_head = b.op("Reshape", x, b.ints(0, 0, heads, spec.head_size))
    first, second, *tail = b.ops("Split", len(sizes), by_head, b.constant(sizes, np.int64), axis=-1)
    rotated = [
        b.op("Sub", b.op("Mul", first, cos), b.op("Mul", second, sin)),
        b.op("Add", b.op("Mul", second, cos), b.op("Mul", first, sin)),
    ]
    return b.op("Reshape", b.op("Concat", *rotated, *tail, axis=-1), b.ints(0, 0, -1))
