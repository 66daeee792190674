"""What a stored tensor is: said by the writer, read by passes.

The role and the layer are in the value's `metadata_props`, which go into the file: a graph that is read
back is cut into parts by the same words.
"""

from __future__ import annotations

from enum import Enum

import onnx_ir as ir

ROLE, LAYER = "dijiang.role", "dijiang.layer"


class Role(str, Enum):
    """Roles of stored tensors. A table is read row by row; the embedding is one with its own rounding."""

    EMBEDDING = "embedding"
    TABLE = "table"
    PROJECTION = "projection"
    HEAD = "head"
    FEATURE_MAP = "feature map"
    NORM = "norm"
    BIAS = "bias"


#: Weights that are rounded to blocks of integers.
ROUNDED = frozenset({Role.PROJECTION, Role.HEAD})
#: A step reads one row a token of these.
LOOKED_UP = frozenset({Role.EMBEDDING, Role.TABLE})


def mark(value: ir.Value, role: Role, layer: int | None = None) -> ir.Value:
    """Say what a tensor is; `layer` is None outside of the layers."""
    value.metadata_props[ROLE] = role.value
    if layer is not None:
        value.metadata_props[LAYER] = str(layer)
    return value


def mark_like(value: ir.Value, other: ir.Value) -> ir.Value:
    """Give a tensor the role and layer of the one it is made from."""
    value.metadata_props.update(
        {key: other.metadata_props[key] for key in (ROLE, LAYER) if key in other.metadata_props}
    )
    return value


def role_of(value: ir.Value | None) -> Role | None:
    """The role of a tensor; that of its codes, where it is computed from some."""
    if value is None:
        return None
    if (found := value.metadata_props.get(ROLE)) is not None:
        return Role(found)
    producer = value.producer()
    if producer is not None and producer.op_type == "DequantizeLinear":
        return role_of(producer.inputs[0])
    return None


def layer_of(value: ir.Value) -> str | None:
    """Number of the layer a tensor belongs to, or its role outside of the layers; None: not marked."""
    return value.metadata_props.get(LAYER) or value.metadata_props.get(ROLE)
