"""Codes of 8 bits as two of 4, for ONNX Runtime's CPU.

With float activations it has a kernel for 4 bits. For 8 bits it unpacks all weights in every step, which takes
20 times as long.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import onnx_ir as ir
from onnx_ir.convenience import replace_nodes_and_values

from ...nodes import CONTRIB
from ..rounding import pack
from .linear import array_of, shape_of, stored, value_of
from .rewrite import Rewrite

#: What a high half counts for.
HALF = 16


class HalveBytes(Rewrite):
    """A MatMulNBits of bytes becomes two of halves, and their sum.

    code - 128 = 16 (high - 8) + low, so both have the scales of the bytes, once times 16. That is exact, but for
    the order in which products are added.
    """

    left = "products with codes of 8 bits and float activations"

    def matches(self, graph: ir.Graph) -> Iterator[tuple[ir.Node]]:
        """(product,)."""
        return ((node,) for node in graph if node.op_type == "MatMulNBits" and _is_slow(node))

    def rewrite(self, graph: ir.Graph, product: ir.Node) -> None:
        """Four nodes in the place of one."""
        x, codes, scales = map(value_of, product.inputs[:3])
        columns, blocks, block = shape_of(codes)

        def half(name: str, of: Callable[[np.ndarray, int], np.ndarray]) -> ir.Value:
            def packed() -> np.ndarray:
                return pack(of(array_of(codes), HALF), 4)

            shape = (columns, blocks, block // 2)
            return stored(graph, f"{codes.name}.{name}", shape, packed, ir.DataType.UINT8, like=codes)

        # Unsaid, 8 of 4 bits is zero. Of the low half 0 is.
        shape = (columns, -(-blocks // 2))
        zeros = stored(graph, f"{codes.name}.zeros", shape, lambda: np.zeros(shape), ir.DataType.UINT8, like=codes)
        wide = ir.node("Mul", [scales, _half(graph)])
        high = [x, half("high", np.floor_divide), wide.outputs[0]]
        low = [x, half("low", np.remainder), scales, zeros, *product.inputs[4:]]
        attributes = {name: each.value for name, each in product.attributes.items()} | {"bits": 4}
        parts = [ir.node("MatMulNBits", inputs, attributes, domain=CONTRIB) for inputs in (high, low)]
        total = ir.node("Add", [part.outputs[0] for part in parts])
        replace_nodes_and_values(graph, product, [product], [wide, *parts, total], product.outputs, total.outputs)


def _is_slow(product: ir.Node) -> bool:
    """Whether it has codes of 8 bits, of which 128 is zero, and float activations."""
    bits, level = (product.attributes.get_int(name, 0) for name in ("bits", "accuracy_level"))
    return (bits, level) == (8, 0) and not any(product.inputs[3:4])


def _half(graph: ir.Graph) -> ir.Value:
    """HALF, once for all."""
    known = graph.initializers.get("half")
    return known or stored(graph, "half", (), lambda: np.float32(HALF))
