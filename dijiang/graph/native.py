"""The native dialect: all of a layer between its projections is one node of our own."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ..errors import ExportError
from ..models.decay import Decay
from ..models.load import DijiangModel
from ..runtime.native import activation_number, longest_head
from .attention import DIALECTS
from .writer import Writer

DOMAIN = "dijiang"
#: hidden_act of a config -> the operator's name of it.
ACTIVATIONS = {
    "relu": "relu",
    "silu": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


class NativeWriter(Writer):
    """Layers as projections, `RecurrentStep`, projections.

    The node reads and writes projections side by side, as Concat and Split; `passes.merge` makes one
    matmul of each side and nothing stays of the two.
    """

    def __init__(self, model: DijiangModel) -> None:
        super().__init__(model, DIALECTS["native"])
        if self.spec.head_size > longest_head():
            raise ExportError(
                f"heads of {self.spec.head_size} channels do not fit the native dialect, expected at "
                f"most {longest_head()}; export with --dialect ort"
            )

    def _layer(self, layer: int, decay: Decay, x: ir.Value, past: ir.Value) -> tuple[ir.Value, ir.Value]:
        b, spec, prefix = self.b, self.spec, f"layers.{layer}"
        if not spec.parallel_residual or not spec.norm_first or spec.gated_mlp:
            return super()._layer(layer, decay, x, past)
        projected = self._projected(prefix, self._norm(f"{prefix}.attn_norm", x))
        projected.append(self._linear(f"{prefix}.mlp_up", self._norm(f"{prefix}.mlp_norm", x)))
        number = activation_number(ACTIVATIONS[spec.activation])
        out, state = self._step(prefix, decay, projected, past, number)
        widths = b.constant([spec.hidden_size, spec.intermediate_size], np.int64)
        attended, active = b.ops("Split", 2, out, widths, axis=-1)
        middle = b.op("Add", x, self._linear(f"{prefix}.out", attended))
        return b.op("Add", middle, self._linear(f"{prefix}.mlp_down", active)), state

    def _attention(
        self, prefix: str, decay: Decay, x: ir.Value, past: ir.Value
    ) -> tuple[ir.Value, ir.Value]:
        out, state = self._step(prefix, decay, self._projected(prefix, x), past)
        return self._linear(f"{prefix}.out", out), state

    def _projected(self, prefix: str, x: ir.Value) -> list[ir.Value]:
        return [self._linear(f"{prefix}.{name}", x) for name in ("qkv", "gate")]

    def _step(
        self, prefix: str, decay: Decay, projected: list[ir.Value], past: ir.Value, activation: int = 0
    ) -> tuple[ir.Value, ir.Value]:
        """The node: q, k, v and gate, and MLP-up if there is an activation for it (0: there is none)."""
        b, spec = self.b, self.spec
        out, state = b.ops(
            "RecurrentStep",
            2,
            b.op("Concat", *projected, axis=-1),
            self._weight(f"{prefix}.proj.weight"),
            self._log_decay(decay),
            self.mask,
            past,
            self._weight(f"{prefix}.group_norm.weight"),
            self._weight(f"{prefix}.group_norm.bias"),
            *(self.angles if spec.rotary_dims else (None, None)),
            self._scales(decay),
            domain=DOMAIN,
            num_heads=spec.num_heads,
            kv_num_heads=spec.num_kv_heads,
            activation=activation,
            epsilon=spec.group_norm_eps,
        )
        return out, state
