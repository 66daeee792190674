"""What WebGPU's kernels compute too coarsely, said in other nodes."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from .linear import integers
from .rewrite import Rewrite


class CentreNorms(Rewrite):
    """A LayerNormalization becomes the RMSNormalization of x minus its mean.

    WebGPU's LayerNormalization sums x and x^2 in one pass: where the mean is 1,000 times the deviation,
    nothing is left. Its RMSNormalization of what is centred is exact, and gives 0 where squares overflow.
    """

    left = "norms that subtract the mean inside"

    def matches(self, graph: ir.Graph) -> Iterator[tuple[ir.Node]]:
        """(norm,)."""
        return ((node,) for node in graph if node.op_type == "LayerNormalization")

    def rewrite(self, graph: ir.Graph, norm: ir.Node) -> None:
        """Three nodes, and a fourth for the bias, in the place of one."""
        x, weight, *bias = norm.inputs
        mean = ir.node("ReduceMean", [x, integers(graph, [-1])], {"keepdims": 1})
        centred = ir.node("Sub", [x, mean.outputs[0]])
        attributes = {name: norm.attributes[name].value for name in ("axis", "epsilon")}
        nodes = [mean, centred, ir.node("RMSNormalization", [centred.outputs[0], weight], attributes)]
        if bias:
            nodes.append(ir.node("Add", [nodes[-1].outputs[0], bias[0]]))
        ir.convenience.replace_nodes_and_values(
            graph, norm, [norm], nodes, [norm.outputs[0]], [nodes[-1].outputs[0]]
        )
