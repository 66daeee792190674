"""Fold the weight and bias of a norm into the projections that follow it.

(n * g + h) W + b = n (diag(g) W) + (b + h W): afterwards every norm of the residual stream is the same
plain normalisation, so that two of them over one input become one.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, PostconditionError

from .linear import Linear, array_of, drop_unused_initializers, linear_at, shape_of, stored, value_of

NORM = "LayerNormalization"


class FoldNorms(InPlacePass):
    """Every norm whose uses are all linears loses its weight and bias to them.

    The last norm keeps its own: its bias would become one over the whole vocabulary.
    """

    def call(self, model: ir.Model) -> PassResult:
        graph = model.graph
        changed = False
        for node in list(graph):
            followers = self._followers(graph, node)
            if followers:
                self._fold(graph, node, followers)
                changed = True
        drop_unused_initializers(graph)
        return PassResult(model, modified=changed)

    def ensures(self, model: ir.Model) -> None:
        left = [n.name for n in model.graph if self._followers(model.graph, n)]
        if left:
            raise PostconditionError(f"norms with weights before linears are left: {left}")

    @staticmethod
    def _followers(graph: ir.Graph, node: ir.Node) -> list[Linear]:
        """The linears that take a norm's weights in; empty if there is nothing to fold."""
        if node.op_type != NORM or value_of(node.inputs[1]).name == ONES.format(_width(node)):
            return []
        found = [linear_at(use.node) for use in node.outputs[0].uses()]
        linears = [f for f in found if f is not None and f.output not in graph.outputs]
        return linears if len(linears) == len(found) else []

    @staticmethod
    def _fold(graph: ir.Graph, norm: ir.Node, followers: list[Linear]) -> None:
        scale = value_of(norm.inputs[1])
        shift = norm.inputs[2] if len(norm.inputs) > 2 else None
        for linear in followers:
            weight, bias = linear.weight, linear.bias
            name = str(weight.name)
            linear.matmul.replace_input_with(
                1, stored(graph, f"{name}.normed", shape_of(weight), _scaled(weight, scale))
            )
            if shift is None:
                continue
            total = stored(graph, f"{name}.bias", (linear.shape[1],), _shifted(weight, shift, bias))
            if linear.add is not None:
                linear.add.replace_input_with(1, total)
                continue
            output = linear.output
            add = ir.node("Add", [output, total])
            ir.convenience.replace_all_uses_with(output, add.outputs[0])
            add.replace_input_with(0, output)
            graph.insert_after(linear.matmul, [add])
        norm.replace_input_with(1, _ones(graph, _width(norm)))
        if shift is not None:
            norm.resize_inputs(2)


ONES = "ones.{}"


def _width(norm: ir.Node) -> int:
    return shape_of(value_of(norm.inputs[1]))[-1]


def _ones(graph: ir.Graph, width: int) -> ir.Value:
    name = ONES.format(width)
    return graph.initializers.get(name) or stored(graph, name, (width,), lambda: np.ones(width))


def _scaled(weight: ir.Value, scale: ir.Value) -> Callable[[], np.ndarray]:
    return lambda: array_of(weight).astype(np.float64) * array_of(scale).astype(np.float64)[:, None]


def _shifted(weight: ir.Value, shift: ir.Value, bias: ir.Value | None) -> Callable[[], np.ndarray]:
    def compute() -> np.ndarray:
        total: np.ndarray = array_of(shift).astype(np.float64) @ array_of(weight).astype(np.float64)
        return total if bias is None else total + array_of(bias)

    return compute
