"""Layers as nodes around the recurrence, which is written in one of three forms.

    core(b, q, k, v, state, log_decay, heads, kv_heads) -> (output, new state)

q [B, T, H*K], k and v [B, T, G*K], state [B, G, K, K], log_decay [B, T, G] (0 and k = 0 where a
token is padding); output [B, T, H*K]. Any T: one graph is prefill and decode step.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import onnx_ir as ir

from ...bundle import names
from ...models.decay import Decay
from ...nodes import CONTRIB
from ..blocks import group_norm, rotary_angles, rotate, silu
from ..builder import GraphBuilder
from ..roles import Role
from . import Frame

Core = Callable[..., "tuple[ir.Value, ir.Value]"]
#: Added to the exponent of a future token: exp of it is 0 in float32.
FUTURE = -1e4


class States:
    """Recurrent states of all layers, and what every token brings to them: mask, decay, scales, angles.

    angles: the nodes that make them, as `blocks.rotary_angles`.
    """

    def __init__(self, writer: Frame, angles: Callable[..., tuple[ir.Value, ir.Value]] = rotary_angles) -> None:
        self.w, self.b, self.spec, self._rotary = writer, writer.b, writer.spec, angles
        self._pasts: list[ir.Value] = []
        self._presents: list[ir.Value] = []
        self._log_decays: dict[bytes, ir.Value] = {}
        #: Of a state: one for each row of the batch, but where a row may hold several sequences.
        self._shape: list[str | int] = ["sequences" if writer.ragged else "batch", *self.spec.state_shape]

    def declare(self) -> None:
        """Declare mask and states; compute the rotary angles."""
        b, spec, w = self.b, self.spec, self.w
        positions = w.positions  # declared even where nothing reads it
        mask = b.input(names.ATTENTION_MASK, ir.DataType.INT64, w.step)
        self._pasts = [b.input(names.past_state(i), ir.DataType.FLOAT, self._shape) for i in range(spec.num_layers)]
        self.mask = b.op("Unsqueeze", b.op("Cast", mask, to=ir.DataType.FLOAT), b.ints(-1))
        limit = w.model.positions_limit
        self.angles = self._rotary(b, positions, spec, limit) if spec.rotary_dims else None

    def past(self, layer: int) -> ir.Value:
        """The state of a layer before the tokens."""
        return self._pasts[layer]

    def keep(self, state: ir.Value) -> None:
        """The state of the next layer after the tokens."""
        self._presents.append(state)

    def finish(self) -> None:
        """Declare the states after the tokens."""
        for layer, state in enumerate(self._presents):
            self.b.output(state, names.present_state(layer), ir.DataType.FLOAT, self._shape)

    def scales(self, layer: int) -> ir.Value | None:
        """Query scale u and key scale w [B, T, H + G, 1] of the tokens' positions; None: all 1."""
        decay = self._decay(layer)
        if decay.u is None or decay.w is None:
            return None
        u = np.repeat(decay.u, self.spec.num_heads // self.spec.num_kv_heads, axis=0)
        table = self.b.constant(np.concatenate([u, decay.w]).T[..., None], role=Role.TABLE)
        return self.b.op("Gather", table, self.w.positions, axis=0)

    def log_decay(self, layer: int) -> ir.Value:
        """[B, T, G], 0 where a token is padding; one node for all layers of the same gamma."""
        gamma = self._decay(layer).gamma
        key = gamma.tobytes()
        if key not in self._log_decays:
            self._log_decays[key] = self.b.op("Mul", self.mask, self.b.constant(np.log(gamma)[None, None]))
        return self._log_decays[key]

    def _decay(self, layer: int) -> Decay:
        return self.w.model.decays[layer]


class RecurrentLayer:
    """See `Layer`."""

    def __init__(self, core: Core, writer: Frame) -> None:
        self._core, self.w, self.states = core, writer, States(writer)
        self.declare, self.finish = self.states.declare, self.states.finish

    def block(self, layer: int, x: ir.Value) -> ir.Value | None:
        return None

    def attention(self, layer: int, x: ir.Value) -> ir.Value:
        w, b, spec, states, fused = self.w, self.w.b, self.w.spec, self.states, self.w.fused
        heads, kv, size = spec.num_heads, spec.num_kv_heads, spec.head_size
        columns = b.ints((heads + kv) * size, kv * size)
        qk, v = b.ops("Split", 2, w.linear("qkv", x, layer), columns, axis=-1)
        # Queries and keys go through rotary embedding and feature map together.
        if states.angles is not None:
            qk = rotate(b, qk, states.angles, spec, fused=fused)
        qk = b.op("Reshape", qk, b.ints(0, 0, heads + kv, size))
        projection = w.weight("proj.weight", Role.FEATURE_MAP, layer)
        features = b.op("Softmax", b.op("MatMul", qk, projection), axis=-1)
        scales = states.scales(layer)
        if scales is not None:
            features = b.op("Mul", features, scales)
        features = b.op("Reshape", features, b.ints(0, 0, (heads + kv) * size))
        q, k = b.ops("Split", 2, features, b.ints(heads * size, kv * size), axis=-1)
        k = b.op("Mul", k, states.mask)  # a padded key adds nothing
        out, state = self._core(b, q, k, v, states.past(layer), states.log_decay(layer), heads, kv)
        states.keep(state)
        weight, bias = (w.weight(f"group_norm.{part}", Role.NORM, layer) for part in ("weight", "bias"))
        normed = group_norm(b, out, weight, bias, spec, fused=fused)
        gate = silu(b, w.linear("gate", x, layer), fused=fused)
        return w.linear("out", b.op("Mul", gate, normed), layer)


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
        "Transpose", b.op("Reshape", q, b.ints(0, 0, kv_heads, shared, q_size(state))), perm=[0, 2, 3, 1, 4]
    )
    value = b.op("Unsqueeze", _by_head(b, v, size, [0, 2, 1, 3]), b.ints(2))
    key_columns = b.op("Unsqueeze", _by_head(b, k, size, [0, 2, 3, 1]), b.ints(2))
    running = b.op("CumSum", b.op("Transpose", log_decay, perm=[0, 2, 1]), b.constant(2, np.int64))
    to_t = b.op("Unsqueeze", running, b.ints(2, 4))  # [B, G, 1, T, 1]
    to_s = b.op("Unsqueeze", running, b.ints(2, 3))  # [B, G, 1, 1, T]
    weight = b.op("Exp", b.op("Add", b.op("Sub", to_t, to_s), _future(b, log_decay)))
    scores = b.op("Mul", b.op("MatMul", query, key_columns), weight)
    past = b.op("Unsqueeze", state, b.ints(2))
    carried = b.op("Mul", b.op("MatMul", query, past), b.op("Exp", to_t))
    out = b.op("Add", b.op("MatMul", scores, value), carried)
    out = b.op("Transpose", out, perm=[0, 3, 1, 2, 4])
    out = b.op("Reshape", out, b.ints(0, 0, -1))

    last = b.op("Gather", running, b.ints(-1), axis=2)  # [B, G, 1]
    remaining = b.op("Exp", b.op("Unsqueeze", b.op("Sub", last, running), b.ints(2, 3)))
    added = b.op("MatMul", b.op("Mul", key_columns, remaining), value)
    decayed = b.op("Mul", past, b.op("Exp", b.op("Unsqueeze", last, b.ints(2, 4))))
    return out, b.op("Squeeze", b.op("Add", decayed, added), b.ints(2))


