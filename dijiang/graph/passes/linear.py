"""The pattern most passes look for: x @ weight (+ bias), with both parameters stored in the graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from threading import Lock

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import PreconditionError

from ..builder import lazy
from ..roles import Role, mark_like, role_of


@dataclass(frozen=True)
class Linear:
    """MatMul with an initializer [in, out], and the Add of its bias if it has one."""

    matmul: ir.Node
    add: ir.Node | None

    @property
    def input(self) -> ir.Value:
        """What is projected, [..., in]."""
        return value_of(self.matmul.inputs[0])

    @property
    def weight(self) -> ir.Value:
        """[in, out]."""
        return value_of(self.matmul.inputs[1])

    @property
    def bias(self) -> ir.Value | None:
        """[out]."""
        return None if self.add is None else value_of(self.add.inputs[1])

    @property
    def output(self) -> ir.Value:
        """[..., out]."""
        return (self.add or self.matmul).outputs[0]

    @property
    def role(self) -> Role | None:
        """What the weight is."""
        return role_of(self.weight)

    @property
    def nodes(self) -> list[ir.Node]:
        """In the order of the graph."""
        return [self.matmul] if self.add is None else [self.matmul, self.add]

    @property
    def shape(self) -> tuple[int, int]:
        """(in, out)."""
        rows, columns = shape_of(self.weight)
        return rows, columns


def value_of(value: ir.Value | None) -> ir.Value:
    """An input that is there."""
    assert value is not None
    return value


def shape_of(value: ir.Value) -> tuple[int, ...]:
    """Shape of an initializer."""
    assert value.const_value is not None
    return tuple(int(n) for n in value.const_value.shape)


def array_of(value: ir.Value) -> np.ndarray:
    """Data of an initializer, read now."""
    assert value.const_value is not None
    return value.const_value.numpy()


def is_vector(value: ir.Value | None) -> bool:
    """Whether a value is a stored vector."""
    return value is not None and value.is_initializer() and len(shape_of(value)) == 1


def linear_at(node: ir.Node) -> Linear | None:
    """The linear that starts at a node."""
    weight = node.inputs[1] if node.op_type == "MatMul" else None
    if weight is None or not weight.is_initializer() or len(shape_of(weight)) != 2:
        return None
    uses = node.outputs[0].uses()
    if len(uses) == 1 and uses[0].node.op_type == "Add" and uses[0].idx == 0:
        add = uses[0].node
        if is_vector(add.inputs[1]):
            return Linear(node, add)
    return Linear(node, None)


def linears(graph: ir.Graph) -> Iterator[Linear]:
    """Every linear of a graph, in its order."""
    for node in list(graph):
        found = linear_at(node)
        if found is not None:
            yield found


def require_float32(graph: ir.Graph) -> None:
    """Precondition of passes that round weights: PreconditionError if any was rounded before."""
    rounded = [str(x.weight.name) for x in linears(graph) if x.weight.dtype != ir.DataType.FLOAT]
    if rounded:
        raise PreconditionError(f"weights are not float32: {', '.join(rounded)}")


def linear_to(value: ir.Value | None) -> Linear | None:
    """The linear that a value is the output of, if nothing else uses it."""
    node = None if value is None else value.producer()
    if node is None or value is None or len(value.uses()) != 1:
        return None
    if node.op_type == "Add" and is_vector(node.inputs[1]):
        source = value_of(node.inputs[0]).producer()
        found = None if source is None else linear_at(source)
        return found if found is not None and found.add is node else None
    found = linear_at(node)
    return found if found is not None and found.add is None else None


def stored(
    graph: ir.Graph,
    name: str,
    shape: tuple[int, ...],
    compute: Callable[[], np.ndarray],
    dtype: ir.DataType = ir.DataType.FLOAT,
    *,
    like: ir.Value | None = None,
) -> ir.Value:
    """A new initializer, computed only when the graph is written.

    like: what it is made from, whose role and layer it has.
    """
    tensor = lazy(name, shape, compute, dtype)
    value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape), const_value=tensor)
    graph.register_initializer(value)
    return value if like is None else mark_like(value, like)


def integers(graph: ir.Graph, values: Sequence[int]) -> ir.Value:
    """A stored vector of int64: a shape, sizes or axes. There is one for all that ask for the same."""
    name = "integers_" + "_".join(map(str, values))
    known = graph.initializers.get(name)
    return known or stored(graph, name, (len(values),), lambda: np.array(values), ir.DataType.INT64)


class Shared:
    """Several initializers of one computation: made when one is asked for, each given out once."""

    def __init__(self, compute: Callable[[], tuple[np.ndarray, ...]]) -> None:
        self._compute = compute
        self._left: dict[int, np.ndarray] = {}
        self._lock = Lock()

    def part(self, index: int) -> np.ndarray:
        """One result of the computation; the others are kept until they are asked for."""
        with self._lock:
            if index not in self._left:
                self._left = dict(enumerate(self._compute()))
            return self._left.pop(index)


def drop_unused_initializers(graph: ir.Graph) -> None:
    """Forget parameters that no node uses any more: they would be written to the file."""
    for name, value in list(graph.initializers.items()):
        if not value.uses():
            del graph.initializers[name]
