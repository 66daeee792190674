"""Weights as blocks of integers with DequantizeLinear: the form that TensorRT parsers fuse.

They take no zero points, no 8-bit activations from DynamicQuantizeLinear, and only whole blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, PostconditionError

from ..builder import ir_version
from .linear import (
    Linear,
    Shared,
    array_of,
    drop_unused_initializers,
    linears,
    shape_of,
    stored,
    value_of,
)

#: First opset whose DequantizeLinear has blocks and 4 bits.
BLOCK_OPSET = 21


#: Scales tried with 4 bits, as shares of the one that just covers a block's largest weight.
SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)


@dataclass(frozen=True)
class Codes:
    """How a weight is stored: its type in ONNX and in NumPy, and the largest code.

    blocks: input channels that share a scale: the first that divides them all.
    """

    dtype: ir.DataType
    numpy: np.dtype
    largest: int
    blocks: tuple[int, ...]


#: Precision -> layers and head. The head keeps 8 bits: rounding it changes the most likely token most.
INT8 = Codes(ir.DataType.INT8, np.dtype(np.int8), 127, (64, 32, 16))
INT4 = Codes(ir.DataType.INT4, np.dtype(ml_dtypes.int4), 7, (32, 16))
WEIGHTS = {"int8": (INT8, INT8), "int4": (INT4, INT8)}


class DequantizeWeights(InPlacePass):
    """Store every projection as codes and scales; the embedding and the feature map stay."""

    def __init__(self, precision: str) -> None:
        super().__init__()
        self.body, self.head = WEIGHTS[precision]

    def call(self, model: ir.Model) -> PassResult:
        graph = model.graph
        found = self._found(graph)
        for linear in found:
            codes = self.head if linear.output in graph.outputs else self.body
            _replace(graph, linear, codes)
        drop_unused_initializers(graph)
        graph.opset_imports[""] = max(graph.opset_imports[""], BLOCK_OPSET)
        model.ir_version = max(model.ir_version, ir_version(BLOCK_OPSET))
        return PassResult(model, modified=bool(found))

    def ensures(self, model: ir.Model) -> None:
        left = [linear.weight.name for linear in self._found(model.graph)]
        if left:
            raise PostconditionError(f"weights are left in float32: {left}")

    @staticmethod
    def _found(graph: ir.Graph) -> list[Linear]:
        """Every linear but feature maps and those whose input no block divides."""
        return [
            linear
            for linear in linears(graph)
            if block_of(linear.shape[0], INT4)
            and not any(use.node.op_type == "Softmax" for use in linear.output.uses())
        ]


def block_of(rows: int, codes: Codes) -> int:
    """Input channels that share a scale; 0: no block divides them."""
    return next((block for block in codes.blocks if rows % block == 0), 0)


def rounded(weight: np.ndarray, codes: Codes, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes [in, out] and scales [in / block, out] of a weight [in, out]: w = code * scale.

    Of the scales that SHRINK tries, the one of least squared error; with 8 bits the first is it.
    """
    blocks = weight.astype(np.float32).reshape(-1, block, weight.shape[1])
    covering = np.abs(blocks).max(axis=1, keepdims=True) / codes.largest
    best, least = np.zeros_like(covering), np.full(covering.shape, np.inf, np.float32)
    found = np.zeros(blocks.shape, np.int8)
    for factor in SHRINK if codes.largest < 127 else SHRINK[:1]:
        scale = covering * np.float32(factor)
        tried = np.rint(blocks / np.where(scale == 0, 1, scale))
        tried = np.clip(tried, -codes.largest - 1, codes.largest)
        error = ((blocks - tried * scale) ** 2).sum(axis=1, keepdims=True)
        better = error < least
        best, least = np.where(better, scale, best), np.where(better, error, least)
        found = np.where(better, tried, found).astype(np.int8)
    return found.reshape(weight.shape).astype(codes.numpy), best[:, 0]


def _replace(graph: ir.Graph, linear: Linear, codes: Codes) -> None:
    weight, block = linear.weight, block_of(linear.shape[0], codes)
    (rows, columns), name = linear.shape, str(weight.name)
    parts = Shared(lambda: rounded(array_of(weight), codes, block))
    scales = stored(
        graph,
        f"{name}.scales",
        (rows // block, columns),
        lambda: parts.part(1),
    )
    packed = _stored_codes(graph, f"{name}.codes", weight, lambda: parts.part(0), codes)
    node = ir.node("DequantizeLinear", [packed, scales], {"axis": 0, "block_size": block})
    graph.insert_before(linear.matmul, [node])
    linear.matmul.replace_input_with(1, node.outputs[0])


def _stored_codes(
    graph: ir.Graph, name: str, weight: ir.Value, read: Callable[[], np.ndarray], codes: Codes
) -> ir.Value:
    def load() -> ir.TensorProtocol:
        return ir.tensor(read(), dtype=codes.dtype, name=name)

    shape = ir.Shape(shape_of(value_of(weight)))
    tensor = ir.LazyTensor(load, codes.dtype, shape, name=name)
    value = ir.Value(name=name, type=ir.TensorType(codes.dtype), shape=shape, const_value=tensor)
    graph.register_initializer(value)
    return value
