"""Float32 matmuls without a matmul: TensorRT-RTX has none for Turing (sm75)."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from .linear import integers, value_of
from .types import LOW


class ExpandMatMuls(InPlacePass):
    """a @ b in float32 becomes the sum over k of a[..., k, None] * b[..., k, :].

    That is for the recurrence and the feature map, whose matrices have a head's size. A float32
    projection would become a tensor of tokens * in * out: `dijiang build` refuses those before.
    """

    def call(self, model: ir.Model) -> PassResult:
        graph = model.graph
        columns, rows, summed = (integers(graph, [axis]) for axis in (-1, -3, -2))
        low = {v for v in graph.initializers.values() if v.dtype in LOW}
        found = []
        for node in graph:
            if node.op_type == "Cast":
                is_low = node.attributes["to"].as_int() in LOW
            else:
                is_low = any(v in low for v in node.inputs)
            if is_low:
                low.update(node.outputs)
            elif node.op_type == "MatMul":
                found.append(node)
        for node in found:
            a, b = (value_of(v) for v in node.inputs)
            left, right = ir.node("Unsqueeze", [a, columns]), ir.node("Unsqueeze", [b, rows])
            product = ir.node("Mul", [left.outputs[0], right.outputs[0]])
            total = ir.node("ReduceSum", [product.outputs[0], summed], {"keepdims": 0})
            ir.convenience.replace_nodes_and_values(
                graph, node, [node], [left, right, product, total], [node.outputs[0]], [total.outputs[0]]
            )
        return PassResult(model, modified=bool(found))
