"""Weights as blocks of integers, in the nodes that ONNX Runtime multiplies them with directly."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx_ir as ir
from onnx_ir.convenience import replace_nodes_and_values
from onnx_ir.passes import InPlacePass, PassResult, PostconditionError

from ...nodes import CONTRIB, DOMAIN
from ...recipe import Blocks, Graph, Recipe
from ..passes.linear import (
    Linear,
    Shared,
    array_of,
    drop_unused_initializers,
    integers,
    linears,
    require_float32,
    shape_of,
    stored,
    value_of,
)
from ..roles import ROUNDED, Role, role_of
from ..rounding import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    Inputs,
    ScaleType,
    hadamard,
    pack,
    rotate,
    rotate_both,
    round_gptq,
    round_nearest,
)
from . import Moments, Rounder

#: MatMulNBits multiplies in int8 at this level: activations are rounded by blocks too.
INT8_ACTIVATIONS = 4
#: At this one it multiplies in the type of the activations.
EXACT_ACTIVATIONS = 0
SMALLEST_BLOCK = 16


class NBits:
    """See `graph.schemes.Scheme`: activations are rounded to 8 bits by blocks, too.

    brief: how scales of two bytes are rounded, and the type of what is stored.
    """

    level, bias_inside, brief = INT8_ACTIVATIONS, True, (BFLOAT16, ir.DataType.BFLOAT16)

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    @property
    def calibrates(self) -> bool:
        return self.recipe.in_blocks

    def scales(self, blocks: Blocks) -> tuple[ScaleType, ir.DataType]:
        """How the scales of blocks are rounded, and stored."""
        return self.brief if blocks.scale_bytes == 2 else (FLOAT32, ir.DataType.FLOAT)

    def passes(self, row: Graph, *, tied: bool = False, rounder: Rounder | None = None) -> list[InPlacePass]:
        return [Quantize(self, row, rounder or nearest, tied=tied)]


class GpuNBits(NBits):
    """As NBits, for CUDA: activations are not rounded, and biases are added by nodes of their own, as
    older kernels take none. One row of the embedding is read in a step: it stays in fp16, whose lookup
    is exact. Scales take the type of the activations, as its kernels want them: `passes.types` stores them in it.
    """

    level, bias_inside, brief = EXACT_ACTIVATIONS, False, (FLOAT16, ir.DataType.FLOAT)

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(replace(recipe, embed=None))


class Quantize(InPlacePass):
    """Every projection, the head and the embedding as a recipe says.

    The weights are rounded while the graph is written, one at a time.

    row: the form of the graph: where it says so, our own matmul mixes and rounds its inputs itself.
    tied: the head is the transposed embedding: where its blocks fit a row, both read the head's codes.
    """

    def __init__(self, scheme: NBits, row: Graph, rounder: Rounder, *, tied: bool = False) -> None:
        super().__init__()
        self.scheme, self.recipe, self.row, self.tied = scheme, scheme.recipe, row, tied
        self.rounder = rounder

    def requires(self, model: ir.Model) -> None:
        require_float32(model.graph)

    def call(self, model: ir.Model) -> PassResult:
        graph = model.graph
        found = [(linear, rounding) for linear in linears(graph) if (rounding := self._rounding(linear))]
        embedding = self._embedding(graph)
        for linear, rounding in found:
            is_tied = self.tied and linear.role is Role.HEAD
            width = linear.shape[0]
            parts = self._store(graph, linear, rounding)
            if embedding and is_tied and width % rounding.block == 0:
                _look_up_blocks(graph, embedding[0], parts, rounding)
                embedding = None
        if embedding:
            self._quantize_embedding(graph, *embedding)
        drop_unused_initializers(graph)
        for domain in (CONTRIB, *((DOMAIN,) if self.row.matmul else ())):
            graph.opset_imports.setdefault(domain, 1)
        return PassResult(model, modified=bool(found or embedding))

    def ensures(self, model: ir.Model) -> None:
        left = [x.weight.name for x in linears(model.graph) if self._rounding(x)]
        if left or self._embedding(model.graph):
            raise PostconditionError(f"weights are left in float32: {left or 'embedding'}")

    def _store(self, graph: ir.Graph, linear: Linear, rounding: Blocks) -> tuple[ir.Value, ir.Value]:
        """Replace a linear; its codes [out, blocks, bytes] and scales [out, blocks]."""
        if not self.scheme.bias_inside:
            linear = replace(linear, add=None)  # it stays as it is
        weight, (rows, columns) = linear.weight, linear.shape
        parts = self._blocks(graph, weight, (rows, columns), lambda: array_of(weight), rounding, self.rounder)
        size = rotation_of(rounding, rows)
        attributes = {"K": rows, "N": columns, "bits": rounding.bits, "block_size": rounding.block}
        if self.row.matmul:
            bias = [] if linear.bias is None else [linear.bias]
            attributes["rotation"] = size
            nodes = [ir.node("MatMul", [linear.input, *parts, *bias], attributes, domain=DOMAIN)]
        else:
            bias = [] if linear.bias is None else [None, None, linear.bias]
            attributes["accuracy_level"] = EXACT_ACTIVATIONS if self.row.exact else self.scheme.level
            nodes, mixed = _rotate(graph, linear.input, size)
            casts, scales = _widened(parts[1])
            nodes += casts
            nodes.append(ir.node("MatMulNBits", [mixed, parts[0], scales, *bias], attributes, domain=CONTRIB))
        replace_nodes_and_values(
            graph, linear.nodes[0], linear.nodes, nodes, [linear.output], [nodes[-1].outputs[0]]
        )
        return parts

    def _blocks(
        self,
        graph: ir.Graph,
        source: ir.Value,
        shape: tuple[int, int],
        read: Callable[[], np.ndarray],
        rounding: Blocks,
        rounder: Rounder,
        *,
        flat: bool = False,
    ) -> tuple[ir.Value, ir.Value]:
        """Initializers of a weight [in, out]: codes and scales, each [out, ...]."""
        (rows, columns), name = shape, str(source.name)
        blocks, size = -(-rows // rounding.block), rounding.block * rounding.bits // 8
        kind, type_ = self.scheme.scales(rounding)
        rounded = Shared(lambda: rounder(name, read, rounding, kind))
        packed = (columns, blocks * size) if flat else (columns, blocks, size)
        return (
            stored(
                graph,
                f"{name}.codes",
                packed,
                lambda: rounded.part(0).reshape(packed),
                ir.DataType.UINT8,
                like=source,
            ),
            stored(graph, f"{name}.scales", (columns, blocks), lambda: rounded.part(1), type_, like=source),
        )

    def _quantize_embedding(self, graph: ir.Graph, gather: ir.Node, rounding: Blocks) -> None:
        table = value_of(gather.inputs[0])
        rows, width = shape_of(table)
        codes, scales = self._blocks(
            graph, table, (width, rows), lambda: array_of(table).T, rounding, nearest, flat=True
        )
        casts, scales = _widened(scales)
        node = _lookup(gather, codes, scales, rounding, axis=1)
        replace_nodes_and_values(graph, gather, [gather], [*casts, node], [gather.outputs[0]], [node.outputs[0]])

    def _rounding(self, linear: Linear) -> Blocks | None:
        if linear.role not in ROUNDED:
            return None  # the feature map's P
        return self.recipe.head if linear.role is Role.HEAD else self.recipe.projection(str(linear.weight.name))

    def _embedding(self, graph: ir.Graph) -> tuple[ir.Node, Blocks] | None:
        """The Gather of the token embedding, and how to round it: never rotated, as one row is read a token.

        A row must be whole blocks: they are halved until they fit; a width that no block fits stays.
        """
        gather = next((n for n in graph if n.op_type == "Gather" and role_of(n.inputs[0]) is Role.EMBEDDING), None)
        if gather is None or self.recipe.embed is None:
            return None
        width, block = shape_of(value_of(gather.inputs[0]))[1], self.recipe.embed.block
        while width % block:
            block //= 2
        return (gather, replace(self.recipe.embed, block=block, rotation=0)) if block >= SMALLEST_BLOCK else None


def nearest(
    name: str, read: Callable[[], np.ndarray], rounding: Blocks, kind: ScaleType
) -> tuple[np.ndarray, np.ndarray]:
    """See `Rounder`: each weight by itself."""
    codes, scales = round_nearest(mixed_weight(read(), rounding), rounding.bits, rounding.block, kind)
    return pack(codes, rounding.bits), scales


def calibrated(moments: Moments) -> Rounder:
    """By the moments of the weights' inputs: GPTQ."""

    def rounder(
        name: str, read: Callable[[], np.ndarray], rounding: Blocks, kind: ScaleType
    ) -> tuple[np.ndarray, np.ndarray]:
        weight = mixed_weight(read(), rounding)
        codes, scales = round_by(weight, rounding, kind, mixed_inputs(moments(name), rounding))
        return pack(codes, rounding.bits), scales

    return rounder


