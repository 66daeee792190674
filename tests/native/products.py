"""Single nodes `MatMul`: cases, and their float64 oracle."""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np
from onnx import TensorProto, helper

from dijiang.graph.rounding import BFLOAT16, FLOAT32, hadamard, pack, round_nearest

#: Rows of a call whose results are kept; those of shorter calls must be its first.
ROWS = 40
#: Calls of fewer rows: each is another path somewhere.
FEWER = (1, 2, 3, 7, 8, 16, 17, 33)


@dataclass(frozen=True)
class Case:
    """A weight [inputs, outputs], mixed by `rotation` inputs (1: not at all), in blocks; bytes of a scale."""

    inputs: int
    outputs: int
    bits: int = 8
    block: int = 64
    rotation: int = 64
    bias: bool = False
    scale_bytes: int = 2


CASES = {
    "8-bits": Case(128, 128),
    "8-bits-float32-scales": Case(192, 50, bias=True, scale_bytes=4),
    "8-bits-one-block": Case(64, 40),
    "8-bits-odd-blocks": Case(320, 80),
    "8-bits-odd-outputs-bias": Case(576, 101, bias=True),
    "8-bits-one-output": Case(64, 1),
    "8-bits-not-mixed": Case(256, 48, rotation=1),
    "8-bits-blocks-of-128": Case(640, 80, block=128),
    "8-bits-blocks-of-256": Case(512, 33, block=256),
    "8-bits-blocks-of-16": Case(96, 33, block=16, rotation=32),
    "8-bits-last-block-not-full": Case(130, 33, block=32, rotation=2),
    "8-bits-long-output": Case(64, 13312, bias=True),
    "8-bits-long-odd-output": Case(64, 13313),
    "4-bits": Case(128, 64, bits=4),
    "4-bits-float32-scales": Case(192, 50, bits=4, scale_bytes=4),
    "4-bits-odd-blocks": Case(192, 70, bits=4),
    "4-bits-odd-outputs-bias": Case(576, 161, bits=4, bias=True),
    "4-bits-blocks-of-32": Case(96, 17, bits=4, block=32, rotation=32),
    "4-bits-last-block-not-full": Case(100, 7, bits=4, block=16, rotation=4),
    "4-bits-blocks-of-128": Case(384, 70, bits=4, block=128),
}


@dataclass(frozen=True)
class Product:
    """Arrays of a case: x float32 [ROWS, in], codes uint8 [out, blocks, block], scales [out, blocks]."""

    case: Case
    x: np.ndarray
    codes: np.ndarray
    scales: np.ndarray
    bias: np.ndarray | None

    @classmethod
    def of(cls, case: Case) -> Product:
        """Rows of very different sizes, one of zeros, and an input channel that stands out."""
        draw = np.random.default_rng(case.inputs + case.outputs)
        weight = draw.standard_normal((case.inputs, case.outputs)).astype(np.float32)
        x = draw.standard_normal((ROWS, case.inputs)) * 10.0 ** draw.uniform(-3, 3, (ROWS, 1))
        x[:, 5] *= 50
        x[4] = 0
        bias = draw.standard_normal(case.outputs).astype(np.float32) if case.bias else None
        codes, scales = round_nearest(weight, case.bits, case.block, FLOAT32 if case.scale_bytes == 4 else BFLOAT16)
        return cls(case, x.astype(np.float32), codes, scales, bias)

    def rounded(self) -> tuple[np.ndarray, np.ndarray]:
        """The input as the operator rounds it: integers and scales by blocks, in float64.

        A number half-way between two codes may fall on either side: float32 mixes it in another order.
        """
        case = self.case
        mixed = self.x.astype(np.float64).reshape(ROWS, -1, case.rotation) @ hadamard(case.rotation)
        padded = np.zeros((ROWS, self.codes[0].size))
        padded[:, : case.inputs] = mixed.reshape(ROWS, -1)
        blocks = padded.reshape(ROWS, -1, case.block)
        scale = np.abs(blocks).max(-1) / 127
        return np.rint(blocks / np.where(scale, scale, 1)[..., None]), scale

    def oracle(self) -> np.ndarray:
        """Output [ROWS, out] in float64."""
        integers, scale = self.rounded()
        weight = (self.codes.astype(np.float64) - 2 ** (self.case.bits - 1)) * self.scales[..., None]
        y = np.einsum("rbk,rb,obk->ro", integers, scale, weight, optimize=True)
        return y if self.bias is None else y + self.bias

    def step(self) -> np.ndarray:
        """What one code more or less can change: [ROWS, out]."""
        _, scale = self.rounded()
        return scale.max(-1)[:, None] * (np.abs(self.scales) * 2 ** (self.case.bits - 1)).max(-1)

    def model(self, **changed: int) -> bytes:
        """A model of this one node; `changed` attributes make it a wrong one."""
        case, packed = self.case, pack(self.codes, self.case.bits)
        scales = (TensorProto.FLOAT, self.scales)
        if case.scale_bytes == 2:
            scales = (TensorProto.BFLOAT16, self.scales.astype(ml_dtypes.bfloat16))
        stored = {"codes": (TensorProto.UINT8, packed), "scales": scales}
        if self.bias is not None:
            stored["bias"] = (TensorProto.FLOAT, self.bias)
        attributes = {
            "K": case.inputs,
            "N": case.outputs,
            "bits": case.bits,
            "block_size": case.block,
            "rotation": case.rotation,
        }
        node = helper.make_node("MatMul", ["x", *stored], ["y"], domain="dijiang", **(attributes | changed))
        graph = helper.make_graph(
            [node],
            "product",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "tokens", case.inputs])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "tokens", case.outputs])],
            [
                helper.make_tensor(name, kind, array.shape, np.ascontiguousarray(array).tobytes(), raw=True)
                for name, (kind, array) in stored.items()
            ],
        )
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("dijiang", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()
