"""Files of tensors as people have them: shapes without data, and one tensor at a time."""

from __future__ import annotations

import pickle
import warnings
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import numpy as np

from ..errors import CheckpointError
from .binding import Shape

#: NumPy names of what weights can be; others are refused when they are read as weights.
FLOATS = ("float32", "float16", "bfloat16", "float64")
#: What safetensors calls a type that NumPy has only through ml_dtypes.
BFLOAT16 = "BF16"


class TensorFile(ABC):
    """One file of tensors: shapes without data, and one tensor at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.shapes: dict[str, Shape] = {}

    @abstractmethod
    def read(self, name: str) -> np.ndarray:
        """A tensor in its stored dtype (float32, float16, ml_dtypes.bfloat16).

        Raises:
            CheckpointError: NumPy has no such dtype.
        """

    def unreadable(self, name: str, dtype: object) -> CheckpointError:
        """The error for a tensor of a dtype that is none of FLOATS."""
        return CheckpointError(
            f"{self.path.parent}: {name} has dtype {dtype}, expected float32, float16 or bfloat16; "
            "start from the unquantized checkpoint"
        )


def import_bfloat16(path: Path) -> np.dtype:
    """NumPy's bfloat16, which it has once ml_dtypes was imported; CheckpointError where that is missing."""
    try:
        import ml_dtypes
    except ImportError:
        raise CheckpointError(f"{path}: bfloat16 needs ml_dtypes; pip install 'dijiang[export]'") from None
    return np.dtype(ml_dtypes.bfloat16)


class SafetensorsFile(TensorFile):
    """A memory-mapped .safetensors file."""

    def __init__(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        super().__init__(path)
        self._refusals = (TypeError, AttributeError, SafetensorError)  # how a dtype is unknown
        try:
            self._file = safe_open(str(path), framework="np")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: not a whole safetensors file ({error}); download it again") from error
        names = self._file.keys()
        slices = {name: self._file.get_slice(name) for name in names}
        self.shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
        self._dtypes = {name: str(part.get_dtype()) for name, part in slices.items()}
        if BFLOAT16 in self._dtypes.values():
            import_bfloat16(path)  # NumPy knows the name from then on

    def read(self, name: str) -> np.ndarray:
        try:
            tensor: np.ndarray = self._file.get_tensor(name)
        except self._refusals as error:
            raise self.unreadable(name, self._dtypes[name]) from error
        return tensor


class TorchFile(TensorFile):
    """A pytorch_model.bin, read with `weights_only=True`: code inside a pickle never runs."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            import torch
        except ImportError:
            raise CheckpointError(
                f"{path}: a PyTorch file needs torch; pip install 'dijiang[torch]', "
                "or save the checkpoint as safetensors"
            ) from None
        try:
            with warnings.catch_warnings():  # of pickle protocols: what was read is judged below
                warnings.simplefilter("ignore")
                found = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"{path}: the pickle holds more than tensors, and code in it is never run; "
                "save the checkpoint as safetensors"
            ) from error
        except (RuntimeError, OSError, EOFError, ValueError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointError(f"{path}: not a whole PyTorch file ({reason}); download it again") from error
        self._tensors = self._state_dict(found)
        self.shapes = {n: tuple(t.shape) for n, t in self._tensors.items()}

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
            return next(iter(inside.values()))
        kinds = ", ".join(sorted(inside)) or type(found).__name__
        raise CheckpointError(f"{self.path}: not one dict of tensors ({kinds}); save model.state_dict()")

    def read(self, name: str) -> np.ndarray:
        import torch

        tensor = self._tensors[name].detach()
        if tensor.dtype == torch.bfloat16:
            bits: np.ndarray = tensor.contiguous().view(torch.uint16).numpy()
            return bits.view(import_bfloat16(self.path))
        try:
            array: np.ndarray = tensor.numpy()
        except (TypeError, RuntimeError) as error:  # float8, quantized, sparse
            kind = " ".join(str(k).removeprefix("torch.") for k in (tensor.dtype, tensor.layout))
            raise self.unreadable(name, kind.removesuffix(" strided")) from error
        return array
