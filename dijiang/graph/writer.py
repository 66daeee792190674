"""The recurrent-step graph of a model: prefill and decode step in one."""

from __future__ import annotations

from functools import partial

import numpy as np
import onnx_ir as ir

from ..bundle import names
from ..errors import ExportError
from ..models.decay import Decay
from ..models.load import DijiangModel
from .attention import Dialect
from .blocks import (
    ACTIVATIONS,
    activation,
    group_norm,
    layer_norm,
    rms_norm,
    rotary_angles,
    rotate,
    silu,
)
from .builder import GraphBuilder


class Writer:
    """Writes the graph of a checkpoint; its weights are read when the graph is saved.

    Inputs: `input_ids`, `position_ids`, `attention_mask` [B, T] int64 (mask 0: padding, which
    leaves the state untouched), `logit_indices` [B, N] int64 (which of the T tokens to return
    logits of), and the states [B, G, K, K] float32. Outputs: `logits` [B, N, vocab] float32,
    `next_tokens` [B, N] int64 (their argmax), states.

    Raises:
        ExportError: the activation is unknown.
    """

    def __init__(self, model: DijiangModel, dialect: Dialect) -> None:
        if model.spec.activation not in ACTIVATIONS:
            raise ExportError(
                f"config.json: hidden_act {model.spec.activation!r} is not supported, expected one of "
                f"{', '.join(ACTIVATIONS)}"
            )
        self.model, self.spec, self.dialect = model, model.spec, dialect
        self.b = GraphBuilder(dialect.opset)
        self._log_decays: dict[bytes, ir.Value] = {}

    def write(self) -> ir.Model:
        b, spec = self.b, self.spec
        step: list[str | int] = ["batch", "sequence"]
        ids = b.input(names.INPUT_IDS, ir.DataType.INT64, step)
        self.positions = b.input(names.POSITION_IDS, ir.DataType.INT64, step)
        mask = b.input(names.ATTENTION_MASK, ir.DataType.INT64, step)
        kept = b.input(names.LOGIT_INDICES, ir.DataType.INT64, ["batch", "kept"])
        state_shape: list[str | int] = ["batch", *spec.state_shape]
        pasts = [
            b.input(names.past_state(i), ir.DataType.FLOAT, state_shape) for i in range(spec.num_layers)
        ]
        self.mask = b.op(
            "Unsqueeze", b.op("Cast", mask, to=ir.DataType.FLOAT), b.constant([-1], np.int64)
        )
        if spec.rotary_dims:
            self.angles = rotary_angles(b, self.positions, spec, self.model.positions_limit)
        x = self._embed(ids)
        states = []
        for layer, (decay, past) in enumerate(zip(self.model.decays, pasts, strict=True)):
            x, state = self._layer(layer, decay, x, past)
            states.append(state)
        index = b.op("Unsqueeze", kept, b.constant([-1], np.int64))
        logits = self._logits(b.op("GatherND", x, index, batch_dims=1))
        b.output(logits, names.LOGITS, ir.DataType.FLOAT, ["batch", "kept", spec.vocab_size])
        # On a GPU this is all that has to leave it.
        tokens = b.op("ArgMax", logits, axis=-1, keepdims=0)
        b.output(tokens, names.NEXT_TOKENS, ir.DataType.INT64, ["batch", "kept"])
        for layer, state in enumerate(states):
            b.output(state, names.present_state(layer), ir.DataType.FLOAT, state_shape)
        return b.model(f"dijiang_{spec.family}", {})

    def _embed(self, ids: ir.Value) -> ir.Value:
        """Hidden channels [B, T, d] of token ids."""
        b, spec = self.b, self.spec
        x = b.op("Gather", self._weight("embed.weight"), ids, axis=0)
        if spec.embedding_size is not None:
            x = self._linear("embed_in", x)
        if spec.learned_positions:
            rows = b.op("Gather", self._weight("positions.weight"), self.positions, axis=0)
            x = b.op("Add", x, rows)
        return x

    def _logits(self, x: ir.Value) -> ir.Value:
        if self.spec.final_norm:
            x = self._norm("final_norm", x)
        if self.spec.embedding_size is not None:
            x = self._linear("embed_out", x)
        return self._linear("head", x)

    def _layer(self, layer: int, decay: Decay, x: ir.Value, past: ir.Value) -> tuple[ir.Value, ir.Value]:
        b, prefix = self.b, f"layers.{layer}"
        if not self.spec.norm_first:
            attended, state = self._attention(prefix, decay, x, past)
            x = self._norm(f"{prefix}.attn_norm", b.op("Add", x, attended))
            return self._norm(f"{prefix}.mlp_norm", b.op("Add", x, self._mlp(prefix, x))), state
        attended, state = self._attention(prefix, decay, self._norm(f"{prefix}.attn_norm", x), past)
        middle = b.op("Add", x, attended)
        source = x if self.spec.parallel_residual else middle
        return b.op("Add", middle, self._mlp(prefix, self._norm(f"{prefix}.mlp_norm", source))), state

    def _mlp(self, prefix: str, x: ir.Value) -> ir.Value:
        gated = self.spec.gated_mlp
        up = self._linear(f"{prefix}.mlp_up", x)
        source = self._linear(f"{prefix}.mlp_gate", x) if gated else up
        active = activation(self.b, source, self.spec.activation, fused=self.dialect.fused)
        return self._linear(f"{prefix}.mlp_down", self.b.op("Mul", active, up) if gated else active)

    def _attention(
        self, prefix: str, decay: Decay, x: ir.Value, past: ir.Value
    ) -> tuple[ir.Value, ir.Value]:
        b, spec = self.b, self.spec
        heads, kv, size = spec.num_heads, spec.num_kv_heads, spec.head_size
        columns = b.constant([(heads + kv) * size, kv * size], np.int64)
        qk, v = b.ops("Split", 2, self._linear(f"{prefix}.qkv", x), columns, axis=-1)
        # Queries and keys go through rotary embedding and feature map together.
        if spec.rotary_dims:
            qk = rotate(b, qk, self.angles, spec, fused=self.dialect.fused)
        qk = b.op("Reshape", qk, b.constant([0, 0, heads + kv, size], np.int64))
        features = b.op("Softmax", b.op("MatMul", qk, self._weight(f"{prefix}.proj.weight")), axis=-1)
        scales = self._scales(decay)
        if scales is not None:
            features = b.op("Mul", features, scales)
        features = b.op("Reshape", features, b.constant([0, 0, (heads + kv) * size], np.int64))
        q, k = b.ops("Split", 2, features, b.constant([heads * size, kv * size], np.int64), axis=-1)
        k = b.op("Mul", k, self.mask)  # a padded key adds nothing
        assert self.dialect.attend is not None
        out, state = self.dialect.attend(b, q, k, v, past, self._log_decay(decay), heads, kv)
        normed = group_norm(
            b,
            out,
            self._weight(f"{prefix}.group_norm.weight"),
            self._weight(f"{prefix}.group_norm.bias"),
            spec,
            fused=self.dialect.fused,
        )
        gate = silu(b, self._linear(f"{prefix}.gate", x), fused=self.dialect.fused)
        return self._linear(f"{prefix}.out", b.op("Mul", gate, normed)), state

    def _scales(self, decay: Decay) -> ir.Value | None:
        """Query scale u and key scale w [B, T, H + G, 1] of the tokens' positions; None: all 1."""
        if decay.u is None or decay.w is None:
            return None
        u = np.repeat(decay.u, self.spec.num_heads // self.spec.num_kv_heads, axis=0)
        scales = self.b.constant(np.concatenate([u, decay.w]).T[..., None])
        return self.b.op("Gather", scales, self.positions, axis=0)

    def _log_decay(self, decay: Decay) -> ir.Value:
        """[B, T, G], 0 where a token is padding; one node for all layers of the same gamma."""
        key = decay.gamma.tobytes()
        if key not in self._log_decays:
            table = self.b.constant(np.log(decay.gamma)[None, None])
            self._log_decays[key] = self.b.op("Mul", self.mask, table)
        return self._log_decays[key]

    def _weight(self, name: str) -> ir.Value:
        weights = self.model.weights
        return self.b.weight(name, weights.shape(name), partial(weights.__getitem__, name))

    def _linear(self, name: str, x: ir.Value) -> ir.Value:
        y = self.b.op("MatMul", x, self._weight(f"{name}.weight"))
        if f"{name}.bias" not in self.model.weights:
            return y
        return self.b.op("Add", y, self._weight(f"{name}.bias"))

    def _norm(self, name: str, x: ir.Value) -> ir.Value:
        weight, eps = self._weight(f"{name}.weight"), self.spec.norm_eps
        if self.spec.norm == "rms":
            return rms_norm(self.b, x, weight, eps)
        return layer_norm(self.b, x, weight, self._weight(f"{name}.bias"), eps)
