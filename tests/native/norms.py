"""Single nodes `AddNorm`: cases, and their float64 oracle."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from onnx import TensorProto, helper

from dijiang.nodes import DOMAIN

EPSILON = 1e-5
#: Rows of a call; the first alone must have the same bits.
ROWS = 5


@dataclass(frozen=True)
class Case:
    """A norm of `width` channels.  centred: it subtracts the mean."""

    width: int
    centred: bool = True
    bias: bool = True


CASES = {
    "norm-1": Case(1),
    "norm-16": Case(16, bias=False),
    "norm-101": Case(101),
    "norm-1024": Case(1024),
    "rms-7": Case(7, centred=False, bias=False),
    "rms-576": Case(576, centred=False, bias=False),
    "rms-33-bias": Case(33, centred=False),
}


def inputs(case: Case) -> dict[str, np.ndarray]:
    """Float32 arrays by the node's names of them: rows of very different sizes, and one of zeros."""
    draw = np.random.default_rng(case.width)
    size = 10.0 ** draw.uniform(-3, 3, (1, ROWS, 1))
    given = {name: draw.standard_normal((1, ROWS, case.width)) * size for name in ("a", "b")}
    given["a"][0, 2] = given["b"][0, 2] = 0
    given["weight"] = draw.standard_normal(case.width)
    if case.bias:
        given["bias"] = draw.standard_normal(case.width)
    return {name: value.astype(np.float32) for name, value in given.items()}


def model(case: Case, domain: str = DOMAIN) -> bytes:
    """A model of this one node."""
    given = inputs(case)
    node = helper.make_node(
        "AddNorm", list(given), ["y", "sum"], domain=domain, epsilon=EPSILON, centred=int(case.centred)
    )

    def value(name: str, array: np.ndarray):
        shape = ["batch", "tokens", case.width] if array.ndim == 3 else array.shape
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    results = [value(name, given["a"]) for name in ("y", "sum")]
    graph = helper.make_graph([node], "norm", [value(*item) for item in given.items()], results)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(domain, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()


def oracle(case: Case) -> np.ndarray:
    """The norm [1, ROWS, width] in float64 of the float32 sum."""
    x = inputs(case)
    total = (x["a"] + x["b"]).astype(np.float64)
    if case.centred:
        total = total - total.mean(-1, keepdims=True)
    return total / np.sqrt((total**2).mean(-1, keepdims=True) + EPSILON) * x["weight"] + x.get("bias", 0)
