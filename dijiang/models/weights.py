"""How a family's tensors become the canonical weights that reference and graph share.

Canonical weights (shapes; linear weights are stored [in, out], ready for `x @ W + b`; a bias, and
what is in brackets, only where the ModelSpec says so; e is the embedding size, d the hidden size):

    embed.weight [vocab, e]         head.weight [e, vocab]      (positions.weight [positions, d])
    (embed_in.weight [e, d])        (embed_out.weight [d, e])   (final_norm.{weight,bias} [d])
    layers.{l}.attn_norm.{weight,bias} [d]                      layers.{l}.mlp_norm.{weight,bias} [d]
    layers.{l}.qkv.{weight,bias}    [d, (H + 2 Hkv) K]          columns [q | k | v], heads inside
    layers.{l}.gate.weight [d, d]   layers.{l}.proj.weight [K, K]
    layers.{l}.group_norm.{weight,bias} [d]                     layers.{l}.out.{weight,bias} [d, d]
    layers.{l}.mlp_up.{weight,bias} [d, ff]                     layers.{l}.mlp_down.{weight,bias} [ff, d]
    (layers.{l}.mlp_gate.{weight,bias} [d, ff])                 layers.{l}.D1, .D2 [Hkv, positions]
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np

from ..errors import CheckpointError
from .binding import Bindings, Shape
from .checkpoint import Checkpoint

Array = np.ndarray
#: Numbers looked at together: the temporaries stay in the processor's cache.
PART = 1 << 16
#: Names listed of each kind of difference between a config and its tensors.
LISTED = 8


def is_decay_table(name: str) -> bool:
    """D1 and D2 are read by the decay analysis, which has its own rules for non-finite values."""
    return name.endswith((".D1", ".D2"))


class Tensors(Protocol):
    """What weights are read from: a Checkpoint, or what stands in for one. path: for errors."""

    @property
    def path(self) -> Path:
        """Where they are."""

    def read(self, name: str) -> Array:
        """One tensor by its name there, in its stored dtype."""


def read_finite(checkpoint: Tensors, source: str) -> Array:
    """A tensor of the checkpoint in its stored dtype; CheckpointError for NaN, inf and what is beyond float32."""
    tensor = checkpoint.read(source)
    if not is_finite(tensor):
        raise CheckpointError(
            f"{checkpoint.path}: {source} holds NaN or inf; "
            "every weight must be finite: fix or retrain the checkpoint"
        )
    if tensor.dtype == np.float64 and tensor.size and max(tensor.max(), -tensor.min()) > np.finfo(np.float32).max:
        raise CheckpointError(
            f"{checkpoint.path}: {source} holds a number beyond float32; every weight must be within it: fix or "
            "retrain the checkpoint"
        )
    return tensor


def is_finite(tensor: Array) -> bool:
    """Whether no number of a float tensor is NaN or inf: these have every exponent bit set, as inf has.

    Seven times as fast as `np.isfinite` of a float16 tensor in float32.
    """
    unsigned = np.dtype(f"u{tensor.dtype.itemsize}")
    exponent = np.array(np.inf, tensor.dtype).view(unsigned)
    bits = tensor.reshape(-1).view(unsigned)
    parts = (bits[start : start + PART] for start in range(0, bits.size, PART))
    return all(bool(((part & exponent) != exponent).all()) for part in parts)


class Weights(Mapping[str, Array]):
    """Canonical weights by name, read from the checkpoint each time they are asked for.

    Nothing is cached: the peak memory of a pass over all weights is that of the largest tensor.
    Values keep the dtype of the file (float32, float16 or bfloat16).

    bindings: which tensors they are made of, by their names in the checkpoint.
    """

    def __init__(self, checkpoint: Tensors, bindings: Bindings) -> None:
        self._checkpoint = checkpoint
        self.bindings = bindings

    def __getitem__(self, name: str) -> Array:
        parts = self.bindings[name]
        read = self._checkpoint.read if is_decay_table(name) else partial(read_finite, self._checkpoint)
        tensors = [part.to_canonical(read(part.source)) for part in parts]
        types = {tensor.dtype for tensor in tensors}
        if len(types) > 1:  # float16 and bfloat16 have no common type that NumPy knows of
            wide = np.float64 if np.dtype(np.float64) in types else np.float32
            tensors = [tensor.astype(wide) for tensor in tensors]
        return tensors[0] if len(tensors) == 1 else np.concatenate(tensors, axis=-1)

    def __contains__(self, name: object) -> bool:
        return name in self.bindings  # Mapping's own would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.bindings)

    def __len__(self) -> int:
        return len(self.bindings)

    def shape(self, name: str) -> Shape:
        """Canonical shape, without reading the tensor's data."""
        shapes = [p.to_canonical(np.broadcast_to(np.float32(0), p.shape)).shape for p in self.bindings[name]]
        return (*shapes[0][:-1], sum(shape[-1] for shape in shapes))


def check_tensors(checkpoint: Checkpoint, wanted: Mapping[str, Shape], ignored: tuple[str, ...]) -> None:
    """Compare the checkpoint's tensors with the wanted ones; report every difference in one error.

    A tensor of a dtype that no weight has is an error of its own.

    Args:
        wanted: shape of each tensor, by its name in the checkpoint.
        ignored: ends of the names of tensors that carry nothing.
    """
    found = checkpoint.shapes
    missing = sorted(set(wanted) - set(found))
    unexpected = sorted(n for n in set(found) - set(wanted) if not n.endswith(ignored))
    misshapen = [
        f"{name} {list(found[name])} (expected {list(shape)})"
        for name, shape in sorted(wanted.items())
        if name in found and tuple(found[name]) != shape
    ]
    problems = [
        f"{len(names)} {label}: {', '.join(names[:LISTED])}{', ...' if len(names) > LISTED else ''}"
        for label, names in (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen))
        if names
    ]
    if problems:
        raise CheckpointError(
            f"{checkpoint.path}: tensors do not fit config.json: {'; '.join(problems)}; "
            "fix config.json or re-download the weights"
        )
    for name in wanted:
        checkpoint.require_float(name)
