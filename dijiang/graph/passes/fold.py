"""Fold the weight and bias of a norm into the projections that follow it.

(n * g + h) W + b = n (diag(g) W) + (b + h W): afterwards every norm of the residual stream is the same
plain normalisation, so that two of them over one input become one. An RMSNorm has no h.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import onnx_ir as ir

from ..roles import Role, mark, role_of
from .linear import Linear, Shared, array_of, linear_at, shape_of, stored, value_of
from .rewrite import Rewrite

#: Nodes whose second input is a norm's weight. Mul: the last node of an RMSNorm in basic nodes.
NORMS = ("LayerNormalization", "RMSNormalization", "Mul")
#: Rows of W that are summed in float32 in h W.
ROWS = 64


class FoldNorms(Rewrite):
    """Every norm whose uses are all linears loses its weight and bias to them.

    The last norm keeps its own: its bias would become one over the whole vocabulary.
    """

    left = "norms with weights before linears"

    def matches(self, graph: ir.Graph) -> Iterator[tuple[ir.Node, list[Linear]]]:
        """(norm, the linears that take its weights in)."""
        for node in graph:
            if node.op_type not in NORMS or role_of(node.inputs[1]) is not Role.NORM:
                continue
            found = [linear_at(use.node) for use in node.outputs[0].uses()]
            linears = [f for f in found if f is not None and f.role is not Role.HEAD]
            if linears and len(linears) == len(found):
                yield node, linears

    def rewrite(self, graph: ir.Graph, norm: ir.Node, followers: list[Linear]) -> None:
        """The norm's weight and bias go into the weights and biases of the linears."""
        scale = value_of(norm.inputs[1])
        shift = norm.inputs[2] if len(norm.inputs) > 2 else None
        for linear in followers:
            weight = linear.weight
            name = str(weight.name)
            folded = Shared(partial(_folded, weight, scale, shift, linear.bias))
            linear.matmul.replace_input_with(
                1, stored(graph, f"{name}.normed", shape_of(weight), partial(folded.part, 0), like=weight)
            )
            if shift is None:
                continue
            total = stored(graph, f"{name}.bias", (linear.shape[1],), partial(folded.part, 1))
            mark(total, Role.BIAS)
            if linear.add is not None:
                linear.add.replace_input_with(1, total)
                continue
            output = linear.output
            add = ir.node("Add", [output, total])
            ir.convenience.replace_all_uses_with(output, add.outputs[0])
            add.replace_input_with(0, output)
            graph.insert_after(linear.matmul, [add])
        if norm.op_type == "Mul":
            ir.convenience.replace_all_uses_with(norm.outputs[0], value_of(norm.inputs[0]))
            graph.remove(norm, safe=True)
            return
        norm.replace_input_with(1, _ones(graph, shape_of(scale)[-1]))
        if shift is not None:
            norm.resize_inputs(2)


def _ones(graph: ir.Graph, width: int) -> ir.Value:
    name = f"ones.{width}"
    return graph.initializers.get(name) or stored(graph, name, (width,), lambda: np.ones(width))


def _folded(
    weight: ir.Value, scale: ir.Value, shift: ir.Value | None, bias: ir.Value | None
) -> tuple[np.ndarray, ...]:
    """diag(g) W, float32 [in, out]; and b + h W, float64 [out], where there is an h."""
    matrix = array_of(weight)
    biases = [] if shift is None else [_product(array_of(shift), matrix)]
    if biases and bias is not None:
        biases[0] += array_of(bias)
    return (matrix * array_of(scale)[:, None], *biases)


def _product(vector: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """vector @ matrix: ROWS rows are summed in float32, their sums in float64."""
    pieces = range(0, len(vector), ROWS)
    rows = [slice(start, start + ROWS) for start in pieces]
    return np.stack([vector[r] @ matrix[r] for r in rows]).sum(axis=0, dtype=np.float64)