def round_by(
    weight: np.ndarray, rounding: Blocks, kind: ScaleType, inputs: Inputs
) -> tuple[np.ndarray, np.ndarray]:
    """Codes uint8 [out, blocks, block] and scales float32 [out, blocks] of a mixed weight, by GPTQ."""
    return round_gptq(weight, rounding.bits, rounding.block, inputs, kind)


def mixed_weight(weight: np.ndarray, rounding: Blocks) -> np.ndarray:
    """A weight [in, out] as it is rounded."""
    return rotate(weight, rotation_of(rounding, len(weight)))


def mixed_inputs(moment: np.ndarray, rounding: Blocks) -> Inputs:
    """Inputs of a second moment [in, in], mixed as the weights are; it is overwritten."""
    return Inputs.of(rotate_both(moment, rotation_of(rounding, len(moment))), rounding.block)


def rotation_of(rounding: Blocks, width: int) -> int:
    """Channels that are mixed: the largest power of two that divides the width; 1: none."""
    return math.gcd(width, rounding.rotation or 1)


def _rotate(graph: ir.Graph, value: ir.Value, size: int) -> tuple[list[ir.Node], ir.Value]:
    """Nodes that mix each `size` channels of [B, T, in] as the rows of the weights were."""
    if size <= 1:
        return [], value
    name = f"hadamard_{size}"
    matrix = graph.initializers.get(name) or stored(graph, name, (size, size), lambda: hadamard(size))
    split = ir.node("Reshape", [value, integers(graph, [0, 0, -1, size])])
    mixed = ir.node("MatMul", [split.outputs[0], matrix])
    back = ir.node("Reshape", [mixed.outputs[0], integers(graph, [0, 0, -1])])
    return [split, mixed, back], back.outputs[0]


