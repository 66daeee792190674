"""Weights as blocks of integers, in the nodes that ONNX Runtime multiplies them with directly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx_ir as ir
from onnx_ir.convenience import replace_nodes_and_values
from onnx_ir.passes import InPlacePass, PassResult, PostconditionError

from ..builder import CONTRIB
from ..precision import Precision, Rounding
from ..rounding import pack, round_gptq, round_nearest
from .linear import (
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

#: MatMulNBits multiplies in int8 at this level: activations are rounded by blocks too.
INT8_ACTIVATIONS = 4
#: At this one it multiplies in the type of the activations.
EXACT_ACTIVATIONS = 0
SMALLEST_BLOCK = 16


class Quantize(InPlacePass):
    """Every projection, the head and the embedding as a Precision says; P stays float32.

    The weights are rounded while the graph is written, one at a time.

    moments: second moments of the inputs by weight name (`calibration`), for those that are rounded to
        4 bits; used up on the way.
    tied: the head is the transposed embedding: where its blocks fit a row, both read the head's codes.
    cuda: activations are not rounded, and biases are added by nodes of their own, as older CUDA kernels
        take none.
    """

    def __init__(
        self,
        precision: Precision,
        moments: dict[str, np.ndarray] | None = None,
        *,
        tied: bool = False,
        cuda: bool = False,
    ) -> None:
        super().__init__()
        self.precision, self.tied, self.cuda = precision, tied, cuda
        self.moments = moments or {}

    def requires(self, model: ir.Model) -> None:
        require_float32(model.graph)

    def call(self, model: ir.Model) -> PassResult:
        graph = model.graph
        found = [
            (linear, rounding)
            for linear in linears(graph)
            if (rounding := self._rounding(graph, linear))
        ]
        embedding = self._embedding(graph)
        for linear, rounding in found:
            moment = self.moments.pop(str(linear.weight.name), None) if rounding.bits == 4 else None
            is_tied = self.tied and linear.output in graph.outputs
            width = linear.shape[0]
            codes, scales = _quantize_linear(graph, linear, rounding, moment, cuda=self.cuda)
            if embedding and is_tied and width % rounding.block == 0:
                _look_up_blocks(graph, embedding[0], codes, scales, rounding)
                embedding = None
        if embedding:
            _quantize_embedding(graph, *embedding)
        drop_unused_initializers(graph)
        graph.opset_imports.setdefault(CONTRIB, 1)
        return PassResult(model, modified=bool(found or embedding))

    def ensures(self, model: ir.Model) -> None:
        left = [x.weight.name for x in linears(model.graph) if self._rounding(model.graph, x)]
        if left or self._embedding(model.graph):
            raise PostconditionError(f"weights are left in float32: {left or 'embedding'}")

    def _rounding(self, graph: ir.Graph, linear: Linear) -> Rounding | None:
        if any(use.node.op_type == "Softmax" for use in linear.output.uses()):
            return None  # the feature map's P
        return self.precision.head if linear.output in graph.outputs else self.precision.body

    def _embedding(self, graph: ir.Graph) -> tuple[ir.Node, Rounding] | None:
        """The Gather of the token embedding, by the graph's first input, and how to round it.

        A row must be whole blocks: they are halved until they fit; a width that no block fits stays.
        """
        uses = graph.inputs[0].uses()
        gather = next((u.node for u in uses if u.node.op_type == "Gather" and u.idx == 1), None)
        if gather is None or self.precision.embed is None:
            return None
        width, block = shape_of(value_of(gather.inputs[0]))[1], self.precision.embed.block
        while width % block:
            block //= 2
        return (gather, replace(self.precision.embed, block=block)) if block >= SMALLEST_BLOCK else None


def _rounded(
    read: Callable[[], np.ndarray], rounding: Rounding, moment: np.ndarray | None
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
    name: str,
    shape: tuple[int, int],
    read: Callable[[], np.ndarray],
    rounding: Rounding,
    *,
    moment: np.ndarray | None = None,
    flat: bool = False,
) -> list[ir.Value]:
    """Initializers of a weight [in, out]: codes and scales, each [out, ...]."""
    rows, columns = shape
    blocks = -(-rows // rounding.block)
    size = rounding.block * rounding.bits // 8
    rounded = Shared(lambda: _rounded(read, rounding, moment))
    packed = (columns, blocks * size) if flat else (columns, blocks, size)
    return [
        stored(
            graph, f"{name}.codes", packed, lambda: rounded.part(0).reshape(packed), ir.DataType.UINT8
        ),
        stored(graph, f"{name}.scales", (columns, blocks), lambda: rounded.part(1)),
    ]


def _quantize_linear(
    graph: ir.Graph, linear: Linear, rounding: Rounding, moment: np.ndarray | None, *, cuda: bool
) -> list[ir.Value]:
    """Replace a linear by MatMulNBits; its codes [out, blocks, bytes] and scales [out, blocks]."""
    if cuda:
        linear = replace(linear, add=None)  # it stays as it is
    weight, (rows, columns) = linear.weight, linear.shape
    parts = _stored_blocks(
        graph, str(weight.name), (rows, columns), lambda: array_of(weight), rounding, moment=moment
    )
    bias = [] if linear.bias is None else [None, None, linear.bias]
    node = ir.node(
        "MatMulNBits",
        [linear.input, *parts, *bias],
        {
            "K": rows,
            "N": columns,
            "bits": rounding.bits,
            "block_size": rounding.block,
            "accuracy_level": EXACT_ACTIVATIONS if cuda else INT8_ACTIVATIONS,
        },
        domain=CONTRIB,
    )
    replace_nodes_and_values(
        graph, linear.nodes[0], linear.nodes, [node], [linear.output], [node.outputs[0]]
    )
    return parts


def _look_up_blocks(
    graph: ir.Graph, gather: ir.Node, codes: ir.Value, scales: ir.Value, rounding: Rounding
) -> None:
    """Rows of a tied embedding from the head's own codes, [vocab, blocks, bytes].

    ONNX Runtime keeps the codes mapped from the file: sharing them costs no memory of its own.
    """
    last = ir.node("Unsqueeze", [scales, _constant(graph, [-1])])
    rows = _lookup(gather, codes, last.outputs[0], rounding, axis=2)  # [B, T, blocks, block]
    flat = ir.node("Reshape", [rows.outputs[0], _constant(graph, [0, 0, -1])])
    replace_nodes_and_values(
        graph, gather, [gather], [last, rows, flat], [gather.outputs[0]], [flat.outputs[0]]
    )


def _constant(graph: ir.Graph, values: list[int]) -> ir.Value:
    name = "sharing_" + "_".join(map(str, values))
    return stored(graph, name, (len(values),), lambda: np.array(values), ir.DataType.INT64)


def _lookup(
    gather: ir.Node, codes: ir.Value, scales: ir.Value, rounding: Rounding, axis: int
) -> ir.Node:
    return ir.node(
        "GatherBlockQuantized",
        [codes, gather.inputs[1], scales],
        {"bits": rounding.bits, "block_size": rounding.block, "gather_axis": 0, "quantize_axis": axis},
        domain=CONTRIB,
    )


def _quantize_embedding(graph: ir.Graph, gather: ir.Node, rounding: Rounding) -> None:
    table = value_of(gather.inputs[0])
    rows, width = shape_of(table)
    codes, scales = _stored_blocks(
        graph, str(table.name), (width, rows), lambda: array_of(table).T, rounding, flat=True
    )
    node = _lookup(gather, codes, scales, rounding, axis=1)
    replace_nodes_and_values(graph, gather, [gather], [node], [gather.outputs[0]], [node.outputs[0]])
