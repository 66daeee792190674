"""Activations of the MLP: one row each, with all that any part of the toolchain needs of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray
#: Domain of ONNX Runtime's own nodes.
CONTRIB = "com.microsoft"


@dataclass(frozen=True)
class Activation:
    """One activation.

    function: in NumPy, float64 or float32.  nodes: (graph builder, x) -> y in standard nodes.
    fused: the same as one node of ONNX Runtime.  operator: its name in the compiled operator, see
    native/; None: the native graph writes nodes instead.
    """

    function: Callable[[Array], Array]
    nodes: Callable[[Any, Any], Any]
    fused: Callable[[Any, Any], Any]
    operator: str | None = None


def gelu(x: Array) -> Array:
    """0.5 x (1 + erf(x / sqrt 2))."""
    from scipy.special import erf

    y: Array = 0.5 * x * (1 + erf(x / np.sqrt(2)))
    return y


def gelu_tanh(x: Array) -> Array:
    """The tanh approximation of gelu."""
    y: Array = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    return y


def silu(x: Array) -> Array:
    """x * sigmoid(x), without overflow for large negative x."""
    y: Array = x * 0.5 * (1 + np.tanh(x / 2))
    return y


def relu(x: Array) -> Array:
    """max(x, 0)."""
    y: Array = np.maximum(x, 0)
    return y


def _gelu_nodes(b: Any, x: Any) -> Any:
    erf = b.op("Erf", b.op("Div", x, b.constant(math.sqrt(2))))
    return b.op("Mul", b.op("Mul", x, b.op("Add", erf, b.constant(1.0))), b.constant(0.5))


def _gelu_tanh_nodes(b: Any, x: Any) -> Any:
    cube = b.op("Mul", b.op("Mul", x, x), x)
    inner = b.op("Add", x, b.op("Mul", cube, b.constant(0.044715)))
    tanh = b.op("Tanh", b.op("Mul", inner, b.constant(math.sqrt(2 / math.pi))))
    return b.op("Mul", b.op("Mul", x, b.op("Add", tanh, b.constant(1.0))), b.constant(0.5))


def _silu_nodes(b: Any, x: Any) -> Any:
    return b.op("Mul", x, b.op("Sigmoid", x))


def _relu_nodes(b: Any, x: Any) -> Any:
    return b.op("Relu", x)


def _one(kind: str, **attributes: float) -> Callable[[Any, Any], Any]:
    """One node of ONNX Runtime."""
    return lambda b, x: b.op(kind, x, domain=CONTRIB, **attributes)


GELU_TANH = Activation(gelu_tanh, _gelu_tanh_nodes, _one("FastGelu"), "gelu_tanh")
#: hidden_act of a config -> its row.
ACTIVATIONS = {
    "gelu": Activation(gelu, _gelu_nodes, _one("Gelu"), "gelu"),
    "gelu_new": GELU_TANH,
    "gelu_fast": GELU_TANH,
    "gelu_pytorch_tanh": GELU_TANH,
    "relu": Activation(relu, _relu_nodes, _relu_nodes, "relu"),
    "silu": Activation(silu, _silu_nodes, _one("QuickGelu", alpha=1.0), "silu"),
}
