"""GraphBuilder: onnx-ir nodes written as expressions."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from .roles import Role, mark

#: Rows of a transposed view copied at once: a strip of them stays in the processor's cache.
STRIP = 16
#: (opset, version of the file format it came with), newest first. Onnxruntime 1.20 (JetPack 6) reads up
#: to 10, onnxruntime 1.15 up to 8; what opset 23 added to the format is not used here.
IR_VERSIONS = ((21, 10), (1, 8))


class GraphBuilder:
    """Collects nodes and initializers of one graph.

    Small constants are deduplicated by value; weights are lazy, so that a tensor is in memory only
    while it is written.
    """

    def __init__(self, opset: int) -> None:
        self.opset = opset
        self._tape = Tape()
        self._constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}
        self._inputs: dict[str, ir.Value] = {}
        self._outputs: list[ir.Value] = []

    def input(self, name: str, dtype: ir.DataType, shape: list[str | int]) -> ir.Value:
        """A graph input; declared the first time."""
        if name not in self._inputs:
            self._inputs[name] = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        return self._inputs[name]

    def output(self, value: ir.Value, name: str, dtype: ir.DataType, shape: list[str | int]) -> None:
        """Declare a graph output under its public name."""
        value.name, value.type, value.shape = name, ir.TensorType(dtype), ir.Shape(shape)
        self._outputs.append(value)

    def op(self, kind: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any) -> ir.Value:
        """One node with one output; `None` leaves an optional input out."""
        return self._tape.op(kind, list(inputs), attributes or None, domain=domain)

    def ops(
        self, kind: str, outputs: int, *inputs: ir.Value | None, domain: str = "", **attributes: Any
    ) -> list[ir.Value]:
        """One node with several outputs."""
        return list(
            self._tape.op_multi_out(kind, list(inputs), attributes or None, num_outputs=outputs, domain=domain)
        )

    def constant(self, array: Any, dtype: Any = np.float32, *, role: Role | None = None) -> ir.Value:
        """A small constant, stored once for each distinct value, under a name made of its value."""
        data = np.asarray(array, dtype, order="C")
        key = (str(data.dtype), data.shape, data.tobytes())
        if key not in self._constants:
            digest = hashlib.sha256(repr(key[:2]).encode() + key[2]).hexdigest()[:16]
            value = self._constants[key] = self._tape.initializer(ir.tensor(data), f"constant_{digest}")
            if role is not None:
                mark(value, role)
        return self._constants[key]

    def ints(self, *values: int) -> ir.Value:
        """A constant vector of int64: a shape, sizes or axes."""
        return self.constant(values, np.int64)

    def weight(
        self,
        name: str,
        shape: tuple[int, ...],
        read: Callable[[], np.ndarray],
        role: Role,
        layer: int | None = None,
    ) -> ir.Value:
        """A float32 initializer read only when the graph is written."""
        return mark(self._tape.initializer(lazy(name, shape, read), name), role, layer)

    def model(self, name: str) -> ir.Model:
        """The finished model."""
        domains = {node.domain for node in self._tape.nodes} - {""}
        graph = ir.Graph(
            list(self._inputs.values()),
            self._outputs,
            nodes=self._tape.nodes,
            initializers=self._tape.initializers,
            opset_imports={"": self.opset} | dict.fromkeys(sorted(domains), 1),
            name=name,
        )
        return ir.Model(graph, ir_version=ir_version(self.opset), producer_name="dijiang")


def lazy(
    name: str, shape: tuple[int, ...], compute: Callable[[], np.ndarray], dtype: ir.DataType = ir.DataType.FLOAT
) -> ir.LazyTensor:
    """A tensor that is computed when the graph is written."""
    return ir.LazyTensor(
        lambda: ir.tensor(row_major(compute(), dtype.numpy()), name=name), dtype, ir.Shape(shape), name=name
    )


def ir_version(opset: int) -> int:
    """The oldest version of the file format that has an opset: an old onnxruntime reads no newer one."""
    return next(version for first, version in IR_VERSIONS if opset >= first)


def row_major(array: np.ndarray, dtype: Any) -> np.ndarray:
    """The array in C order and `dtype`; a transposed matrix is copied by strips, 5 times as fast."""
    if array.ndim != 2 or array.flags.c_contiguous:
        return np.asarray(array, dtype, order="C")
    result = np.empty(array.shape, dtype)
    for start in range(0, array.shape[1], STRIP):
        result[:, start : start + STRIP] = array[:, start : start + STRIP]
    return result
