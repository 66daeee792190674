"""Files of tensors as people have them: shapes without data, and one tensor at a time.

Nothing is mapped: a file that is cut while it is read gives an error, not SIGBUS. So does one that is written to.
"""

from __future__ import annotations

import math
import os
import pickle
import stat
import warnings
import weakref
from abc import ABC, abstractmethod
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import ZIP_STORED, BadZipFile, ZipFile, ZipInfo

import numpy as np

from ..errors import CheckpointError, reason
from ..reading import JSON_BYTES, parse_json
from .binding import Shape

#: NumPy names of what weights can be; others are refused when they are read as weights.
FLOATS = ("float32", "float16", "bfloat16", "float64")
BFLOAT16 = "bfloat16"
#: What safetensors calls them.
SAFETENSORS = {"F32": "float32", "F16": "float16", "BF16": BFLOAT16, "F64": "float64"}
#: Bytes of a larger header of a safetensors file are none; safetensors has the same bound.
HEADER_BYTES = 100_000_000
#: What Python raises for a zip that is none, or damaged, or of another kind.
NO_ZIP = (BadZipFile, OSError, ValueError, RuntimeError, NotImplementedError)
#: No checkpoint holds one, and a few bytes of a pickle make one of any size.
BOMB = b"bytearray"
#: Bytes that the entries beside a zip's tensors and its pickle have at most: versions, the order of bytes.
SMALL = 4096
#: Bytes that the system gives at once; Linux gives 2 GiB at most.
PIECE = 1 << 30


