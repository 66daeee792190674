"""Writing a checkpoint folder: tensors as they come, in shards, the whole folder or nothing."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CheckpointError
from ..files import check_new, new_folder
from ..hub import is_own
from ..progress import Progress
from .binding import Shape
from .checkpoint import UNTRAINED, hashed_line
from .weights import is_decay_table

Array = np.ndarray
#: Largest weight file; a checkpoint above it is written in several.
SHARD_BYTES = 1 << 29
#: What a checkpoint needs on disk beside its tensors: config, index, tokenizer.
SPARE_BYTES = 1 << 24
DTYPES = ("float32", "float16", "bfloat16")


def numpy_dtype(name: str) -> np.dtype:
    """float32, float16 or bfloat16 as NumPy knows it."""
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def stored_dtype(name: str, dtype: np.dtype) -> np.dtype:
    """Dtype of a tensor in a checkpoint of `dtype`: half precision cannot hold gamma^-t, float32 can."""
    return np.dtype(np.float32) if is_decay_table(name) else dtype


def nbytes(tensors: Mapping[str, Shape], dtype: np.dtype) -> int:
    """Bytes that tensors of these shapes take in a checkpoint of `dtype`."""
    return sum(math.prod(shape) * stored_dtype(name, dtype).itemsize for name, shape in tensors.items())


def write_checkpoint(
    target: Path,
    config: Mapping[str, Any],
    tensors: Iterable[tuple[str, Array]],
    total: int,
    *,
    files: Sequence[Path] = (),
    untrained: bool = False,
    progress: Progress,
) -> None:
    """Write a checkpoint folder.

    Args:
        target: folder to create, with its parents.
        config: of config.json.
        tensors: name and value of every tensor; each is dropped when its shard is written.
        total: bytes of all of them.
        files: to copy beside the weights.
        untrained: note in config.json that nobody has trained these tensors yet.
        progress: told about bytes written.

    Raises:
        CheckpointError: the target exists, cannot be written, or does not fit on the disk.
    """
    for file in files:
        require_own(file)
    check_new(target, [file.parent for file in files], CheckpointError)
    _check_room(target, total)
    with new_folder(target, CheckpointError) as folder:
        shards = _Shards(folder, total, progress)
        lines = {}
        for name, tensor in tensors:
            ordered = np.ascontiguousarray(tensor)
            if untrained:
                sha256 = hashlib.sha256(ordered.reshape(-1).view(np.uint8).data).hexdigest()
                lines[name] = hashed_line(name, ordered.shape, sha256)
            shards.add(name, ordered)
        shards.close()
        if untrained:
            noted = hashlib.sha256(b"".join(lines[name] for name in sorted(lines)))
            config = {**config, UNTRAINED: noted.hexdigest()}
        for file in files:
            shutil.copyfile(file, folder / file.name)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def require_own(file: Path) -> None:
    """CheckpointError for a link to a file of others, which a stranger's checkpoint would have us publish.

    It need not be there.
    """
    if file.exists() and not is_own(file):
        raise CheckpointError(f"{file}: a link to a file outside of its folder; put the file itself there")


def _check_room(target: Path, total: int) -> None:
    place = next(path for path in target.absolute().parents if path.is_dir())
    need, free = total + SPARE_BYTES, shutil.disk_usage(place).free
    if need > free:
        raise CheckpointError(
            f"{place}: it needs {need / 1e9:,.2f} GB, {free / 1e9:,.2f} GB are free; "
            "free some space or choose another disk"
        )


class _Shards:
    """Safetensors files of at most SHARD_BYTES (or one tensor) each, and their index."""

    def __init__(self, folder: Path, total: int, progress: Progress) -> None:
        self._folder, self._total, self._progress = folder, total, progress
        self._open: dict[str, Array] = {}
        self._owners: list[list[str]] = []
        self._written = 0

    def add(self, name: str, tensor: Array) -> None:
        if self._open and self._size() + tensor.nbytes > SHARD_BYTES:
            self._write()
        self._open[name] = tensor

    def _size(self) -> int:
        return sum(tensor.nbytes for tensor in self._open.values())

    def _write(self) -> None:
        from safetensors import SafetensorError
        from safetensors.numpy import save_file

        file = self._folder / f"shard-{len(self._owners)}"
        try:
            save_file(self._open, file, metadata={"format": "pt"})
        except SafetensorError as error:  # how it reports a full disk
            raise OSError(str(error)) from error
        self._written += self._size()
        self._owners.append(list(self._open))
        self._open.clear()
        self._progress("write", self._written, self._total)

    def close(self) -> None:
        """Write what is left; name the files when their number is known."""
        if self._open:
            self._write()
        count = len(self._owners)
        if count == 1:
            (self._folder / "shard-0").rename(self._folder / "model.safetensors")
            return
        weight_map: dict[str, str] = {}
        for index, names in enumerate(self._owners):
            file = f"model-{index + 1:05}-of-{count:05}.safetensors"
            (self._folder / f"shard-{index}").rename(self._folder / file)
            weight_map |= dict.fromkeys(names, file)
        text = json.dumps({"metadata": {"total_size": self._total}, "weight_map": weight_map}, indent=1)
        (self._folder / "model.safetensors.index.json").write_text(text + "\n", encoding="utf-8")
