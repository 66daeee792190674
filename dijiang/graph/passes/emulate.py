"""What a graph in fp16 or bf16 computes, written in float32: for a CPU that has no such kernels.

Every value of the 16-bit type becomes a float32 that is rounded to it. A node is then computed in
float32 and rounded once, as kernels with float32 accumulators do.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, PostconditionError

from ...nodes import DOMAIN
from ..builder import lazy
from .linear import shape_of
from .types import FLOAT, LOW, UNTYPED, typed_outputs

#: Nodes that move data: what they give is as round as what they get.
MOVES = frozenset(
    ("Concat", "Gather", "GatherND", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze")
)


class Emulate(InPlacePass):
    """Replace 16-bit floats by rounded float32."""

    def call(self, model: ir.Model) -> PassResult:
        graph = model.graph
        low = {v: v.dtype for v in graph.initializers.values() if is_computed_in(v)}
        for value in low:
            _widen(value)
        changed = bool(low)
        for node in list(graph):
            dtype = _result_type(node, low)
            if dtype is None:
                continue
            changed = True
            outputs = typed_outputs(node)
            low.update(dict.fromkeys(outputs, dtype))
            if node.op_type not in MOVES:
                low.update({_rounded(graph, node, output, dtype): dtype for output in outputs})
        return PassResult(model, modified=changed)

    def ensures(self, model: ir.Model) -> None:
        left = [v.name for v in model.graph.initializers.values() if is_computed_in(v)]
        if left:
            raise PostconditionError(f"16-bit weights are left: {left}")


def is_computed_in(value: ir.Value) -> bool:
    """Whether a stored value has a 16-bit type, and a node computes in it.

    Scales of blocks are only kept in such a type: they are cast to float32, by a node or inside of ours.
    """
    return value.dtype in LOW and not all(_widens(use.node) for use in value.uses())


def _widens(node: ir.Node) -> bool:
    """Whether a node takes what is stored in a 16-bit type as float32."""
    return node.domain == DOMAIN or (node.op_type == "Cast" and node.attributes["to"].as_int() == FLOAT)


def _result_type(node: ir.Node, low: dict[ir.Value, ir.DataType]) -> ir.DataType | None:
    """The 16-bit type of a node's outputs, if they have one."""
    if node.op_type == "Cast":
        to = ir.DataType(node.attributes["to"].as_int())
        return to if to in LOW else None
    if node.op_type in UNTYPED:
        return None
    return next((low[v] for v in node.inputs if v in low), None)


def _widen(value: ir.Value) -> None:
    """A stored value of the same name as float32, read when the graph is written."""
    value.const_value = lazy(str(value.name), shape_of(value), value.const_value.numpy)
    value.type = ir.TensorType(FLOAT)


def _rounded(graph: ir.Graph, node: ir.Node, output: ir.Value, dtype: ir.DataType) -> ir.Value:
    """All uses of an output get it rounded to dtype, as float32."""
    new = []
    if node.op_type != "Cast":
        new.append(ir.node("Cast", [output], {"to": dtype}))
    new.append(ir.node("Cast", [new[0].outputs[0] if new else output], {"to": FLOAT}))
    result = new[-1].outputs[0]
    for use in list(output.uses()):
        if use.node not in new:
            use.node.replace_input_with(use.idx, result)
    graph.insert_after(node, new)
    output.type = output.shape = None  # of the old type, where they were known
    return result
