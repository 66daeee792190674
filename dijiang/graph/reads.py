"""Bytes of parameters that a step of a graph reads."""

from __future__ import annotations

import onnx_ir as ir

from .roles import LOOKED_UP, role_of


def parameter_reads(model: ir.Model) -> dict[str, int]:
    """`step`: bytes that every step reads whatever the batch; `token`: of table rows, a token.

    A table that is only looked up costs one row a token; a tied head has the role of the head, and is
    read whole.
    """
    step = token = 0
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is None:
            continue
        if role_of(value) in LOOKED_UP:
            token += tensor.nbytes // max(int(tensor.shape[0]) if len(tensor.shape) else 1, 1)
        else:
            step += tensor.nbytes
    return {"step": step, "token": token}


def weight_bytes(model: ir.Model) -> int:
    """Bytes of all stored tensors of a graph."""
    return sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value)
