"""Rotary frequencies and their position-independent scalings."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import CheckpointError
from .config import brief, number, want
from .spec import ModelSpec, RopeScaling


@dataclass(frozen=True)
class Rope:
    """What a config says of rotary positions. share: of the channels of a head that are rotated."""

    base: float
    share: float
    scaling: RopeScaling | None


def read_rope(config: dict[str, Any], base: str, share: str | None = None) -> Rope:
    """Rotary positions of a config in any spelling.

    The order is that of transformers 5: `rope_scaling`, where it holds something, stands for
    `rope_parameters`; what is not in there comes from the keys `base` and `share` (None: the family
    rotates all channels) beside it.

    Raises:
        CheckpointError: a value of the wrong kind, or a scaling that is not supported.
    """
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise CheckpointError(f"config.json: rope_scaling is {brief(rope)}, expected an object; fix config.json")
    theta = number(rope, "rope_theta", number(config, base, 10000.0))
    part = 1.0 if share is None else number(rope, "partial_rotary_factor", number(config, share, 0.25))
    return Rope(theta, part, _read_scaling(config, rope))


def _read_scaling(config: dict[str, Any], rope: dict[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind not in ("linear", "llama3"):
        raise CheckpointError(
            f"config.json: rope scaling {brief(kind)}, expected linear or llama3; retrain with one of them (angles "
            "of dynamic depend on the final length, and have no exact recurrence)"
        )
    factor = _factor(rope, "factor")
    if kind == "linear":
        return RopeScaling(kind, factor)
    original = "original_max_position_embeddings"
    place = next((p for p in (config, rope) if original in p), {original: config["max_position_embeddings"]})
    low, high = _factor(rope, "low_freq_factor"), _factor(rope, "high_freq_factor")
    return RopeScaling(kind, factor, low, high, want(place, original, int))


def _factor(rope: dict[str, Any], key: str) -> float:
    value = number({key: rope[key]}, key, 0.0)
    if value == 0:
        raise CheckpointError(f"config.json: {key} of the rope scaling is 0, expected more; fix config.json")
    return value


def inverse_frequencies(spec: ModelSpec) -> np.ndarray:
    """Angle per position of each rotated pair: [rotary_dims / 2] float64, radians.

    The base frequencies are rounded to float32, as the published code holds them.
    """
    exponents = np.arange(0, spec.rotary_dims, 2) / max(spec.rotary_dims, 1)
    frequencies = (1.0 / spec.rotary_base**exponents).astype(np.float32).astype(np.float64)
    scaling = spec.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    wavelength = 2 * math.pi / frequencies
    low = scaling.original_max_positions / scaling.low_freq_factor
    high = scaling.original_max_positions / scaling.high_freq_factor
    with np.errstate(divide="ignore", invalid="ignore"):  # of equal factors nothing lies between
        blend = (scaling.original_max_positions / wavelength - scaling.low_freq_factor) / (
            scaling.high_freq_factor - scaling.low_freq_factor
        )
        between = (1 - blend) * frequencies / scaling.factor + blend * frequencies
    slow = np.where(wavelength > low, frequencies / scaling.factor, between)
    return np.where(wavelength < high, frequencies, slow)
