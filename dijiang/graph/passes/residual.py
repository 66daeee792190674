"""The sum of the residual stream and the norm that reads it, as one node."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir
from onnx_ir.convenience import replace_nodes_and_values

from ...nodes import CONTRIB, CUDA_DOMAIN
from .linear import is_vector, value_of
from .rewrite import Rewrite
from .types import MIXED

#: Norm of a sum -> ONNX Runtime's node that does both. Further outputs: mean, inverse deviation, the sum.
FUSED = {"LayerNormalization": "SkipLayerNormalization", "RMSNormalization": "SkipSimplifiedLayerNormalization"}
SUM_OUTPUT = 3


class FuseResidualNorms(Rewrite):
    """A sum and its norm become one node, which gives the sum out too.

    operators: domain of our `AddNorm`; empty: one of FUSED.
    """

    left = "sums with a norm of their own"

    def __init__(self, *, operators: str = "") -> None:
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
            fused = ir.node("AddNorm", inputs, attributes, domain=self._operators, num_outputs=2)
        else:
            attributes = {"epsilon": epsilon}
            fused = ir.node(FUSED[norm.op_type], inputs, attributes, domain=CONTRIB, num_outputs=SUM_OUTPUT + 1)
            for unused in fused.outputs[1:SUM_OUTPUT]:
                unused.name = ""
        graph.opset_imports.setdefault(fused.domain, 1)
        outputs = [fused.outputs[0], fused.outputs[-1]]
        replace_nodes_and_values(graph, add, [norm, add], [fused], [normed, total], outputs)


class FuseBiases(Rewrite):
    """A bias is added by the node of ours that reads the sum."""

    left = "biases that our nodes could add"

    def matches(self, graph: ir.Graph) -> Iterator[tuple[ir.Node, ir.Node]]:
        """(Add, node): a projection's sum with its bias, and what alone reads it."""
        for node in graph:
            if node.domain != CUDA_DOMAIN or node.op_type not in MIXED:
                continue
            add = value_of(node.inputs[MIXED[node.op_type][0]]).producer()
            if (
                add is not None
                and add.op_type == "Add"
                and is_vector(add.inputs[1])
                and len(add.outputs[0].uses()) == 1
            ):
                yield add, node

    def rewrite(self, graph: ir.Graph, add: ir.Node, node: ir.Node) -> None:
        """The node without the Add."""
        given, place = MIXED[node.op_type]
        node.resize_inputs(place + 1)
        node.replace_input_with(given, add.inputs[0])
        node.replace_input_with(place, add.inputs[1])
        graph.remove(add, safe=True)
