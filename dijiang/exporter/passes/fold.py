"""Fold the weight and bias of a norm into the projections that follow it.

(n * g + h) W + b = n (diag(g) W) + (b + h W): afterwards every norm of the residual stream is the same
plain normalisation, so that two of them over one input become one. An RMSNorm has no h.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, PostconditionError

from .linear import Linear, array_of, drop_unused_initializers, linear_at, shape_of, stored, value_of

NORMS = ("LayerNormalization", "RMSNormalization")


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
        if node.op_type not in NORMS or value_of(node.inputs[1]).name == ONES.format(_width(node)):
            return []
        found = [linear_at(use.node) for use in node.outputs[0].uses()]
        linears = [f for f in found if f is not None and f.output not in graph.outputs]
        return linears if len(linears) == len(found) else []

    @staticmethod
    def _fold(graph: ir.Graph, norm: ir.Node, followers: list[Linear]) -> None:
        scale = value_of(norm.inputs[1])
        shift = norm.inputs[2] if len(norm.inputs) > 2 else None
        for linear in followers:
            weight = linear.weight
            name = str(weight.name)
            folded = _Folded(weight, scale, shift, linear.bias)
            linear.matmul.replace_input_with(
                1, stored(graph, f"{name}.normed", shape_of(weight), folded.weight)
            )
            if shift is None:
                continue
            total = stored(graph, f"{name}.bias", (linear.shape[1],), folded.bias)
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


class _Folded:
    """diag(g) W and b + h W; W is read once if the weight is asked for first."""

    #: Rows of W that are summed in float32 in h W; their sums are added up in float64.
    ROWS = 64

    def __init__(
        self, weight: ir.Value, scale: ir.Value, shift: ir.Value | None, bias: ir.Value | None
    ) -> None:
        self._weight, self._scale, self._shift, self._bias = weight, scale, shift, bias
        self._total: np.ndarray | None = None

    def weight(self) -> np.ndarray:
        """[in, out] float32; on the way the bias is computed and kept."""
        weight = array_of(self._weight)
        if self._shift is not None:
            self._total = self._sum(weight, array_of(self._shift))
        scaled: np.ndarray = weight * array_of(self._scale)[:, None]
        return scaled

    def bias(self) -> np.ndarray:
        """[out] float64."""
        assert self._shift is not None
        total, self._total = self._total, None
        if total is None:
            total = self._sum(array_of(self._weight), array_of(self._shift))
        return total if self._bias is None else total + array_of(self._bias)

    def _sum(self, weight: np.ndarray, shift: np.ndarray) -> np.ndarray:
        pieces = range(0, len(shift), self.ROWS)
        rows = [slice(start, start + self.ROWS) for start in pieces]
        return np.stack([shift[r] @ weight[r] for r in rows]).sum(axis=0, dtype=np.float64)
