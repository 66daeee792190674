"""Layers with one node of our own for all that stands between the projections."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ...bundle import names
from ...errors import ExportError
from ...models.activations import ACTIVATIONS
from ...models.rotary import inverse_frequencies
from ...models.spec import ModelSpec
from ...nodes import CUDA_DOMAIN, DOMAIN
from ...runtime.operators import activation_number, longest_head
from ..blocks import rotary_angles
from ..builder import GraphBuilder
from ..roles import Role
from . import Frame
from .recurrent import States


class NativeLayer:
    """See `Layer`: projections, `RecurrentStep`, projections.

    The node reads and writes projections side by side, as Concat and Split; `passes.merge` makes one
    matmul of each side and nothing stays of the two. With a parallel residual the MLP's activation is
    in the node, too, if the operator has it.
    """

    #: Of the node; its outputs: what goes on, the state, and on a GPU room to work in.
    domain, outputs = DOMAIN, 2
    #: Makes the rotary angles.
    angles = staticmethod(rotary_angles)

    def __init__(self, writer: Frame) -> None:
        self.w, self.states = writer, States(writer, self.angles)
        self.finish = self.states.finish
        spec = writer.spec
        if spec.head_size > longest_head():
            raise ExportError(
                f"heads of {spec.head_size} channels do not fit the native graph, expected at "
                f"most {longest_head()}; export with --graph ort"
            )
        beside = spec.parallel_residual and spec.norm_first and not spec.gated_mlp
        self._activation = ACTIVATIONS[spec.activation].operator if beside else None

    def declare(self) -> None:
        self.states.declare()
        self._starts: list[ir.Value] = []
        if self.w.ragged:
            self._starts.append(self.w.b.input(names.SEQUENCE_STARTS, ir.DataType.INT64, ["borders"]))

    def block(self, layer: int, x: ir.Value) -> ir.Value | None:
        if self._activation is None:
            return None
        w, b, spec = self.w, self.w.b, self.w.spec
        projected = self._projected(layer, w.norm("attn_norm", x, layer))
        projected.append(w.linear("mlp_up", w.norm("mlp_norm", x, layer), layer))
        out = self._step(layer, projected, activation_number(self._activation))
        widths = b.constant([spec.hidden_size, spec.intermediate_size], np.int64)
        attended, active = b.ops("Split", 2, out, widths, axis=-1)
        middle = b.op("Add", x, w.linear("out", attended, layer))
        return b.op("Add", middle, w.linear("mlp_down", active, layer))

    def attention(self, layer: int, x: ir.Value) -> ir.Value:
        return self.w.linear("out", self._step(layer, self._projected(layer, x)), layer)

    def _projected(self, layer: int, x: ir.Value) -> list[ir.Value]:
        return [self.w.linear(name, x, layer) for name in ("qkv", "gate")]

    def _step(self, layer: int, projected: list[ir.Value], activation: int = 0) -> ir.Value:
        """The node: q, k, v and gate, and MLP-up if there is an activation for it (0: there is none)."""
        w, b, spec, states = self.w, self.w.b, self.w.spec, self.states
        out, state, *_ = b.ops(
            "RecurrentStep",
            self.outputs,
            b.op("Concat", *projected, axis=-1),
            w.weight("proj.weight", Role.FEATURE_MAP, layer),
            states.log_decay(layer),
            states.mask,
            states.past(layer),
            w.weight("group_norm.weight", Role.NORM, layer),
            w.weight("group_norm.bias", Role.NORM, layer),
            *(states.angles or (None, None)),
            states.scales(layer),
            *self._starts,
            domain=self.domain,
            num_heads=spec.num_heads,
            kv_num_heads=spec.num_kv_heads,
            activation=activation,
            epsilon=spec.group_norm_eps,
        )
        states.keep(state)
        return out


class CudaLayer(NativeLayer):
    """The same with the node whose kernels a GPU runs."""

    domain, outputs = CUDA_DOMAIN, 3

    @staticmethod
    def angles(
        b: GraphBuilder, positions: ir.Value, spec: ModelSpec, limit: int | None
    ) -> tuple[ir.Value, ir.Value]:
        """See `rotary_angles`: one node, which computes them in float64."""
        frequencies = b.constant(inverse_frequencies(spec), np.float64)
        cos, sin = b.ops("RotaryAngles", 2, positions, frequencies, domain=CUDA_DOMAIN)
        return cos, sin
