"""The model in plain NumPy, in its two equal forms: the oracle of every test and of `verify`.

Shapes: B batch, T tokens, d hidden, H heads, G kv heads, K features (= values) a head. The dtype is
float64 or float32 throughout; states are [B, G, K, K] per layer. Equations: DiJiang, section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .activations import ACTIVATIONS, silu
from .load import DijiangModel
from .rotary import inverse_frequencies
from .spec import ModelSpec
from .weights import is_decay_table

Array = np.ndarray
#: Weights of one layer by their name in it, in the reference's dtype.
LayerWeights = dict[str, Array]
FLOAT32_MAX = float(np.finfo(np.float32).max)


def layer_norm(x: Array, eps: float) -> Array:
    """LayerNorm over the last axis, without weight and bias."""
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps)


def rms_norm(x: Array, eps: float) -> Array:
    """RMSNorm over the last axis, without weight."""
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)


NORMS: dict[str, Callable[[Array, float], Array]] = {"layer": layer_norm, "rms": rms_norm}


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
    return normed.reshape(x.shape) * weight + bias


def rotate(x: Array, positions: Array, spec: ModelSpec) -> Array:
    """Rotary embedding of the first `rotary_dims` channels, half-rotation; x [B, T, heads, K]."""
    if not spec.rotary_dims:
        return x
    angles = positions[..., None].astype(np.float64) * inverse_frequencies(spec)
    cos, sin = (f(angles)[:, :, None].astype(x.dtype) for f in (np.cos, np.sin))
    first, second, rest = np.split(x, [spec.rotary_dims // 2, spec.rotary_dims], axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1, dtype=x.dtype)


def feature_map(x: Array, proj: Array) -> Array:
    """phi(x) = softmax(x P) over the features; x [..., K]."""
    z = x @ proj
    z = np.exp(z - z.max(-1, keepdims=True))
    return z / z.sum(-1, keepdims=True)


def attend_parallel(q: Array, k: Array, v: Array, gamma: Array) -> Array:
    """o_t = sum over s <= t of gamma^(t-s) (q_t . k_s) v_s, from an empty state.

    q [B, T, G, H/G, K], k and v [B, T, G, K]; the result has the shape of q.
    """
    t = np.arange(q.shape[1])
    weight = np.tril((gamma[:, None] ** t)[:, abs(t[:, None] - t)])
    q = q.transpose(0, 2, 3, 1, 4)  # [B, G, H/G, T, K]
    k, v = (z.swapaxes(1, 2)[:, :, None] for z in (k, v))  # [B, G, 1, T, K]
    scores = q @ k.swapaxes(3, 4) * weight.astype(q.dtype)[:, None]
    return (scores @ v).transpose(0, 3, 1, 2, 4)


def attend_recurrent(q: Array, k: Array, v: Array, gamma: Array, state: Array) -> Array:
    """S_t = gamma S_{t-1} + k_t v_t^T, o_t = q_t^T S_t; updates `state` [B, G, K, V] in place.

    q [B, T, G, H/G, K], k and v [B, T, G, K]; the result has the shape of q.
    """
    out = np.empty_like(q)
    for t in range(q.shape[1]):
        state *= gamma[:, None, None].astype(state.dtype)
        state += k[:, t, :, :, None] * v[:, t, :, None, :]
        out[:, t] = q[:, t] @ state
    return out


@dataclass(frozen=True)
class Piece:
    """Tokens that go through the model together: ids [B, T] int64 at positions start, start + 1, ...

    state: one [B, G, K, V] a layer, advanced in place by the recurrent form. None: the parallel form,
    over a whole sequence.
    """

    ids: Array
    start: int = 0
    state: list[Array] | None = None


class Reference:
    """Runs a DijiangModel in NumPy, one layer after the other.

    The weights of a layer are read, converted to `dtype`, used for all pieces of a `run`, and dropped:
    the largest layer (or embedding, or head) bounds the memory, not the model.
    """

    def __init__(self, model: DijiangModel, dtype: type = np.float64) -> None:
        self.spec = model.spec
        self.dtype = np.dtype(dtype)
        self.decays = model.decays
        self._weights: Mapping[str, Array] = model.weights

    def new_state(self, batch: int) -> list[Array]:
        """Empty states, one [B, G, K, V] a layer."""
        return [np.zeros((batch, *self.spec.state_shape), self.dtype) for _ in self.decays]

    def forward(self, ids: Array, start: int = 0, state: list[Array] | None = None) -> Array:
        """Logits [B, T, vocab] of one piece."""
        return next(self.run([Piece(ids, start, state)]))

    def run(
        self, pieces: Sequence[Piece], passed: Callable[[int, Piece], None] = lambda layer, piece: None
    ) -> Iterator[Array]:
        """Logits [B, T, vocab] of every piece; each weight is read once for all of them.

        Pieces that share a state follow each other. `passed(layer, piece)` is called when a piece has
        been through a layer, before the next piece goes through it: `piece.state[layer]` is then the
        state after that piece.
        """
        hidden = self._embed(pieces)
        for layer in range(self.spec.num_layers):
            weights = self._read(f"layers.{layer}.")
            for i, piece in enumerate(pieces):
                hidden[i] = self._layer(layer, weights, hidden[i], piece)
                passed(layer, piece)
            del weights
        weights = self._read("", ("final_norm.", "embed_out.", "head."))
        for x in hidden:
            yield self._logits(weights, x)

    def _read(self, prefix: str, modules: tuple[str, ...] = ("",)) -> LayerWeights:
        """The weights of some modules under a prefix, named without it."""
        wanted = tuple(prefix + module for module in modules)
        return {
            name.removeprefix(prefix): self._weights[name].astype(self.dtype)
            for name in self._weights
            if name.startswith(wanted) and not is_decay_table(name)
        }

    def _embed(self, pieces: Sequence[Piece]) -> list[Array]:
        """Hidden channels [B, T, d] of every piece."""
        embedding = self._weights["embed.weight"]
        hidden = [embedding[piece.ids].astype(self.dtype) for piece in pieces]
        w = self._read("", ("embed_in.", "positions."))
        if self.spec.embedding_size is not None:
            hidden = [x @ w["embed_in.weight"] for x in hidden]
        if self.spec.learned_positions:
            rows = (w["positions.weight"][p.start : p.start + p.ids.shape[1]] for p in pieces)
            hidden = [x + row for x, row in zip(hidden, rows, strict=True)]
        return hidden

    def _logits(self, w: LayerWeights, x: Array) -> Array:
        if self.spec.final_norm:
            x = self._norm(w, "final_norm", x)
        if self.spec.embedding_size is not None:
            x = self._linear(w, "embed_out", x)
        return self._linear(w, "head", x)

    def _layer(self, layer: int, w: LayerWeights, x: Array, piece: Piece) -> Array:
        if not self.spec.norm_first:
            x = self._norm(w, "attn_norm", x + self._attention(layer, w, x, piece))
            return self._norm(w, "mlp_norm", x + self._mlp(w, x))
        attended = x + self._attention(layer, w, self._norm(w, "attn_norm", x), piece)
        source = x if self.spec.parallel_residual else attended
        return attended + self._mlp(w, self._norm(w, "mlp_norm", source))

    def _mlp(self, w: LayerWeights, x: Array) -> Array:
        activation, up = ACTIVATIONS[self.spec.activation].function, self._linear(w, "mlp_up", x)
        if self.spec.gated_mlp:
            return self._linear(w, "mlp_down", activation(self._linear(w, "mlp_gate", x)) * up)
        return self._linear(w, "mlp_down", activation(up))

    def _norm(self, w: LayerWeights, name: str, x: Array) -> Array:
        normed = NORMS[self.spec.norm](x, self.spec.norm_eps) * w[f"{name}.weight"]
        bias = w.get(f"{name}.bias")
        return normed if bias is None else normed + bias

    def _attention(self, layer: int, w: LayerWeights, x: Array, piece: Piece) -> Array:
        spec, decay = self.spec, self.decays[layer]
        positions = np.broadcast_to(piece.start + np.arange(x.shape[1]), x.shape[:2])
        q, k, v = np.split(
            self._linear(w, "qkv", x).reshape(*x.shape[:2], -1, spec.head_size),
            [spec.num_heads, spec.num_heads + spec.num_kv_heads],
            axis=2,
        )
        q, k = (feature_map(rotate(z, positions, spec), w["proj.weight"]) for z in (q, k))
        # Query heads [G, H/G]: neighbours share a kv head.
        q = q.reshape(*q.shape[:2], spec.num_kv_heads, -1, spec.head_size)
        if decay.u is not None and decay.w is not None:
            q = q * decay.u.T[positions][..., None, None].astype(self.dtype)
            k = k * decay.w.T[positions][..., None].astype(self.dtype)
        if piece.state is None:
            out = attend_parallel(q, k, v, decay.gamma)
        else:
            out = attend_recurrent(q, k, v, decay.gamma, piece.state[layer])
        normed = group_norm(
            out.reshape(x.shape), w["group_norm.weight"], w["group_norm.bias"], spec.head_size, spec.group_norm_eps
        )
        return self._linear(w, "out", silu(self._linear(w, "gate", x)) * normed)

    def _linear(self, w: LayerWeights, name: str, x: Array) -> Array:
        y: Array = x @ w[f"{name}.weight"]
        bias = w.get(f"{name}.bias")
        return y if bias is None else y + bias
