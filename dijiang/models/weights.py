"""How a family's tensors become the canonical weights that reference and graph share.

Canonical weights (shapes; linear weights are stored [in, out], ready for `x @ W + b`):

    embed.weight [vocab, d]         head.weight [d, vocab]      final_norm.{weight,bias} [d]
    layers.{l}.attn_norm.{weight,bias} [d]                      layers.{l}.mlp_norm.{weight,bias} [d]
    layers.{l}.qkv.{weight,bias}    [d, (H + 2 Hkv) K]          columns [q | k | v], heads inside
    layers.{l}.gate.weight [d, d]   layers.{l}.proj.weight [K, K]
    layers.{l}.group_norm.{weight,bias} [d]                     layers.{l}.out.{weight,bias} [d, d]
    layers.{l}.mlp_up.{weight,bias} [d, ff]                     layers.{l}.mlp_down.{weight,bias} [ff, d]
    layers.{l}.D1, layers.{l}.D2 [Hkv, positions]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from ..errors import CheckpointError
from .checkpoint import Checkpoint

Array = np.ndarray


@dataclass(frozen=True)
class Binding:
    """One canonical weight: the checkpoint tensor it comes from, that tensor's shape, the mapping."""

    source: str
    shape: tuple[int, ...]
    to_canonical: Callable[[Array], Array] = lambda tensor: tensor


def is_decay_table(name: str) -> bool:
    """D1 and D2 are read by the decay analysis, which has its own rules for non-finite values."""
    return name.endswith((".D1", ".D2"))


class Weights(Mapping[str, Array]):
    """Canonical weights by name, read from the checkpoint each time they are asked for.

    Nothing is cached: the peak memory of a pass over all weights is that of the largest tensor.
    Values keep the dtype of the file (float32, float16 or bfloat16).
    """

    def __init__(self, checkpoint: Checkpoint, bindings: dict[str, Binding]) -> None:
        self._checkpoint = checkpoint
        self._bindings = bindings

    def __getitem__(self, name: str) -> Array:
        binding = self._bindings[name]
        tensor = self._checkpoint.read(binding.source)
        if not is_decay_table(name) and not np.isfinite(tensor.astype(np.float32)).all():
            raise CheckpointError(
                f"{self._checkpoint.path}: {binding.source} holds NaN or inf; "
                "every weight must be finite: fix or retrain the checkpoint"
            )
        return binding.to_canonical(tensor)

    def __contains__(self, name: object) -> bool:
        return name in self._bindings  # Mapping's own would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._bindings)

    def __len__(self) -> int:
        return len(self._bindings)

    def shape(self, name: str) -> tuple[int, ...]:
        """Canonical shape, without reading the tensor's data."""
        binding = self._bindings[name]
        return binding.to_canonical(np.broadcast_to(np.float32(0), binding.shape)).shape


def check_tensors(
    checkpoint: Checkpoint, bindings: dict[str, Binding], ignored: Callable[[str], bool]
) -> None:
    """Compare the checkpoint's tensors with the bindings; report every difference in one error."""
    wanted = {b.source: b.shape for b in bindings.values()}
    found = checkpoint.shapes
    if not any(name.endswith(".proj_matrix") for name in found) and any(n in found for n in wanted):
        raise CheckpointError(
            f"{checkpoint.path}: a vanilla checkpoint (no attention.proj_matrix in any layer), expected "
            "a DiJiang one; run dijiang convert on it first"
        )
    missing = sorted(set(wanted) - set(found))
    unexpected = sorted(n for n in set(found) - set(wanted) if not ignored(n))
    misshapen = [
        f"{name} {list(found[name])} (expected {list(shape)})"
        for name, shape in sorted(wanted.items())
        if name in found and tuple(found[name]) != shape
    ]
    problems = [
        f"{len(names)} {label}: {', '.join(names)}"
        for label, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("misshapen", misshapen),
        )
        if names
    ]
    if problems:
        raise CheckpointError(
            f"{checkpoint.path}: tensors do not fit config.json: {'; '.join(problems)}; "
            "fix config.json or re-download the weights"
        )
