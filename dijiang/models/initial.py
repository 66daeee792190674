"""Random checkpoints: what a tensor of a fresh DiJiang model holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from ..progress import Progress, silent
from .binding import Shape, shapes
from .decay import initial_gamma
from .load import FAMILIES
from .presets import PRESETS
from .store import DTYPES, nbytes, numpy_dtype, stored_dtype, write_checkpoint

Array = np.ndarray
#: Standard deviation of a linear weight (initializer_range of all three families).
SPREAD = np.float32(0.02)


def projection(shape: Shape, random: np.random.Generator) -> Array:
    """P = C diag(w): the orthonormal DCT-II matrix with its columns weighted by w ~ N(0, 1)."""
    size = shape[0]
    row, column = np.arange(size)[:, None], np.arange(size)
    dct = np.sqrt(2 / size) * np.cos(np.pi * (2 * column + 1) * row / (2 * size))
    dct[0] /= np.sqrt(2)
    return dct * random.standard_normal(size)


def _xavier(shape: Shape, random: np.random.Generator) -> Array:
    bound = 2**-2.5 * (6 / sum(shape)) ** 0.5
    return random.uniform(-bound, bound, shape)


def _powers(sign: int) -> Callable[[Shape, np.random.Generator], Array]:
    def table(shape: Shape, _: np.random.Generator) -> Array:
        gamma = initial_gamma(shape[1])[:, None]
        with np.errstate(over="ignore"):
            powers: Array = gamma ** (sign * np.arange(shape[2]))
        return powers[None, :, :, None]

    return table


def _normal(shape: Shape, random: np.random.Generator) -> Array:
    values = random.standard_normal(shape, dtype=np.float32)
    values *= SPREAD
    return values


#: End of a tensor's name -> its first value; the first row that fits is taken.
RULES: tuple[tuple[str, Callable[[Shape, np.random.Generator], Array]], ...] = (
    (".proj_matrix", projection),
    (".W_G", _xavier),
    (".D1", _powers(1)),
    (".D2", _powers(-1)),
    ("norm.weight", lambda shape, _: np.ones(shape)),
    (".bias", lambda shape, _: np.zeros(shape)),
    ("", _normal),
)


def first_values(wanted: Mapping[str, Shape], dtype: np.dtype, seed: int) -> Iterator[tuple[str, Array]]:
    """Name and first value of tensors of a checkpoint of `dtype`, one at a time.

    The same names and seed give the same values.

    Raises:
        InputError: the seed is negative.
    """
    if seed < 0:
        raise InputError(f"seed is {seed}, expected 0 or more; change it")
    random = np.random.default_rng(seed)

    def first_value(name: str, shape: Shape) -> Array:
        rule = next(value for end, value in RULES if name.endswith(end))
        with np.errstate(over="ignore"):  # gamma^-t past float32's range
            return rule(shape, random).astype(stored_dtype(name, dtype), copy=False)

    return ((name, first_value(name, shape)) for name, shape in wanted.items())


def init(
    preset: str, output: str | Path, *, dtype: str = "float16", seed: int = 0, progress: Progress = silent
) -> Path:
    """Write a random checkpoint of a published shape, to size a device before any training.

    Args:
        preset: a name of `PRESETS`.
        output: folder to create, with its parents.
        dtype: of the weights: float32, float16 or bfloat16; D1 and D2 are float32 in any case.
        seed: of the random numbers; the same seed gives the same bytes.
        progress: told about bytes written.

    Raises:
        InputError: unknown preset or dtype.
        CheckpointError: the output exists, cannot be written, or does not fit on the disk.
    """
    for what, value, known in (("preset", preset, tuple(PRESETS)), ("dtype", dtype, DTYPES)):
        if value not in known:
            raise InputError(f"{what} {value!r} is unknown, expected one of {', '.join(known)}")
    return write_random(PRESETS[preset], output, dtype=dtype, seed=seed, progress=progress)


def write_random(
    config: Mapping[str, Any],
    output: str | Path,
    *,
    dtype: str = "float16",
    seed: int = 0,
    progress: Progress = silent,
) -> Path:
    """Write a random checkpoint of any config of a supported family; see `init`."""
    family, kind = FAMILIES[config["model_type"]], numpy_dtype(dtype)
    wanted = shapes(family.bindings(family.spec(dict(config))))
    write_checkpoint(
        Path(output),
        {**config, "torch_dtype": dtype},
        first_values(wanted, kind, seed),
        nbytes(wanted, kind),
        untrained=True,
        progress=progress,
    )
    return Path(output)
