"""The sum of the residual stream and the norm that reads it, as one node."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir
from onnx_ir.convenience import replace_nodes_and_values

from ...nodes import CONTRIB, DOMAIN
from .linear import is_vector, value_of
from .rewrite import Rewrite

#: Norm of a sum -> ONNX Runtime's node that does both. Further outputs: mean, inverse deviation, the sum.
FUSED = {
    "LayerNormalization": "SkipLayerNormalization",
    "RMSNormalization": "SkipSimplifiedLayerNormalization",
}
SUM_OUTPUT = 3


class FuseResidualNorms(Rewrite):
    """A sum and its norm become one node, which gives the sum out too.

    operators: our `AddNorm`; else one of FUSED.
    """

    left = "sums with a norm of their own"

    def __init__(self, *, operators: bool = False) -> None:
        super().__init__()
        self._operators = operators

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
        total, normed = add.outputs[0], norm.outputs[0]
        inputs, epsilon = [*add.inputs, *norm.inputs[1:]], norm.attributes["epsilon"].as_float()
        if self._operators:
            attributes = {"epsilon": epsilon, "centred": int(norm.op_type == "LayerNormalization")}
            fused = ir.node("AddNorm", inputs, attributes, domain=DOMAIN, num_outputs=2)
        else:
            attributes = {"epsilon": epsilon}
            fused = ir.node(FUSED[norm.op_type], inputs, attributes, domain=CONTRIB, num_outputs=SUM_OUTPUT + 1)
            for unused in fused.outputs[1:SUM_OUTPUT]:
                unused.name = ""
        graph.opset_imports.setdefault(fused.domain, 1)
        outputs = [fused.outputs[0], fused.outputs[-1]]
        replace_nodes_and_values(graph, add, [norm, add], [fused], [normed, total], outputs)
