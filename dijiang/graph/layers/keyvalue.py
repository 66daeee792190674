"""Layers of a vanilla Transformer: keys and values of all tokens in a cache, written in place.

ONNX Runtime's GroupQueryAttention on packed q, k and v, with rotary positions inside where its kernel
takes them.
"""

from __future__ import annotations

import math
from functools import partial
from typing import cast

import numpy as np
import onnx_ir as ir

from ...bundle import names
from ...models.rotary import inverse_frequencies
from ...nodes import CONTRIB
from ..blocks import rotary_angles, rotate
from ..roles import Role
from . import Frame, Strategy

#: Kind of cache -> the element type of keys and values, and of what the attention node computes in.
ELEMENTS = {
    "fp32": (ir.DataType.FLOAT, ir.DataType.FLOAT),
    "fp16": (ir.DataType.FLOAT16, ir.DataType.FLOAT16),
    "int8": (ir.DataType.INT8, ir.DataType.FLOAT),
}
#: Scale of an int8 cache: random values have no better one.
CACHE_SCALE = 0.05
#: Channels that the node's rotary kernel takes at once.
ROTARY_VECTOR = 8


def cached(cache: str) -> Strategy:
    """The strategy with a cache of one kind of ELEMENTS."""
    return cast(Strategy, partial(CachedLayer, cache))


class CachedLayer:
    """See `Layer`."""

    def __init__(self, cache: str, writer: Frame) -> None:
        self.w, self.b, self.spec = writer, writer.b, writer.spec
        self._stored, self._computed = ELEMENTS[cache]
        self._table = np.dtype(np.float16 if self._stored == ir.DataType.FLOAT16 else np.float32)
        half = self.spec.rotary_dims // 2
        # The node's kernel takes half-widths that are whole vectors.
        self._rotates_inside = half > 0 and half % ROTARY_VECTOR == 0
        self._presents: list[list[ir.Value]] = []

    def declare(self) -> None:
        """Declare lengths and caches; compute the rotary angles where the node does not."""
        b, spec, positions = self.b, self.spec, self.w.model.positions_limit
        assert positions is not None
        self._positions = positions
        self._last = b.input(names.LAST_POSITION, ir.DataType.INT32, ["batch"])
        self._total = b.input(names.TOTAL_LENGTH, ir.DataType.INT32, [])
        self._shape: list[str | int] = ["batch", spec.num_kv_heads, "capacity", spec.head_size]
        self._pasts = [
            [b.input(name, self._stored, self._shape) for name in names.past_cache(layer)]
            for layer in range(spec.num_layers)
        ]
        if spec.rotary_dims and not self._rotates_inside:
            self._angles = rotary_angles(b, self.w.positions, spec, positions)

    def block(self, layer: int, x: ir.Value) -> ir.Value | None:
        return None

    def attention(self, layer: int, x: ir.Value) -> ir.Value:
        b, spec, computed = self.b, self.spec, self._computed
        heads = self._heads(self.w.linear("qkv", x, layer))
        if computed != ir.DataType.FLOAT:
            heads = [h if h is None else b.op("Cast", h, to=computed) for h in heads]
        quantized = self._stored == ir.DataType.INT8
        scale = b.constant([CACHE_SCALE]) if quantized else None
        optional = [None, None, None, scale, scale] if quantized else []
        rounding = {"k_quant_type": "PER_TENSOR", "v_quant_type": "PER_TENSOR", "kv_cache_bit_width": 8}
        out, *present = b.ops(
            "GroupQueryAttention",
            3,
            *heads,
            *self._pasts[layer],
            self._last,
            self._total,
            *(self._rotary_tables() if self._rotates_inside else [None, None]),
            *optional,
            domain=CONTRIB,
            num_heads=spec.num_heads,
            kv_num_heads=spec.num_kv_heads,
            do_rotary=int(self._rotates_inside),
            scale=1 / math.sqrt(spec.head_size),
            **(rounding if quantized else {}),
        )
        self._presents.append(present)
        if computed != ir.DataType.FLOAT:
            out = b.op("Cast", out, to=ir.DataType.FLOAT)
        return self.w.linear("out", out, layer)

    def finish(self) -> None:
        """Declare the caches after the tokens."""
        for layer, present in enumerate(self._presents):
            for name, value in zip(names.present_cache(layer), present, strict=True):
                self.b.output(value, name, self._stored, self._shape)

    def _heads(self, qkv: ir.Value) -> list[ir.Value | None]:
        """Query, key and value inputs: packed, or rotated before the node where it cannot rotate."""
        b, spec = self.b, self.spec
        if self._rotates_inside or not spec.rotary_dims:
            return [qkv, None, None]
        q, kv = spec.num_heads * spec.head_size, spec.num_kv_heads * spec.head_size
        qk, v = b.ops("Split", 2, qkv, b.ints(q + kv, kv), axis=-1)
        qk = rotate(b, qk, self._angles, spec, fused=True)
        return [*b.ops("Split", 2, qk, b.ints(q, kv), axis=-1), v]

    def _rotary_tables(self) -> list[ir.Value]:
        """cos and sin [positions, rotary_dims / 2]."""
        angles = np.outer(np.arange(self._positions, dtype=np.float64), inverse_frequencies(self.spec))
        return [self.b.constant(f(angles), self._table, role=Role.TABLE) for f in (np.cos, np.sin)]
