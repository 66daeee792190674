"""The recurrence in each dialect, behind one signature.

    attend(b, q, k, v, state, log_decay, heads, kv_heads) -> (output, new state)

q [B, T, H*K], k and v [B, T, G*K], state [B, G, K, K], log_decay [B, T, G] (0 and k = 0 where a
token is padding); output [B, T, H*K]. Any T: one graph is prefill and decode step.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import numpy as np
import onnx_ir as ir

from ..runtime.native import find_library
from .builder import CONTRIB, GraphBuilder

Attend = Callable[..., "tuple[ir.Value, ir.Value]"]
#: Added to the exponent of a future token: exp of it is 0 in float32.
FUTURE = -1e4


def attend_contrib(
    b: GraphBuilder,
    q: ir.Value,
    k: ir.Value,
    v: ir.Value,
    state: ir.Value,
    log_decay: ir.Value,
    heads: int,
    kv_heads: int,
    domain: str = CONTRIB,
) -> tuple[ir.Value, ir.Value]:
    """The fused LinearAttention node. A scale of 0 would mean 1/sqrt(K): it is set to 1."""
    out, new_state = b.ops(
        "LinearAttention",
        2,
        q,
        k,
        v,
        state,
        log_decay,
        domain=domain,
        q_num_heads=heads,
        kv_num_heads=kv_heads,
        update_rule="gated",
        scale=1.0,
    )
    return out, new_state


def attend_standard(
    b: GraphBuilder,
    q: ir.Value,
    k: ir.Value,
    v: ir.Value,
    state: ir.Value,
    log_decay: ir.Value,
    heads: int,
    kv_heads: int,
) -> tuple[ir.Value, ir.Value]:
    """ai.onnx LinearAttention, opset 27."""
    return attend_contrib(b, q, k, v, state, log_decay, heads, kv_heads, domain="")


def _by_head(b: GraphBuilder, x: ir.Value, shape: list[int], perm: list[int]) -> ir.Value:
    return b.op("Transpose", b.op("Reshape", x, b.constant(shape, np.int64)), perm=perm)


def attend_primitive(
    b: GraphBuilder,
    q: ir.Value,
    k: ir.Value,
    v: ir.Value,
    state: ir.Value,
    log_decay: ir.Value,
    heads: int,
    kv_heads: int,
) -> tuple[ir.Value, ir.Value]:
    """The piece of T tokens in closed form, from MatMul and elementwise nodes only.

    With c the running sum of log-decays: o_t = e^{c_t} q_t S + sum_{s<=t} e^{c_t - c_s} (q_t.k_s) v_s
    and S' = e^{c_T} S + sum_s e^{c_T - c_s} k_s v_s^T. No exponent is positive, so nothing overflows.
    """
    shared = heads // kv_heads
    size = [0, 0, kv_heads, -1]
    # [B, G, r, T, K] for queries (r query heads share a kv head), [B, G, T, K] for keys and values.
    query = b.op(
        "Transpose",
        b.op("Reshape", q, b.constant([0, 0, kv_heads, shared, q_size(state)], np.int64)),
        perm=[0, 2, 3, 1, 4],
    )
    value = b.op("Unsqueeze", _by_head(b, v, size, [0, 2, 1, 3]), b.constant([2], np.int64))
    key_columns = b.op("Unsqueeze", _by_head(b, k, size, [0, 2, 3, 1]), b.constant([2], np.int64))
    running = b.op("CumSum", b.op("Transpose", log_decay, perm=[0, 2, 1]), b.constant(2, np.int64))
    to_t = b.op("Unsqueeze", running, b.constant([2, 4], np.int64))  # [B, G, 1, T, 1]
    to_s = b.op("Unsqueeze", running, b.constant([2, 3], np.int64))  # [B, G, 1, 1, T]
    weight = b.op("Exp", b.op("Add", b.op("Sub", to_t, to_s), _future(b, log_decay)))
    scores = b.op("Mul", b.op("MatMul", query, key_columns), weight)
    past = b.op("Unsqueeze", state, b.constant([2], np.int64))
    carried = b.op("Mul", b.op("MatMul", query, past), b.op("Exp", to_t))
    out = b.op("Add", b.op("MatMul", scores, value), carried)
    out = b.op("Transpose", out, perm=[0, 3, 1, 2, 4])
    out = b.op("Reshape", out, b.constant([0, 0, -1], np.int64))

    last = b.op("Gather", running, b.constant([-1], np.int64), axis=2)  # [B, G, 1]
    remaining = b.op("Exp", b.op("Unsqueeze", b.op("Sub", last, running), b.constant([2, 3], np.int64)))
    added = b.op("MatMul", b.op("Mul", key_columns, remaining), value)
    decayed = b.op("Mul", past, b.op("Exp", b.op("Unsqueeze", last, b.constant([2, 4], np.int64))))
    return out, b.op("Squeeze", b.op("Add", decayed, added), b.constant([2], np.int64))


def q_size(state: ir.Value) -> int:
    """K, from the declared shape of a state input [B, G, K, K]."""
    assert state.shape is not None
    return int(state.shape[2])


def _future(b: GraphBuilder, log_decay: ir.Value) -> ir.Value:
    """[1, 1, 1, T, T]: 0 where s <= t, a large negative number where s > t."""
    length = b.op("Gather", b.op("Shape", log_decay), b.constant(1, np.int64), axis=0)
    steps = b.op("Range", b.constant(0, np.int64), length, b.constant(1, np.int64))
    later = b.op(
        "Less",
        b.op("Unsqueeze", steps, b.constant([0, 1, 2, 4], np.int64)),
        b.op("Unsqueeze", steps, b.constant([0, 1, 2, 3], np.int64)),
    )
    return b.op("Mul", b.op("Cast", later, to=ir.DataType.FLOAT), b.constant(FUTURE))


@dataclass(frozen=True)
class Dialect:
    """How a graph is written for a class of backends.

    attend: writes the recurrence; None: the whole layer is one node (`native`).
    fused: rotary embedding, activations and group norm are ONNX Runtime's own single nodes.
    in_place: the attention node may write the new state over the old one.
    onnxruntime: oldest version that runs it.
    """

    opset: int
    attend: Attend | None
    fused: bool
    in_place: bool
    onnxruntime: tuple[int, int]


#: ort: the fused node.  onnx: the standard function.  primitive: TensorRT, old onnxruntime.
#: native: a node of our own, compiled with dijiang, for all that stands between a layer's projections.
DIALECTS = {
    "ort": Dialect(23, attend_contrib, fused=True, in_place=True, onnxruntime=(1, 30)),
    "onnx": Dialect(27, attend_standard, fused=False, in_place=False, onnxruntime=(1, 30)),
    "primitive": Dialect(17, attend_primitive, fused=False, in_place=False, onnxruntime=(1, 15)),
    "native": Dialect(23, None, fused=True, in_place=True, onnxruntime=(1, 30)),
}


def runs_here(dialect: str) -> bool:
    """Whether the installed onnxruntime runs a dialect; where none is installed, whether one could."""
    if dialect == "native" and find_library() is None:
        return False
    for package in ("onnxruntime", "onnxruntime-gpu"):
        with suppress(PackageNotFoundError):
            major, minor = version(package).split(".")[:2]
            return (int(major), int(minor)) >= DIALECTS[dialect].onnxruntime
    return True