def _widened(scales: ir.Value) -> tuple[list[ir.Node], ir.Value]:
    """Scales in float32, as ONNX Runtime's nodes take them: it casts them once, when a graph is opened."""
    if scales.dtype == ir.DataType.FLOAT:
        return [], scales
    cast = ir.node("Cast", [scales], {"to": ir.DataType.FLOAT})
    return [cast], cast.outputs[0]


def _look_up_blocks(graph: ir.Graph, gather: ir.Node, parts: tuple[ir.Value, ir.Value], rounding: Blocks) -> None:
    """Rows of a tied embedding from the head's own codes, [vocab, blocks, bytes].

    ONNX Runtime keeps the codes mapped from the file: sharing them costs no memory of its own.
    """
    codes, (casts, scales) = parts[0], _widened(parts[1])
    last = ir.node("Unsqueeze", [scales, integers(graph, [-1])])
    rows = _lookup(gather, codes, last.outputs[0], rounding, axis=2)  # [B, T, blocks, block]
    flat = ir.node("Reshape", [rows.outputs[0], integers(graph, [0, 0, -1])])
    # What was mixed is mixed back: the matrix is its own inverse.
    size = rotation_of(rounding, shape_of(value_of(gather.inputs[0]))[1])
    rotation, x = _rotate(graph, flat.outputs[0], size)
    nodes = [*casts, last, rows, flat, *rotation]
    replace_nodes_and_values(graph, gather, [gather], nodes, [gather.outputs[0]], [x])


def _lookup(gather: ir.Node, codes: ir.Value, scales: ir.Value, rounding: Blocks, axis: int) -> ir.Node:
    return ir.node(
        "GatherBlockQuantized",
        [codes, gather.inputs[1], scales],
        {"bits": rounding.bits, "block_size": rounding.block, "gather_axis": 0, "quantize_axis": axis},
        domain=CONTRIB,
    )
