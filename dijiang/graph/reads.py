"""Bytes of parameters that a step of a graph reads."""

from __future__ import annotations

import onnx_ir as ir

#: Nodes that read rows of a table -> the inputs that are tables.
LOOKUPS = {
    "Gather": {0},
    "GatherBlockQuantized": {0, 2, 3},
    "RotaryEmbedding": {2, 3},
    "GroupQueryAttention": {7, 8},
}


def parameter_reads(model: ir.Model) -> dict[str, int]:
    """`step`: bytes that every step reads whatever the batch; `token`: of table rows, a token.

    A parameter that is only looked up costs one row a token; one that is used in any other way too
    (a tied head) is read whole.
    """
    step = token = 0
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is None:
            continue
        if all(use.idx in LOOKUPS.get(use.node.op_type, ()) for use in value.uses()):
            token += tensor.nbytes // max(int(tensor.shape[0]) if len(tensor.shape) else 1, 1)
        else:
            step += tensor.nbytes
    return {"step": step, "token": token}
