"""The step graph of a model: prefill and decode step in one."""

from __future__ import annotations

from functools import partial

import onnx_ir as ir

from ..bundle import names
from ..models.activations import ACTIVATIONS
from ..recipe import GRAPHS, named
from .blocks import layer_norm, rms_norm
from .builder import GraphBuilder
from .layers import Source, Strategy
from .roles import Role


class Writer:
    """Writes the graph of a model; its weights are read when the graph is saved.

    Inputs: `input_ids`, `position_ids` [B, T] int64, `logit_indices` [B, N] int64 (which of the T tokens
    to return logits of), and what the layer strategy declares: `attention_mask` [B, T] int64 (0: padding,
    which leaves the state untouched) and the states [B, G, K, K] float32. Outputs: `logits` [B, N, vocab]
    float32, `next_tokens` [B, N] int64 (their argmax), states.

    Args:
        layers: how layers are written, see `graph.layers`.
        fused: whether norms, rotary embedding and activations are ONNX Runtime's own single nodes.
        ragged: whether a step may hold pieces of several sequences in one row.
    """

    def __init__(self, model: Source, layers: Strategy, *, opset: int, fused: bool, ragged: bool = False) -> None:
        self.model, self.spec, self.fused, self.ragged = model, model.spec, fused, ragged
        self.step: list[str | int] = ["batch", "sequence"]
        self.b = GraphBuilder(opset)
        self._layers = layers(self)

    @property
    def positions(self) -> ir.Value:
        """`position_ids`; declared where something reads them first."""
        return self.b.input(names.POSITION_IDS, ir.DataType.INT64, self.step)

    def write(self) -> ir.Model:
        """The whole graph."""
        b, spec = self.b, self.spec
        ids = b.input(names.INPUT_IDS, ir.DataType.INT64, self.step)
        kept = b.input(names.LOGIT_INDICES, ir.DataType.INT64, ["batch", "kept"])
        self._layers.declare()
        x = self._embed(ids)
        for layer in range(spec.num_layers):
            x = self._layer(layer, x)
        index = b.op("Unsqueeze", kept, b.ints(-1))
        logits = self._logits(b.op("GatherND", x, index, batch_dims=1))
        b.output(logits, names.LOGITS, ir.DataType.FLOAT, ["batch", "kept", spec.vocab_size])
        # On a GPU this is all that has to leave it.
        tokens = b.op("ArgMax", logits, axis=-1, keepdims=0)
        b.output(tokens, names.NEXT_TOKENS, ir.DataType.INT64, ["batch", "kept"])
        self._layers.finish()
        return b.model(f"dijiang_{spec.family}")

    def _embed(self, ids: ir.Value) -> ir.Value:
        """Hidden channels [B, T, d] of token ids."""
        b, spec = self.b, self.spec
        x = b.op("Gather", self.weight("embed.weight", Role.EMBEDDING), ids, axis=0)
        if spec.embedding_size is not None:
            x = self.linear("embed_in", x)
        if spec.learned_positions:
            table = self.weight("positions.weight", Role.TABLE)
            x = b.op("Add", x, b.op("Gather", table, self.positions, axis=0))
        return x

    def _logits(self, x: ir.Value) -> ir.Value:
        if self.spec.final_norm:
            x = self.norm("final_norm", x)
        if self.spec.embedding_size is not None:
            x = self.linear("embed_out", x)
        return self.linear("head", x, role=Role.HEAD)

    def _layer(self, layer: int, x: ir.Value) -> ir.Value:
        b, whole = self.b, self._layers.block(layer, x)
        if whole is not None:
            return whole
        if not self.spec.norm_first:
            attended = self._layers.attention(layer, x)
            x = self.norm("attn_norm", b.op("Add", x, attended), layer)
            return self.norm("mlp_norm", b.op("Add", x, self._mlp(layer, x)), layer)
        attended = self._layers.attention(layer, self.norm("attn_norm", x, layer))
        middle = b.op("Add", x, attended)
        source = x if self.spec.parallel_residual else middle
        return b.op("Add", middle, self._mlp(layer, self.norm("mlp_norm", source, layer)))

    def _mlp(self, layer: int, x: ir.Value) -> ir.Value:
        row, gated = ACTIVATIONS[self.spec.activation], self.spec.gated_mlp
        up = self.linear("mlp_up", x, layer)
        source = self.linear("mlp_gate", x, layer) if gated else up
        active = (row.fused if self.fused else row.nodes)(self.b, source)
        return self.linear("mlp_down", self.b.op("Mul", active, up) if gated else active, layer)

    def weight(self, module: str, role: Role, layer: int | None = None) -> ir.Value:
        """A stored tensor of the model; `layer` is None outside of the layers."""
        name = module if layer is None else f"layers.{layer}.{module}"
        weights = self.model.weights
        return self.b.weight(name, weights.shape(name), partial(weights.__getitem__, name), role, layer)

    def linear(self, module: str, x: ir.Value, layer: int | None = None, role: Role = Role.PROJECTION) -> ir.Value:
        """x W, + b where the model has one."""
        y = self.b.op("MatMul", x, self.weight(f"{module}.weight", role, layer))
        bias = f"{module}.bias" if layer is None else f"layers.{layer}.{module}.bias"
        if bias not in self.model.weights:
            return y
        return self.b.op("Add", y, self.weight(f"{module}.bias", Role.BIAS, layer))

    def norm(self, module: str, x: ir.Value, layer: int | None = None) -> ir.Value:
        """The model's norm over the last axis."""
        weight, eps = self.weight(f"{module}.weight", Role.NORM, layer), self.spec.norm_eps
        if self.spec.norm == "rms":
            return rms_norm(self.b, x, weight, eps)
        return layer_norm(self.b, x, weight, self.weight(f"{module}.bias", Role.NORM, layer), eps)


def write_graph(model: Source, graph: str) -> ir.Model:
    """The graph of a model in one of the forms of `recipe.GRAPHS`, before any pass."""
    row = GRAPHS[graph]
    return Writer(model, named(row.layer), opset=row.opset, fused=row.fused, ragged=row.ragged).write()
