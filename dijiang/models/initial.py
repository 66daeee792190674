"""Random checkpoints: what a tensor of a fresh DiJiang model holds, written shard by shard."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from .binding import shapes
from .decay import initial_gamma
from .load import FAMILIES
from .presets import PRESETS

Array = np.ndarray
Shape = tuple[int, ...]
#: Largest weight file; a checkpoint above it is written in several.
SHARD_BYTES = 1 << 30
DTYPES = ("float32", "float16", "bfloat16")
#: Standard deviation of a linear weight (GPT-NeoX's initializer_range).
SPREAD = 0.02


def projection(shape: Shape, random: np.random.Generator) -> Array:
    """P = C diag(w): the orthonormal DCT-II matrix with its columns weighted by w ~ N(0, 1)."""
    size = shape[0]
    row, column = np.arange(size)[:, None], np.arange(size)
    dct = np.sqrt(2 / size) * np.cos(np.pi * (2 * column + 1) * row / (2 * size))
    dct[0] /= np.sqrt(2)
    scaled: Array = dct * random.standard_normal(size)
    return scaled


def _xavier(shape: Shape, random: np.random.Generator) -> Array:
    bound = 2**-2.5 * (6 / sum(shape)) ** 0.5
    return random.uniform(-bound, bound, shape)


def _powers(sign: int) -> Callable[[Shape, np.random.Generator], Array]:
    def table(shape: Shape, _: np.random.Generator) -> Array:
        gamma = initial_gamma(shape[1])[:, None]
        powers: Array = (gamma ** (sign * np.arange(shape[2])))[None, :, :, None]
        return powers

    return table


def _ones(shape: Shape, _: np.random.Generator) -> Array:
    return np.ones(shape)


def _zeros(shape: Shape, _: np.random.Generator) -> Array:
    return np.zeros(shape)


def _normal(shape: Shape, random: np.random.Generator) -> Array:
    return random.standard_normal(shape, dtype=np.float32) * np.float32(SPREAD)


#: End of a tensor's name -> its first value; the first row that fits is taken.
RULES: tuple[tuple[str, Callable[[Shape, np.random.Generator], Array]], ...] = (
    (".proj_matrix", projection),
    (".W_G", _xavier),
    (".D1", _powers(1)),
    (".D2", _powers(-1)),
    ("norm.weight", _ones),
    (".bias", _zeros),
    ("", _normal),
)


def tensors(config: dict[str, Any], seed: int) -> Iterator[tuple[str, Array]]:
    """Name and first value of every tensor of a config's checkpoint, one at a time."""
    family = FAMILIES[config["model_type"]]
    random = np.random.default_rng(seed)
    for name, shape in shapes(family.bindings(family.spec(config))).items():
        rule = next(value for end, value in RULES if name.endswith(end))
        yield name, rule(shape, random)


def init(preset: str, output: str | Path, *, dtype: str = "float16", seed: int = 0) -> Path:
    """Write a random checkpoint of a published shape, to size a device before any training.

    Args:
        preset: a name of `PRESETS`.
        output: folder to create; its parent must exist.
        dtype: of the weights: float32, float16 or bfloat16.
        seed: of the random numbers; the same seed gives the same bytes.

    Raises:
        InputError: unknown preset or dtype, or an output that exists or cannot be written.
    """
    for name, value, known in (("preset", preset, tuple(PRESETS)), ("dtype", dtype, DTYPES)):
        if value not in known:
            raise InputError(f"{name} {value!r} is unknown, expected one of {', '.join(known)}")
    folder = Path(output)
    config = PRESETS[preset] | {"torch_dtype": dtype}
    try:
        folder.mkdir()
        # config.json comes last: a folder that was cut off is no checkpoint.
        write_shards(folder, tensors(config, seed), dtype)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"{folder}: cannot be written ({error.strerror or error}); choose a new folder"
        ) from error
    return folder


def write_shards(folder: Path, named: Iterator[tuple[str, Array]], dtype: str) -> None:
    """Write tensors as safetensors files of at most SHARD_BYTES each, with their index."""
    import ml_dtypes
    from safetensors.numpy import save_file

    target = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    shard: dict[str, Array] = {}
    owners: list[list[str]] = []
    total = 0

    def close() -> None:
        save_file(shard, folder / f"shard-{len(owners)}", metadata={"format": "pt"})
        owners.append(list(shard))
        shard.clear()

    for name, tensor in named:
        with np.errstate(over="ignore"):
            shard[name] = np.ascontiguousarray(tensor, dtype=target)
        total += shard[name].nbytes
        if sum(t.nbytes for t in shard.values()) >= SHARD_BYTES:
            close()
    if shard:
        close()
    if len(owners) == 1:
        (folder / "shard-0").rename(folder / "model.safetensors")
        return
    files = [f"model-{i:05}-of-{len(owners):05}.safetensors" for i in range(1, len(owners) + 1)]
    for index, file in enumerate(files):
        (folder / f"shard-{index}").rename(folder / file)
    weight_map = {name: file for file, names in zip(files, owners, strict=True) for name in names}
    index_file = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_file, indent=1) + "\n")
