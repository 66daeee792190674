"""Activations of the MLP: one row each, with all that any part of the toolchain needs of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import CheckpointError
from ..nodes import CONTRIB
from .config import brief

Array = np.ndarray
#: quick_gelu is x * sigmoid(QUICK x).
QUICK = 1.702


@dataclass(frozen=True)
class Activation:
    """One activation.

    function: in NumPy, float64 or float32, as x is.  nodes: (graph builder, x) -> y in standard nodes.
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

    return 0.5 * x * (1 + erf(x / math.sqrt(2)))


def gelu_tanh(x: Array) -> Array:
    """The tanh approximation of gelu."""
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)), without overflow for large negative x."""
    return 0.5 * (1 + np.tanh(x / 2))


def silu(x: Array) -> Array:
    """x * sigmoid(x)."""
    return x * sigmoid(x)


def relu(x: Array) -> Array:
    """max(x, 0)."""
    return np.maximum(x, 0)


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


def _square_nodes(b: Any, x: Any) -> Any:
    return b.op("Mul", x, x)


def _clipped(
    low: float, high: float, function: Callable[[Array], Array], nodes: Callable[[Any, Any], Any]
) -> Activation:
    """An activation whose result is clipped."""

    def clip(b: Any, x: Any) -> Any:
        return b.op("Max", b.op("Min", nodes(b, x), b.constant(high)), b.constant(low))

    return Activation(lambda x: np.clip(function(x), low, high), clip, clip)


def _plain(function: Callable[[Array], Array], nodes: Callable[[Any, Any], Any]) -> Activation:
    """An activation of the same nodes everywhere."""
    return Activation(function, nodes, nodes)


#: Mean and deviation of the normal distribution that Mega calls its Laplace activation.
LAPLACE = (0.707107, 0.282095)


def _laplace(x: Array) -> Array:
    from scipy.special import erf

    return 0.5 * (1 + erf((x - LAPLACE[0]) / (LAPLACE[1] * math.sqrt(2))))


def _laplace_nodes(b: Any, x: Any) -> Any:
    scaled = b.op("Div", b.op("Sub", x, b.constant(LAPLACE[0])), b.constant(LAPLACE[1] * math.sqrt(2)))
    return b.op("Mul", b.op("Add", b.op("Erf", scaled), b.constant(1.0)), b.constant(0.5))


def _one(kind: str, **attributes: float) -> Callable[[Any, Any], Any]:
    """One node of ONNX Runtime."""
    return lambda b, x: b.op(kind, x, domain=CONTRIB, **attributes)


GELU = Activation(gelu, _gelu_nodes, _one("Gelu"), "gelu")
SILU = Activation(silu, _silu_nodes, _one("QuickGelu", alpha=1.0), "silu")
GELU_TANH = Activation(gelu_tanh, _gelu_tanh_nodes, _one("FastGelu"), "gelu_tanh")
#: hidden_act of a config, in transformers' words -> its row.
ACTIVATIONS = {
    "gelu": GELU,
    "gelu_python": GELU,
    "gelu_new": GELU_TANH,
    "gelu_fast": GELU_TANH,
    "gelu_accurate": GELU_TANH,
    "gelu_python_tanh": GELU_TANH,
    "gelu_pytorch_tanh": GELU_TANH,
    "gelu_10": _clipped(-10.0, 10.0, gelu, _gelu_nodes),
    "quick_gelu": Activation(
        lambda x: x * sigmoid(QUICK * x),
        lambda b, x: b.op("Mul", x, b.op("Sigmoid", b.op("Mul", x, b.constant(QUICK)))),
        _one("QuickGelu", alpha=QUICK),
    ),
    "relu": Activation(relu, _relu_nodes, _relu_nodes, "relu"),
    "relu2": _plain(lambda x: relu(x) ** 2, lambda b, x: _square_nodes(b, _relu_nodes(b, x))),
    "relu6": _clipped(0.0, 6.0, relu, _relu_nodes),
    "leaky_relu": _plain(lambda x: np.where(x > 0, x, 0.01 * x), lambda b, x: b.op("LeakyRelu", x, alpha=0.01)),
    "silu": SILU,
    "swish": SILU,
    "mish": _plain(
        lambda x: x * np.tanh(np.logaddexp(0, x)), lambda b, x: b.op("Mul", x, b.op("Tanh", b.op("Softplus", x)))
    ),
    "sigmoid": _plain(sigmoid, lambda b, x: b.op("Sigmoid", x)),
    "tanh": _plain(np.tanh, lambda b, x: b.op("Tanh", x)),
    "hardswish": _plain(lambda x: x * np.clip(x + 3, 0, 6) / 6, lambda b, x: b.op("HardSwish", x)),
    "laplace": _plain(_laplace, _laplace_nodes),
    "sqrtsoftplus": _plain(lambda x: np.sqrt(np.logaddexp(0, x)), lambda b, x: b.op("Sqrt", b.op("Softplus", x))),
    "linear": _plain(lambda x: x, lambda b, x: b.op("Identity", x)),
}


def read_activation(config: dict[str, Any], key: str, default: str) -> str:
    """The name of a row of ACTIVATIONS from a config; CheckpointError for any other value."""
    name = config.get(key, default)
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise CheckpointError(
            f"config.json: {key} {brief(name)} is not supported, expected one of {', '.join(ACTIVATIONS)}"
        )
    return name