def q_size(state: ir.Value) -> int:
    """K, from the declared shape of a state input [B, G, K, K]."""
    assert state.shape is not None
    return int(state.shape[2])


def _future(b: GraphBuilder, log_decay: ir.Value) -> ir.Value:
    """[1, 1, 1, T, T]: 0 where s <= t, a large negative number where s > t."""
    length = b.op("Gather", b.op("Shape", log_decay), b.constant(1, np.int64), axis=0)
    steps = b.op("Range", b.constant(0, np.int64), length, b.constant(1, np.int64))
    later = b.op("Less", b.op("Unsqueeze", steps, b.ints(0, 1, 2, 4)), b.op("Unsqueeze", steps, b.ints(0, 1, 2, 3)))
    return b.op("Mul", b.op("Cast", later, to=ir.DataType.FLOAT), b.constant(FUTURE))


def _by_head(b: GraphBuilder, x: ir.Value, shape: list[int], perm: list[int]) -> ir.Value:
    return b.op("Transpose", b.op("Reshape", x, b.constant(shape, np.int64)), perm=perm)


#: The fused node; the standard function of opset 27; MatMul and elementwise nodes only.
contrib = partial(RecurrentLayer, attend_contrib)
standard = partial(RecurrentLayer, partial(attend_contrib, domain=""))
primitive = partial(RecurrentLayer, attend_primitive)
