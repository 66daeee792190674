"""Single nodes `RecurrentStep`: cases, their float64 oracle, and a program that runs all single nodes.

`python -m tests.native.steps OUT.npz [BUNDLE]`: a process of its own, as `DIJIANG_ISA` is read once.
"""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper

from dijiang.models.activations import ACTIVATIONS
from dijiang.nodes import DOMAIN
from dijiang.runtime import operators as native
from tests.native import norms, products

EPSILON = 1e-5


@dataclass(frozen=True)
class Case:
    """Shapes of one node.

    padded: the first token is.  overflow: squares of the first kv head's outputs do not fit a float32.
    lengths: of a ragged step, the tokens of each sequence; none: `tokens` to each of `batch`.
    """

    size: int
    tokens: int = 1
    heads: int = 4
    groups: int = 4
    rotary: int = 0
    scales: bool = False
    mlp: int = 0
    activation: str = ""
    batch: int = 1
    padded: bool = False
    overflow: bool = False
    lengths: tuple[int, ...] = ()

    @property
    def starts(self) -> np.ndarray:
        """Rows where the tokens of each sequence begin."""
        return np.cumsum([0, *(self.lengths or [self.tokens] * self.batch)])


CASES = {
    "head-1": Case(1, tokens=3, mlp=5, activation="relu"),
    "head-7-rotary-scales": Case(7, tokens=3, rotary=6, scales=True, mlp=33, activation="silu"),
    "head-64": Case(64, rotary=16, mlp=1024, activation="gelu"),
    "head-64-3-tokens-2-sequences": Case(64, tokens=3, rotary=16, batch=2, padded=True, scales=True),
    "head-64-grouped": Case(64, tokens=3, heads=6, groups=2, rotary=64, scales=True),
    "head-64-many-rows": Case(64, tokens=5, heads=4, groups=2, rotary=16, mlp=37, activation="gelu"),
    "head-80-one-kv-head": Case(80, heads=5, groups=1, rotary=20, mlp=131, activation="gelu_tanh"),
    "head-96-unknown-to-the-compiler": Case(96, tokens=3, heads=3, groups=3, rotary=24),
    "head-128-32-heads": Case(128, heads=32, groups=8, rotary=128),
    "head-512": Case(512, tokens=3, heads=2, groups=1, rotary=128, mlp=7, activation="silu"),
    "head-64-ragged": Case(64, tokens=9, rotary=16, scales=True, lengths=(1, 0, 7, 1), mlp=37, activation="gelu"),
    "head-64-ragged-few-rows": Case(64, tokens=3, heads=6, groups=2, lengths=(2, 0, 1), mlp=37, activation="silu"),
    "head-7-ragged-padded": Case(7, tokens=5, lengths=(3, 2), padded=True),
    "overflow": Case(64, tokens=3, heads=4, groups=4, rotary=16, overflow=True),
    "overflow-grouped": Case(80, heads=16, groups=4, overflow=True, mlp=64, activation="gelu"),
}
#: Those where every sequence has as many tokens: other nodes take no others.
EVEN = {name: case for name, case in CASES.items() if not case.lengths}


