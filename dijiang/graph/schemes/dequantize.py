"""Weights as blocks of integers with DequantizeLinear: the form that TensorRT parsers fuse.

They take no zero points, no 8-bit activations from DynamicQuantizeLinear, and only whole blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, PostconditionError

from ...recipe import Blocks, Graph, Recipe
from ..builder import ir_version
from ..passes.linear import Linear, Shared, array_of, drop_unused_initializers, linears, require_float32, stored
from ..roles import ROUNDED, Role
from ..rounding import POSITIVE, round_nearest
from . import Rounder

#: First opset whose DequantizeLinear has blocks and 4 bits.
BLOCK_OPSET = 21


@dataclass(frozen=True)
class Codes:
    """How a weight is stored: its type and the bits of it.

    blocks: input channels that share a scale: the first that divides them all.
    """

    dtype: ir.DataType
    bits: int
    blocks: tuple[int, ...]


#: By bits; the largest block that divides the input channels is taken.
CODES = {8: Codes(ir.DataType.INT8, 8, (64, 32, 16)), 4: Codes(ir.DataType.INT4, 4, (32, 16))}


class Dequantize:
    """See `graph.schemes.Scheme`: rounded to the nearest, in blocks that TensorRT reads; the embedding is not."""

    calibrates = False

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = replace(recipe, body=_whole(recipe.body), head=_whole(recipe.head), embed=None)

    def passes(self, row: Graph, *, tied: bool = False, rounder: Rounder | None = None) -> list[InPlacePass]:
        return [DequantizeWeights(self.recipe)]


class DequantizeWeights(InPlacePass):
    """Store every projection as codes and scales; the embedding and the feature map stay."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        assert recipe.body is not None
        self.body = CODES[recipe.body.bits]
        # The head keeps 8 bits: rounding it changes the most likely token most.
        self.head = CODES[8 if recipe.head is None else recipe.head.bits]

    def requires(self, model: ir.Model) -> None:
        require_float32(model.graph)

    def call(self, model: ir.Model) -> PassResult:
        graph = model.graph
        found = self._found(graph)
        for linear in found:
            codes = self.head if linear.role is Role.HEAD else self.body
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
            linear for linear in linears(graph) if linear.role in ROUNDED and block_of(linear.shape[0], CODES[4])
        ]


def _whole(blocks: Blocks | None) -> Blocks | None:
    """The blocks that stand for these where they divide the input channels."""
    return None if blocks is None else replace(blocks, block=CODES[blocks.bits].blocks[0], rotation=0)


def block_of(rows: int, codes: Codes) -> int:
    """Input channels that share a scale; 0: no block divides them."""
    return next((block for block in codes.blocks if rows % block == 0), 0)


def rounded(weight: np.ndarray, codes: Codes, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes [in, out] and scales [in / block, out], above 0, of a weight [in, out]."""
    found, scales = round_nearest(weight, codes.bits, block, POSITIVE)
    signed = (found - np.uint8(2 ** (codes.bits - 1))).view(np.int8)
    return signed.reshape(len(found), -1).T, scales.T


def _replace(graph: ir.Graph, linear: Linear, codes: Codes) -> None:
    weight, block = linear.weight, block_of(linear.shape[0], codes)
    (rows, columns), name = linear.shape, str(weight.name)
    parts = Shared(lambda: rounded(array_of(weight), codes, block))
    scales = stored(graph, f"{name}.scales", (rows // block, columns), lambda: parts.part(1), like=weight)
    packed = stored(graph, f"{name}.codes", (rows, columns), lambda: parts.part(0), codes.dtype, like=weight)
    node = ir.node("DequantizeLinear", [packed, scales], {"axis": 0, "block_size": block})
    graph.insert_before(linear.matmul, [node])
    linear.matmul.replace_input_with(1, node.outputs[0])
