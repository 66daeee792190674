"""ModelSpec: everything about a DiJiang model but its weights."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from ..errors import CheckpointError

#: Fields of a ModelSpec that are more than 0 in every model.
POSITIVE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "max_positions",
    "rotary_base",
)


@dataclass(frozen=True)
class RopeScaling:
    """Position-independent scaling of the rotary frequencies (`linear` or `llama3`)."""

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


@dataclass(frozen=True)
class ModelSpec:
    """Shape and options of one DiJiang decoder; family names do not appear outside `models/`.

    Sizes are counts of channels, heads, layers or tokens. `rotary_dims` is the number of
    leading channels of each head that are rotated (0: none). `max_positions` is the length of
    the stored D1/D2 tables, and of the position embeddings if `learned_positions`.

    norm: `layer` (weight and bias) or `rms` (weight).  norm_first: norms stand before attention and
    MLP, else after each residual sum.  gated_mlp: act(x W_gate) * (x W_up) instead of act(x W_up).
    embedding_size: channels of the token embedding and the head; None: hidden_size, without the
    projections from and to the hidden channels.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    max_positions: int
    norm_eps: float
    activation: str
    parallel_residual: bool
    rotary_dims: int
    rotary_base: float
    rope_scaling: RopeScaling | None = None
    tied_embeddings: bool = False
    attention_bias: bool = True
    mlp_bias: bool = True
    norm: str = "layer"
    norm_first: bool = True
    final_norm: bool = True
    gated_mlp: bool = False
    learned_positions: bool = False
    embedding_size: int | None = None
    group_norm_eps: float = 1e-5
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = field(default=())

    def __post_init__(self) -> None:
        for name in POSITIVE:
            if not 0 < getattr(self, name) < math.inf:
                raise CheckpointError(
                    f"config: {name} is {getattr(self, name)}, expected more than 0; fix config.json"
                )
        if self.hidden_size % self.num_heads:
            raise CheckpointError(
                f"config: hidden_size {self.hidden_size} is not divisible by "
                f"num_attention_heads {self.num_heads}; fix config.json"
            )
        if self.num_heads % self.num_kv_heads:
            raise CheckpointError(
                f"config: num_attention_heads {self.num_heads} is not divisible by "
                f"num_key_value_heads {self.num_kv_heads}; fix config.json"
            )
        if self.rotary_dims % 2 or self.rotary_dims > self.head_size:
            raise CheckpointError(
                f"config: {self.rotary_dims} rotary channels, expected an even number up to the "
                f"head size {self.head_size}; fix the sizes or the rotated share in config.json"
            )

    @property
    def head_size(self) -> int:
        """K: channels a head, also the number of features and of group-norm groups."""
        return self.hidden_size // self.num_heads

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """Recurrent state of one layer and one sequence: [Hkv, K, V], float32."""
        return (self.num_kv_heads, self.head_size, self.head_size)

    @property
    def state_bytes(self) -> int:
        """Bytes of the recurrent state of one sequence over all layers (float32)."""
        heads, features, values = self.state_shape
        return 4 * self.num_layers * heads * features * values

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form, the inverse of `from_dict`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ModelSpec:
        """Read the form that `to_dict` wrote; unknown or missing keys are an error."""
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(data) - known)
        if unknown:
            raise CheckpointError(f"spec: unknown keys {unknown}; use the dijiang that wrote it")
        values = dict(data)
        if values.get("rope_scaling") is not None:
            values["rope_scaling"] = RopeScaling(**values["rope_scaling"])
        values["eos_token_ids"] = tuple(values.get("eos_token_ids", ()))
        try:
            return cls(**values)
        except TypeError as error:
            raise CheckpointError(f"spec: {error}; export the checkpoint again") from error