def inputs(case: Case) -> dict[str, np.ndarray]:
    """Float32 arrays by the node's names of them; without those that are left out."""
    draw = np.random.default_rng(case.size + case.tokens)
    b, t, h, g, k = case.batch, case.tokens, case.heads, case.groups, case.size
    d = h * k
    given = {
        "packed": draw.standard_normal((b, t, 2 * d + 2 * g * k + case.mlp)),
        "projection": draw.standard_normal((k, k)) / k**0.5,
        "log_decay": -draw.exponential(0.3, (b, t, g)),
        "mask": np.ones((b, t)),
        "state": draw.standard_normal((len(case.starts) - 1, g, k, k)),
        "weight": draw.standard_normal(d),
        "bias": draw.standard_normal(d),
    }
    if case.padded:
        given["mask"][0, 0] = 0
    if case.overflow:
        given["packed"][..., d + g * k : d + g * k + k] *= 1e25
    if case.rotary:
        angles = draw.uniform(0, 7, (b, t, case.rotary // 2))
        given |= {"cos": np.cos(angles), "sin": np.sin(angles)}
    if case.scales:
        given["scales"] = draw.uniform(0.5, 2, (b, t, h + g))
    given = {name: value.astype(np.float32) for name, value in given.items()}
    return given | ({"starts": case.starts} if case.lengths else {})


def node(case: Case, domain: str = DOMAIN, *, bias: bool = False) -> bytes:
    """A model of this one node. In the domain for GPUs it gives room to work in, too, and may add a bias."""
    order = (
        "packed",
        "projection",
        "log_decay",
        "mask",
        "state",
        "weight",
        "bias",
        "cos",
        "sin",
        "scales",
        "packed_bias",
    )
    order = (*order[:10], "starts") if domain == DOMAIN else order
    given, results = inputs(case), ["output", "present"]
    if bias:
        given["packed_bias"] = given["packed"][0, 0]  # for its shape
    step = helper.make_node(
        "RecurrentStep",
        [name if name in given else "" for name in order],
        results if domain == DOMAIN else [*results, "room"],
        domain=domain,
        num_heads=case.heads,
        kv_num_heads=case.groups,
        activation=native.activation_number(case.activation) if case.activation else 0,
        epsilon=EPSILON,
    )

    def value(name: str, shape: tuple[int, ...]):
        kind = TensorProto.INT64 if name == "starts" else TensorProto.FLOAT
        return helper.make_tensor_value_info(name, kind, shape)

    width = case.heads * case.size + case.mlp
    graph = helper.make_graph(
        [step],
        "step",
        [value(name, array.shape) for name, array in given.items()],
        [
            value("output", (case.batch, case.tokens, width)),
            value("present", given["state"].shape),
        ],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(domain, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()


def oracle(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """output and present in float64, one token and one head at a time."""
    x = {name: value.astype(np.float64) for name, value in inputs(case).items()}
    h, g, k = case.heads, case.groups, case.size
    d, half, state, rows = h * k, case.rotary // 2, x["state"].copy(), []

    def features(z: np.ndarray, b: int, t: int) -> np.ndarray:
        turned = z.copy()
        if half:
            c, s = x["cos"][b, t], x["sin"][b, t]
            turned[:half] = z[:half] * c - z[half : 2 * half] * s
            turned[half : 2 * half] = z[half : 2 * half] * c + z[:half] * s
        y = turned @ x["projection"]
        e = np.exp(y - y.max())
        return e / e.sum()

    for b in range(case.batch):
        for t in range(case.tokens):
            of = np.searchsorted(case.starts, b * case.tokens + t, side="right") - 1  # whose state
            q, key, v, gate, up = np.split(x["packed"][b, t], np.cumsum([d, g * k, g * k, d]), axis=0)
            scale = x["scales"][b, t] if case.scales else np.ones(h + g)
            out = np.empty((h, k))
            for j in range(g):
                phi = features(key.reshape(g, k)[j], b, t) * scale[h + j] * x["mask"][b, t]
                state[of, j] = np.exp(x["log_decay"][b, t, j]) * state[of, j]
                state[of, j] += np.outer(phi, v.reshape(g, k)[j])
            for i in range(h):
                out[i] = features(q.reshape(h, k)[i], b, t) * scale[i] @ state[of, i * g // h]
            grouped = out.reshape(k, h)  # neighbouring channels, as many as heads
            centred = grouped - grouped.mean(axis=1, keepdims=True)
            with np.errstate(over="ignore"):  # too large for a float32: the group becomes 0
                squares = (centred**2).sum(axis=1, keepdims=True).astype(np.float32).astype(np.float64)
            normed = (centred / np.sqrt(squares / h + EPSILON)).reshape(d)
            gated = (normed * x["weight"] + x["bias"]) * gate / (1 + np.exp(-gate))
            rows.append(np.concatenate([gated, activated(case.activation, up)]))
    return np.array(rows).reshape(case.batch, case.tokens, -1), state


def activated(name: str, x: np.ndarray) -> np.ndarray:
    """An activation in float64, by the operator's name of it."""
    return ACTIVATIONS[{"gelu_tanh": "gelu_new"}.get(name, name)].function(x) if name else x


def triples() -> np.ndarray:
    """[3, N] float32: a, b and c whose a b + c is hard to round once."""
    draw = np.random.default_rng(0)
    any_bits = draw.integers(0, 1 << 32, (3, 20000), dtype=np.uint32).view(np.float32)
    near = draw.standard_normal((3, 20000)).astype(np.float32)
    cancelled = near.copy()
    cancelled[2] = -(cancelled[0] * cancelled[1])
    tiny = near * np.float32(1e-22)  # products that are subnormal
    # The product lies half-way between two floats, and c is lost in a sum of float64.
    half_way = np.array([[1 + 2.0**-12] * 4, [1 + 2.0**-12] * 4, [2.0**-90, -(2.0**-90), 2.0**-149, 0]])
    # A product a little below half of the last bit of c, which is odd: normal, the largest subnormal, smaller.
    odd = np.array([1 + 2.0**-23, 2.0**-126 - 2.0**-149, 2.0**-127 + 2.0**-149, 0])
    root = 2.0 ** np.array([-12, -75, -75, -75])
    little = np.array([(1 - 2.0**-23) * root, (1 + 2.0**-23) * root, odd])
    negative = little * [[-1], [1], [-1]]
    edges = np.concatenate([half_way, little, negative], axis=1).astype(np.float32)
    alone = np.repeat(edges, 16, axis=1)  # in a register nothing else is hard
    return np.concatenate([any_bits, near, cancelled, tiny, alone], axis=1)


def call(name: str, *arguments: np.ndarray | int) -> int:
    """A function of the library on float32 arrays and numbers; its status."""
    floats = ctypes.POINTER(ctypes.c_float)
    library = native.open_library(native.operator_library())
    return getattr(library, f"dijiang_{name}")(
        *(a.ctypes.data_as(floats) if isinstance(a, np.ndarray) else a for a in arguments)
    )


def main(out: str, bundle: str | None = None) -> None:
    """Runs everything with this process's instruction set and saves the results."""
    import onnxruntime

    import dijiang

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.register_custom_ops_library(str(native.operator_library()))
    results: dict[str, np.ndarray] = {"isa": np.array(native.isa())}
    for name, case in CASES.items():
        session = onnxruntime.InferenceSession(node(case), options, ["CPUExecutionProvider"])
        results[f"{name}.output"], results[f"{name}.present"] = session.run(None, inputs(case))
    for name, case in products.CASES.items():
        product = products.Product.of(case)
        session = onnxruntime.InferenceSession(product.model(), options, ["CPUExecutionProvider"])
        for rows in (products.ROWS, *products.FEWER):
            (y,) = session.run(None, {"x": product.x[None, :rows]})
            results[f"{name}.{rows}-rows"] = y[0]
    for name, case in norms.CASES.items():
        session, feeds = onnxruntime.InferenceSession(norms.model(case), options), norms.inputs(case)
        results[f"{name}.output"], results[f"{name}.sum"] = session.run(None, feeds)
        first = {key: value[:, :1] if value.ndim == 3 else value for key, value in feeds.items()}
        results[f"{name}.first"] = session.run(["y"], first)[0]
    a, b, c = (np.ascontiguousarray(row) for row in triples())
    results["multiply_add"] = np.empty_like(a)
    assert call("multiply_add", a, b, c, results["multiply_add"], a.size) == 0
    if bundle is not None:
        model = dijiang.load(bundle)
        state = model.new_state()
        ids = np.arange(1, 12)[None]
        parts = [model.forward(piece, state, all_logits=True) for piece in np.split(ids, [7, 8], axis=1)]
        results["bundle.logits"] = np.concatenate(parts, axis=1)
        results |= {f"bundle.state.{i}": layer for i, layer in enumerate(state.layers)}
    np.savez(Path(out), **results)


if __name__ == "__main__":
    main(*sys.argv[1:])
