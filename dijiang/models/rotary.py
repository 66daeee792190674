"""Rotary frequencies and their position-independent scalings."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..errors import CheckpointError
from .spec import ModelSpec, RopeScaling


def read_base(config: dict[str, Any], old: str) -> float:
    """Base of the rotary frequencies: `rope_parameters.rope_theta`, or the key `old`."""
    new = (config.get("rope_parameters") or {}).get("rope_theta")
    return float(config.get(old, 10000.0) if new is None else new)


def read_scaling(config: dict[str, Any]) -> RopeScaling | None:
    """`rope_scaling` (old) or `rope_parameters` (new) of a config.

    Raises CheckpointError for kinds whose angles depend on the final length.
    """
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling("linear", float(rope["factor"]))
    if kind == "llama3":
        return RopeScaling(
            "llama3",
            float(rope["factor"]),
            float(rope["low_freq_factor"]),
            float(rope["high_freq_factor"]),
            int(rope["original_max_position_embeddings"]),
        )
    raise CheckpointError(
        f"config.json: rope scaling {kind!r}, expected linear or llama3; angles that depend on the "
        "final length have no exact recurrence: retrain with a position-independent scaling"
    )


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
    blend = (scaling.original_max_positions / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    between = (1 - blend) * frequencies / scaling.factor + blend * frequencies
    slow = np.where(wavelength > low, frequencies / scaling.factor, between)
    return np.where(wavelength < high, frequencies, slow)
