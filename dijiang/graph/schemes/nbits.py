"""Weights as blocks of integers, in the nodes that ONNX Runtime multiplies them with directly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx_ir as ir
from onnx_ir.convenience import replace_nodes_and_values
from onnx_ir.passes import InPlacePass, PassResult, PostconditionError

from ...models.activations import CONTRIB
from ...recipe import Blocks, Recipe
from ..passes.linear import (
    Linear,
    Shared,
    array_of,
    drop_unused_initializers,
    linears,
    require_float32,
    shape_of,
    stored,
    value_of,
)
from ..roles import ROUNDED, Role, role_of
from ..rounding import pack, round_gptq, round_nearest
from . import Moments

#: MatMulNBits multiplies in int8 at this level: activations are rounded by blocks too.
INT8_ACTIVATIONS = 4
#: At this one it multiplies in the type of the activations.
EXACT_ACTIVATIONS = 0
SMALLEST_BLOCK = 16


#: Bits up to which weights are rounded by what the inputs look like.
GPTQ_BITS = 4


class NBits:
    """See `graph.schemes.Scheme`: activations are rounded to 8 bits by blocks, too."""

    level, bias_inside = INT8_ACTIVATIONS, True

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    @property
    def calibrates(self) -> bool:
        """See `Scheme.calibrates`."""
        return self.recipe.body is not None and self.recipe.body.bits <= GPTQ_BITS

    def passes(self, *, tied: bool = False, moments: Moments | None = None) -> list[InPlacePass]:
        """See `Scheme.passes`."""
        return [Quantize(self, moments, tied=tied)]


class GpuNBits(NBits):
    """As NBits, for CUDA: activations are not rounded, and biases are added by nodes of their own, as
    older kernels take none. One row of the embedding is read in a step: it stays in fp16, whose lookup
    is exact.
    """

    level, bias_inside = EXACT_ACTIVATIONS, False

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(replace(recipe, embed=None))


class Quantize(InPlacePass):
    """Every projection, the head and the embedding as a recipe says.

    The weights are rounded while the graph is written, one at a time.

    moments: second moments of the inputs by weight name (`exporter.calibration`), for those that are
        rounded by them; used up on the way.
    tied: the head is the transposed embedding: where its blocks fit a row, both read the head's codes.
    """

    def __init__(self, scheme: NBits, moments: Moments | None = None, *, tied: bool = False) -> None:
        super().__init__()
        self.scheme, self.recipe, self.tied = scheme, scheme.recipe, tied
        self.moments = moments or {}

    def requires(self, model: ir.Model) -> None:
        require_float32(model.graph)

    def call(self, model: ir.Model) -> PassResult:
        graph = model.graph
        found = [(linear, rounding) for linear in linears(graph) if (rounding := self._rounding(linear))]
        embedding = self._embedding(graph)
        for linear, rounding in found:
            moment = self.moments.pop(str(linear.weight.name), None)
            moment = moment if rounding.bits <= GPTQ_BITS else None
            is_tied = self.tied and linear.role is Role.HEAD
            width = linear.shape[0]
            codes, scales = _quantize_linear(graph, linear, rounding, moment, self.scheme)
            if embedding and is_tied and width % rounding.block == 0:
                _look_up_blocks(graph, embedding[0], codes, scales, rounding)
                embedding = None
        if embedding:
            _quantize_embedding(graph, *embedding)
        drop_unused_initializers(graph)
        graph.opset_imports.setdefault(CONTRIB, 1)
        return PassResult(model, modified=bool(found or embedding))

    def ensures(self, model: ir.Model) -> None:
        left = [x.weight.name for x in linears(model.graph) if self._rounding(x)]
        if left or self._embedding(model.graph):
            raise PostconditionError(f"weights are left in float32: {left or 'embedding'}")

    def _rounding(self, linear: Linear) -> Blocks | None:
        if linear.role not in ROUNDED:
            return None  # the feature map's P
        return self.recipe.head if linear.role is Role.HEAD else self.recipe.body

    def _embedding(self, graph: ir.Graph) -> tuple[ir.Node, Blocks] | None:
        """The Gather of the token embedding, and how to round it.

        A row must be whole blocks: they are halved until they fit; a width that no block fits stays.
        """
        gather = next((n for n in graph if n.op_type == "Gather" and role_of(n.inputs[0]) is Role.EMBEDDING), None)
        if gather is None or self.recipe.embed is None:
            return None
        width, block = shape_of(value_of(gather.inputs[0]))[1], self.recipe.embed.block
        while width % block:
            block //= 2
        return (gather, replace(self.recipe.embed, block=block)) if block >= SMALLEST_BLOCK else None


def _rounded(
    read: Callable[[], np.ndarray], rounding: Blocks, moment: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Packed codes uint8 [out, blocks, bytes] and scales float32 [out, blocks] of a weight."""
    bits, block = rounding.bits, rounding.block
    if moment is None:
        codes, scales = round_nearest(read(), bits, block)
    else:
        codes, scales = round_gptq(read(), bits, block, moment)
    return pack(codes, bits), scales


