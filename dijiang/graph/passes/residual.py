"""The sum of the residual stream and the norm that reads it, as ONNX Runtime's one node."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir
from onnx_ir.convenience import replace_nodes_and_values

from ...nodes import CONTRIB
from .linear import is_vector, value_of
from .rewrite import Rewrite

#: Norm of a sum -> the node that does both. Further outputs: mean, inverse deviation, the sum.
FUSED = {
    "LayerNormalization": "SkipLayerNormalization",
    "RMSNormalization": "SkipSimplifiedLayerNormalization",
}
SUM_OUTPUT = 3


class FuseResidualNorms(Rewrite):
    """A sum and its norm become one node of FUSED, which gives the sum out too."""

    left = "sums with a norm of their own"

    def matches(self, graph: ir.Graph) -> Iterator[tuple[ir.Node, ir.Node]]:
        """(Add, norm): a sum of two activations, normalised by a node that is its first reader."""
        for norm in list(graph):
            add = value_of(norm.inputs[0]).producer() if norm.op_type in FUSED else None
            if (
                add is not None
                and add.op_type == "Add"
                and not any(value_of(value).is_initializer() for value in add.inputs)
                and all(is_vector(value) for value in norm.inputs[1:])
            ):
                yield add, norm

    def rewrite(self, graph: ir.Graph, add: ir.Node, norm: ir.Node) -> None:
        """One node in the place of two."""
        graph.opset_imports.setdefault(CONTRIB, 1)
        total, normed = add.outputs[0], norm.outputs[0]
        fused = ir.node(
            FUSED[norm.op_type],
            [*add.inputs, *norm.inputs[1:]],
            {"epsilon": norm.attributes["epsilon"].as_float()},
            domain=CONTRIB,
            num_outputs=SUM_OUTPUT + 1,
        )
        for unused in fused.outputs[1:SUM_OUTPUT]:
            unused.name = ""
        replace_nodes_and_values(
            graph,
            add,
            [norm, add],
            [fused],
            [normed, total],
            [fused.outputs[0], fused.outputs[SUM_OUTPUT]],
        )
