"""What a model costs to hold, and what a vanilla one of the same shape would."""

from __future__ import annotations

from dataclasses import dataclass

from .opened import Bundle

#: Bytes of a number of the vanilla model's cache: float16.
CACHE_NUMBER = 2
#: Lengths at which the vanilla cache is stated.
LENGTHS = (2_048, 32_768, 1_000_000)


@dataclass(frozen=True)
class Sizes:
    """Bytes of a loaded bundle and one sequence.

    parameters: numbers in the checkpoint's weights; 0: exported before they were counted.
    memory_bytes: weights and state, the same at any length (working memory comes on top).
    cache_bytes_per_token: keys and values that a vanilla model of this shape keeps in float16.
    cache_larger_from: tokens from which that cache is larger than the state.
    cache_bytes: of that cache, by length.
    """

    parameters: int
    bundle_bytes: int
    weight_bytes: int
    state_bytes: int
    memory_bytes: int
    cache_bytes_per_token: int
    cache_larger_from: int
    cache_bytes: dict[int, int]


def cache_bytes_per_token(layers: int, heads: int, channels: int) -> int:
    """Bytes of keys and values of one token in a vanilla model's float16 cache; heads: those of keys and values."""
    return 2 * CACHE_NUMBER * layers * heads * channels


def sizes(bundle: Bundle) -> Sizes:
    """Sizes of an opened bundle."""
    spec = bundle.manifest.spec
    weights = bundle.data_bytes
    per_token = cache_bytes_per_token(spec.num_layers, spec.num_kv_heads, spec.head_size)
    return Sizes(
        parameters=bundle.manifest.parameters,
        bundle_bytes=bundle.nbytes,
        weight_bytes=weights,
        state_bytes=spec.state_bytes,
        memory_bytes=weights + spec.state_bytes,
        cache_bytes_per_token=per_token,
        cache_larger_from=spec.state_bytes // per_token + 1,
        cache_bytes={length: length * per_token for length in LENGTHS},
    )
