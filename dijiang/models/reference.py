"""The model in plain NumPy, in its two equal forms: the oracle of every test and of `verify`.

Shapes: B batch, T tokens, d hidden, H heads, G kv heads, K features (= values) a head. The dtype is
float64 or float32 throughout; states are [B, G, K, K] per layer. Equations: DiJiang, section 3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
from scipy.special import erf

from .decay import Decay
from .load import DijiangModel
from .rotary import inverse_frequencies
from .spec import ModelSpec

Array = np.ndarray
Form = Literal["parallel", "recurrent"]
FLOAT32_MAX = float(np.finfo(np.float32).max)


def _gelu(x: Array) -> Array:
    y: Array = 0.5 * x * (1 + erf(x / np.sqrt(2)))
    return y


def _gelu_tanh(x: Array) -> Array:
    y: Array = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    return y


def silu(x: Array) -> Array:
    """x * sigmoid(x), without overflow for large negative x."""
    y: Array = x * 0.5 * (1 + np.tanh(x / 2))
    return y


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": _gelu,
    "gelu_new": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "relu": lambda x: np.maximum(x, 0),
    "silu": silu,
}


def layer_norm(x: Array, weight: Array, bias: Array, eps: float) -> Array:
    """LayerNorm over the last axis."""
    centred = x - x.mean(-1, keepdims=True)
    normed: Array = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps)
    return normed * weight + bias


def group_norm(x: Array, weight: Array, bias: Array, groups: int, eps: float) -> Array:
    """GroupNorm over the channels of each token; x [..., d].

    A group whose sum of squared deviations overflows float32 is *dead*: its normalised values are
    0 and only the bias is left, as on the GPUs that trained such checkpoints.
    """
    grouped = x.reshape(*x.shape[:-1], groups, -1)
    centred = grouped - grouped.mean(-1, keepdims=True)
    total = (centred**2).sum(-1, keepdims=True)
    normed = centred / np.sqrt(total / grouped.shape[-1] + eps)
    normed = np.where(total > FLOAT32_MAX, 0, normed)
    scaled: Array = normed.reshape(x.shape) * weight + bias
    return scaled


def rotate(x: Array, positions: Array, spec: ModelSpec) -> Array:
    """Rotary embedding of the first `rotary_dims` channels, half-rotation; x [B, T, heads, K]."""
    if not spec.rotary_dims:
        return x
    angles = positions[..., None].astype(np.float64) * inverse_frequencies(spec)
    cos, sin = (f(angles)[:, :, None].astype(x.dtype) for f in (np.cos, np.sin))
    first, second, rest = np.split(x, [spec.rotary_dims // 2, spec.rotary_dims], axis=-1)
    return np.concatenate(
        [first * cos - second * sin, second * cos + first * sin, rest], axis=-1, dtype=x.dtype
    )


def feature_map(x: Array, proj: Array) -> Array:
    """phi(x) = softmax(x P) over the features; x [..., K]."""
    z = x @ proj
    z = np.exp(z - z.max(-1, keepdims=True))
    features: Array = z / z.sum(-1, keepdims=True)
    return features


def attend_parallel(q: Array, k: Array, v: Array, gamma: Array) -> Array:
    """o_t = sum over s <= t of gamma^(t-s) (q_t . k_s) v_s, from an empty state; [B, T, G, K]."""
    t = np.arange(q.shape[1])
    distance = t[:, None] - t
    weight = np.where(distance >= 0, gamma[:, None, None] ** np.maximum(distance, 0), 0)
    scores = np.einsum("btgk,bsgk->bgts", q, k) * weight.astype(q.dtype)
    out: Array = np.einsum("bgts,bsgv->btgv", scores, v)
    return out


def attend_recurrent(q: Array, k: Array, v: Array, gamma: Array, state: Array) -> Array:
    """S_t = gamma S_{t-1} + k_t v_t^T, o_t = q_t^T S_t; updates `state` [B, G, K, V] in place."""
    out = np.empty_like(v)
    for t in range(q.shape[1]):
        state *= gamma[:, None, None].astype(state.dtype)
        state += k[:, t, :, :, None] * v[:, t, :, None, :]
        out[:, t] = np.einsum("bgk,bgkv->bgv", q[:, t], state)
    return out


class Reference:
    """Runs a DijiangModel in NumPy.

    Weights are converted to `dtype` once and kept. `new_state` / `forward(..., state=...)` is the
    recurrent form; `forward` without a state is the parallel form over whole sequences.
    """

    def __init__(self, model: DijiangModel, dtype: type = np.float64) -> None:
        self.spec = model.spec
        self.dtype = np.dtype(dtype)
        self.decays = model.decays
        self._weights = {
            name: model.weights[name].astype(self.dtype)
            for name in model.weights
            if not name.endswith((".D1", ".D2"))
        }

    def new_state(self, batch: int) -> list[Array]:
        """Empty states, one [B, G, K, V] a layer."""
        return [np.zeros((batch, *self.spec.state_shape), self.dtype) for _ in self.decays]

    def forward(self, ids: Array, start: int = 0, state: list[Array] | None = None) -> Array:
        """Logits [B, T, vocab] of ids [B, T] int64 at positions start .. start + T - 1."""
        w, spec = self._weights, self.spec
        positions = np.broadcast_to(np.arange(start, start + ids.shape[1]), ids.shape)
        x = w["embed.weight"][ids]
        for layer, decay in enumerate(self.decays):
            past = None if state is None else state[layer]
            attended = x + self._attention(layer, decay, self._norm(layer, "attn", x), positions, past)
            source = x if spec.parallel_residual else attended
            x = attended + self._mlp(layer, self._norm(layer, "mlp", source))
        x = layer_norm(x, w["final_norm.weight"], w["final_norm.bias"], spec.norm_eps)
        logits: Array = x @ w["head.weight"]
        return logits

    def _norm(self, layer: int, which: str, x: Array) -> Array:
        name = f"layers.{layer}.{which}_norm"
        return layer_norm(
            x, self._weights[f"{name}.weight"], self._weights[f"{name}.bias"], self.spec.norm_eps
        )

    def _linear(self, layer: int, name: str, x: Array) -> Array:
        y: Array = x @ self._weights[f"layers.{layer}.{name}.weight"]
        bias = self._weights.get(f"layers.{layer}.{name}.bias")
        return y if bias is None else y + bias

    def _mlp(self, layer: int, x: Array) -> Array:
        up = ACTIVATIONS[self.spec.activation](self._linear(layer, "mlp_up", x))
        return self._linear(layer, "mlp_down", up)

    def _attention(
        self, layer: int, decay: Decay, x: Array, positions: Array, past: Array | None
    ) -> Array:
        spec, w = self.spec, self._weights
        q, k, v = np.split(
            self._linear(layer, "qkv", x).reshape(*x.shape[:2], -1, spec.head_size),
            [spec.num_heads, spec.num_heads + spec.num_kv_heads],
            axis=2,
        )
        proj = w[f"layers.{layer}.proj.weight"]
        q, k = (feature_map(rotate(z, positions, spec), proj) for z in (q, k))
        if decay.u is not None and decay.w is not None:
            q = q * decay.u.T[positions][..., None].astype(self.dtype)
            k = k * decay.w.T[positions][..., None].astype(self.dtype)
        if past is None:
            out = attend_parallel(q, k, v, decay.gamma)
        else:
            out = attend_recurrent(q, k, v, decay.gamma, past)
        normed = group_norm(
            out.reshape(x.shape),
            w[f"layers.{layer}.group_norm.weight"],
            w[f"layers.{layer}.group_norm.bias"],
            spec.head_size,
            spec.group_norm_eps,
        )
        return self._linear(layer, "out", silu(self._linear(layer, "gate", x)) * normed)