def _stored_blocks(
    graph: ir.Graph,
    source: ir.Value,
    shape: tuple[int, int],
    read: Callable[[], np.ndarray],
    rounding: Blocks,
    *,
    moment: np.ndarray | None = None,
    flat: bool = False,
) -> list[ir.Value]:
    """Initializers of a weight [in, out]: codes and scales, each [out, ...]."""
    (rows, columns), name = shape, str(source.name)
    blocks = -(-rows // rounding.block)
    size = rounding.block * rounding.bits // 8
    rounded = Shared(lambda: _rounded(read, rounding, moment))
    packed = (columns, blocks * size) if flat else (columns, blocks, size)
    return [
        stored(
            graph,
            f"{name}.codes",
            packed,
            lambda: rounded.part(0).reshape(packed),
            ir.DataType.UINT8,
            like=source,
        ),
        stored(graph, f"{name}.scales", (columns, blocks), lambda: rounded.part(1), like=source),
    ]


def _quantize_linear(
    graph: ir.Graph, linear: Linear, rounding: Blocks, moment: np.ndarray | None, scheme: NBits
) -> list[ir.Value]:
    """Replace a linear by MatMulNBits; its codes [out, blocks, bytes] and scales [out, blocks]."""
    if not scheme.bias_inside:
        linear = replace(linear, add=None)  # it stays as it is
    weight, (rows, columns) = linear.weight, linear.shape
    parts = _stored_blocks(graph, weight, (rows, columns), lambda: array_of(weight), rounding, moment=moment)
    bias = [] if linear.bias is None else [None, None, linear.bias]
    node = ir.node(
        "MatMulNBits",
        [linear.input, *parts, *bias],
        {
            "K": rows,
            "N": columns,
            "bits": rounding.bits,
            "block_size": rounding.block,
            "accuracy_level": scheme.level,
        },
        domain=CONTRIB,
    )
    replace_nodes_and_values(graph, linear.nodes[0], linear.nodes, [node], [linear.output], [node.outputs[0]])
    return parts


def _look_up_blocks(graph: ir.Graph, gather: ir.Node, codes: ir.Value, scales: ir.Value, rounding: Blocks) -> None:
    """Rows of a tied embedding from the head's own codes, [vocab, blocks, bytes].

    ONNX Runtime keeps the codes mapped from the file: sharing them costs no memory of its own.
    """
    last = ir.node("Unsqueeze", [scales, _constant(graph, [-1])])
    rows = _lookup(gather, codes, last.outputs[0], rounding, axis=2)  # [B, T, blocks, block]
    flat = ir.node("Reshape", [rows.outputs[0], _constant(graph, [0, 0, -1])])
    replace_nodes_and_values(graph, gather, [gather], [last, rows, flat], [gather.outputs[0]], [flat.outputs[0]])


def _constant(graph: ir.Graph, values: list[int]) -> ir.Value:
    name = "sharing_" + "_".join(map(str, values))
    return stored(graph, name, (len(values),), lambda: np.array(values), ir.DataType.INT64)


def _lookup(gather: ir.Node, codes: ir.Value, scales: ir.Value, rounding: Blocks, axis: int) -> ir.Node:
    return ir.node(
        "GatherBlockQuantized",
        [codes, gather.inputs[1], scales],
        {"bits": rounding.bits, "block_size": rounding.block, "gather_axis": 0, "quantize_axis": axis},
        domain=CONTRIB,
    )


def _quantize_embedding(graph: ir.Graph, gather: ir.Node, rounding: Blocks) -> None:
    table = value_of(gather.inputs[0])
    rows, width = shape_of(table)
    codes, scales = _stored_blocks(graph, table, (width, rows), lambda: array_of(table).T, rounding, flat=True)
    node = _lookup(gather, codes, scales, rounding, axis=1)
    replace_nodes_and_values(graph, gather, [gather], [node], [gather.outputs[0]], [node.outputs[0]])