class TensorFile(ABC):
    """One file of tensors: shapes without data, and one tensor at a time.

    shapes, dtypes: of every tensor, by name; a dtype has its NumPy name if it is one of FLOATS.
    notes: what was done to read it.
    """

    kind = "tensor"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.notes: list[str] = []
        self.shapes: dict[str, Shape] = {}
        self.dtypes: dict[str, str] = {}
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would wait for its writer
        except OSError as error:
            raise self._damaged(error.strerror or str(error)) from error
        weakref.finalize(self, os.close, self._descriptor)
        found = os.fstat(self._descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise self._damaged("not a regular file")
        self.size, self._written = found.st_size, found.st_mtime_ns

    @abstractmethod
    def raw(self, name: str) -> np.ndarray:
        """The bytes of a tensor in C order: [nbytes] uint8."""

    def require_float(self, name: str) -> None:
        """CheckpointError if the dtype of a tensor is none of FLOATS."""
        if self.dtypes[name] not in FLOATS:
            raise CheckpointError(
                f"{self.path.parent}: {name} has dtype {self.dtypes[name]}, expected float32, float16 or "
                "bfloat16; start from the unquantized checkpoint"
            )

    def numpy_dtype(self, name: str) -> np.dtype:
        """Of a tensor; CheckpointError as `require_float`."""
        self.require_float(name)
        return numpy_float(self.dtypes[name], self.path)

    def typed(self, name: str, raw: np.ndarray) -> np.ndarray:
        """The tensor whose bytes were read; CheckpointError as `require_float`."""
        return raw.view(self.numpy_dtype(name)).reshape(self.shapes[name])

    def _bytes_at(self, start: int, count: int) -> np.ndarray:
        """[count] uint8 from a place in the file; CheckpointError if they are not there, or no longer."""
        if not 0 <= start <= start + count <= self.size:
            raise self._damaged(f"bytes {start} to {start + count} of {self.size}")
        data = np.empty(count, np.uint8)
        done = 0
        while done < count:
            try:
                read = os.preadv(self._descriptor, [data[done : done + PIECE].data], start + done)
            except OSError as error:
                raise self._damaged(error.strerror or str(error)) from error
            if not read:
                raise self._damaged(f"it was cut at byte {start + done} while it was read")
            done += read
        if os.fstat(self._descriptor).st_mtime_ns != self._written:
            raise CheckpointError(
                f"{self.path}: it was written to while it was read; start again when that is done"
            )
        return data

    def _damaged(self, reason: object) -> CheckpointError:
        words = " ".join(str(reason).split()) or type(reason).__name__
        return CheckpointError(f"{self.path}: not a whole {self.kind} file ({words[:200]}); download it again")


def numpy_float(name: str, path: Path) -> np.dtype:
    """One of FLOATS; CheckpointError where it needs ml_dtypes and that is missing."""
    if name != BFLOAT16:
        return np.dtype(name)
    try:
        import ml_dtypes
    except ImportError:
        raise CheckpointError(f"{path}: bfloat16 needs ml_dtypes; pip install 'dijiang[export]'") from None
    return np.dtype(ml_dtypes.bfloat16)


class SafetensorsFile(TensorFile):
    """A .safetensors file: eight bytes that say how long its header is, the header in JSON, the tensors."""

    kind = "safetensors"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        length = int.from_bytes(self._bytes_at(0, 8).tobytes(), "little")
        if length > HEADER_BYTES:
            raise self._damaged(f"a header of {length} bytes")
        try:
            header = parse_json(self._bytes_at(8, length).tobytes())
            header.pop("__metadata__", None)
            self.shapes = {name: _shape(entry["shape"]) for name, entry in header.items()}
            self.dtypes = {n: SAFETENSORS.get(entry["dtype"], str(entry["dtype"])) for n, entry in header.items()}
            spans = {name: _shape(entry["data_offsets"]) for name, entry in header.items()}
            spans = {name: (begin, end) for name, (begin, end) in spans.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._damaged(f"its header: {reason(error)}") from error
        end = 0
        for begin, following in sorted(spans.values()):
            if begin != end or following < begin:
                raise self._damaged(f"its tensors leave or share bytes from {min(begin, end)} on")
            end = following
        if 8 + length + end != self.size:
            raise self._damaged(f"{self.size} bytes, its header says {8 + length + end}")
        for name, dtype in self.dtypes.items():
            count = spans[name][1] - spans[name][0]
            if dtype in FLOATS and math.prod(self.shapes[name]) * numpy_float(dtype, path).itemsize != count:
                raise self._damaged(f"{name} {list(self.shapes[name])} of {dtype} in {count} bytes")
        self._spans = {name: (8 + length + begin, end - begin) for name, (begin, end) in spans.items()}

    def raw(self, name: str) -> np.ndarray:
        return self._bytes_at(*self._spans[name])


def _shape(value: Any) -> Shape:
    """A list of counts; ValueError for anything else."""
    if not isinstance(value, list) or not all(type(n) is int and 0 <= n < 1 << 62 for n in value):
        raise ValueError(f"{str(value)[:60]}, expected a list of counts")
    return tuple(value)


class TorchFile(TensorFile):
    """A pytorch_model.bin, read with `weights_only=True`: code inside a pickle never runs.

    Of a zip only the names are read, and where each tensor lies. The format before PyTorch 1.6 has no
    such places: its tensors are read when it is opened.
    """

    kind = "PyTorch"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            import torch
            from torch._subclasses.fake_tensor import FakeTensorMode
        except ImportError:
            raise CheckpointError(
                f"{path}: a PyTorch file needs torch; pip install 'dijiang[torch]', "
                "or save the checkpoint as safetensors"
            ) from None
        if bomb := _bomb(path):
            raise CheckpointError(f"{path}: it holds {bomb}; save the checkpoint as safetensors")
        if torn := _torn(path):
            raise self._damaged(f"{torn} is not what was written")
        placed = hasattr(torch.UntypedStorage, "_checkpoint_offset") and _is_plain_zip(path)
        try:
            with warnings.catch_warnings(), FakeTensorMode() if placed else nullcontext():
                warnings.simplefilter("ignore")  # of pickle protocols: what was read is judged below
                found = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"{path}: the pickle holds more than tensors, and code in it is never run; "
                "save the checkpoint as safetensors"
            ) from error
        except Exception as error:  # whatever a damaged pickle makes of torch's functions
            raise self._damaged(error) from error
        self._places: dict[str, _Place | None] = {}
        self._loaded = self._state_dict(found)
        for name, tensor in self._loaded.items():
            kind = " ".join(str(k).removeprefix("torch.") for k in (tensor.dtype, tensor.layout))
            self.dtypes[name] = kind.removesuffix(" strided")
            self.shapes[name] = tuple(tensor.shape)
            if placed:
                self._places[name] = _place_of(tensor)
        if placed:
            self._loaded.clear()  # tensors without data, which only one thread may ask

    def _state_dict(self, found: Any) -> dict[str, Any]:
        """The one dict of tensors in what was saved: itself, or an entry beside epochs and optimizers."""
        import torch

        def tensors_of(value: Any) -> dict[str, Any]:
            entries = value.items() if isinstance(value, dict) else ()
            return {str(n): t for n, t in entries if isinstance(t, torch.Tensor)}

        whole = tensors_of(found)
        nested = {} if whole or not isinstance(found, dict) else {n: tensors_of(v) for n, v in found.items()}
        inside = {str(name): tensors for name, tensors in nested.items() if tensors}
        if whole and len(whole) == len(found):
            return whole
        if len(inside) == 1:
            self.notes.append(f"of {self.path.name}, only {next(iter(inside))!r} is read")
            return next(iter(inside.values()))
        kinds = ", ".join(sorted(inside)) or type(found).__name__
        raise CheckpointError(f"{self.path}: not one dict of tensors ({kinds}); save model.state_dict()")

    def raw(self, name: str) -> np.ndarray:
        place = self._places[name] if self._places else _loaded_bytes(self._loaded[name])
        if place is None:
            return np.empty(0, np.uint8)  # no bytes of its own; it is refused as a weight
        if isinstance(place, np.ndarray):
            return place
        shape, size = self.shapes[name], place.size
        if math.prod(shape) * size > self.size:
            raise self._damaged(f"{name} {list(shape)} in {self.size} bytes")
        reach = 1 + sum((n - 1) * step for n, step in zip(shape, place.steps, strict=True))
        data = self._bytes_at(place.start, reach * size if math.prod(shape) else 0).view(f"V{size}")
        spread = np.ndarray(shape, data.dtype, data, strides=[step * size for step in place.steps])
        return np.ascontiguousarray(spread).reshape(-1).view(np.uint8)


def _opened(path: Path) -> ZipFile:
    """A zip whose entries are checked against their CRC when they are read; torch can be told to write 0 for it."""
    archive = ZipFile(path)
    for entry in archive.infolist():
        entry.CRC = entry.CRC or None  # type: ignore[assignment]  # None: not checked
    return archive


def _torn(path: Path) -> str | None:
    """The first entry of a zip that is not what was written; None: there is none, or it is no zip.

    What is packed is not unpacked for that: a small file could go on for ever.
    """
    with suppress(*NO_ZIP), _opened(path) as archive:
        for entry in archive.infolist():
            if entry.compress_type == ZIP_STORED and not _is_whole(archive, entry):
                return entry.filename
    return None


def _is_whole(archive: ZipFile, entry: ZipInfo) -> bool:
    try:
        with archive.open(entry) as stream:
            while stream.read(1 << 24):
                pass
    except BadZipFile:
        return False
    return True


def _bomb(path: Path) -> str | None:
    """What in a file would take any memory, or None: an entry of a zip that is no tensor and large, or BOMB.

    Of a zip the pickle beside its tensors is looked at; another file torch reads whole anyway.
    """
    with suppress(*NO_ZIP), _opened(path) as archive:
        for entry in archive.infolist():
            pickled = entry.filename.endswith("/data.pkl")
            if "/data/" not in entry.filename and entry.file_size > (JSON_BYTES if pickled else SMALL):
                return f"{entry.filename} of {entry.file_size} bytes"
            if pickled and BOMB in archive.read(entry):
                return "a bytearray"
        return None
    behind = b""
    with path.open("rb") as stream:
        while piece := stream.read(1 << 24):
            if BOMB in behind + piece:
                return "a bytearray"
            behind = piece[-len(BOMB) :]
    return None


def _is_plain_zip(path: Path) -> bool:
    """Whether tensors lie in a zip as they are in memory: neither packed nor with the other order of bytes."""
    try:
        with _opened(path) as archive:
            entries = archive.infolist()
            if any(entry.compress_type != ZIP_STORED for entry in entries):
                return False
            orders = {archive.read(entry) for entry in entries if entry.filename.endswith("/byteorder")}
            return orders <= {b"little"}
    except NO_ZIP:
        return False  # torch says what is wrong with it


class _Place(NamedTuple):
    """Where a tensor lies in a zip: first byte, bytes of a number, and steps between numbers along each axis."""

    start: int
    size: int
    steps: tuple[int, ...]


def _has_bytes(tensor: Any) -> bool:
    import torch

    return tensor.layout is torch.strided and not tensor.is_quantized


def _place_of(tensor: Any) -> _Place | None:
    if not _has_bytes(tensor):
        return None
    size = tensor.element_size()
    start = tensor.untyped_storage()._checkpoint_offset + tensor.storage_offset() * size
    return _Place(start, size, tuple(tensor.stride()))


def _loaded_bytes(tensor: Any) -> np.ndarray | None:
    import torch

    if not _has_bytes(tensor):
        return None
    ordered = tensor.detach().clone(memory_format=torch.contiguous_format)  # one number may have any step
    return ordered.reshape(-1).view(torch.uint8).numpy()
