"""Execution providers of ONNX Runtime with memory of their own, and tensors there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import SessionError
from ...machine.driver import Cuda
from ...machine.memory import LESS
from .inference import import_onnxruntime, open_inference
from .preflight import check_single_onnxruntime, explain, require_gpu

#: Of onnxruntime's log.
FATAL = 4


@dataclass(frozen=True)
class Device:
    """An execution provider of ONNX Runtime that keeps tensors in memory of its own.

    name: ONNX Runtime's.  install: how to get it.  library: its file, as in
    libonnxruntime_providers_NAME.so.  memory: where it keeps tensors, in ONNX Runtime's words; None: where
    the host does.  captures: its option that turns graphs of calls on; empty: it has none.
    pieces: whole pieces of a prompt are captured, too.  whole: it runs every node, so that one left to the
    CPU is an error.  end: the first position that its arithmetic does not reach.  silent: an allocation
    that fails raises nothing, so that memory has to be tried.
    options: of the execution provider.
    """

    name: str
    install: str
    library: str
    memory: str | None = "cuda"
    captures: str = ""
    pieces: bool = True
    whole: bool = False
    end: int | None = None
    silent: bool = False
    options: tuple[tuple[str, str], ...] = ()

    @property
    def has_memory(self) -> bool:
        """Whether its tensors are elsewhere than the host's."""
        return self.memory is not None

    def require(self, index: int) -> Any:
        """onnxruntime, if it has this provider and the machine the device; else SessionError."""
        check_single_onnxruntime()
        ort = import_onnxruntime()
        if self.name not in ort.get_available_providers():
            raise SessionError(
                f"execution provider {self.name} is not available: onnxruntime {ort.__version__} has "
                f"{', '.join(ort.get_available_providers())}; {self.install}"
            )
        if self.has_memory:
            require_gpu(ort, index, self.library)
            ort.set_default_logger_severity(FATAL)  # what it says is in the errors that it raises
        return ort

    def free(self, index: int) -> int | None:
        """Bytes of the device's memory that are free; None: nobody knows, or it is the host's."""
        return Cuda(index).gpu.free if self.has_memory else None

    def title(self, index: int) -> str:
        """What is said to run a model."""
        return self.name

    def place(self, index: int) -> dict[str, Any]:
        """Arguments of `open_inference` that choose the device."""
        return {"provider": self.name, "settings": {"device_id": str(index)} if self.has_memory else {}}

    def open(
        self, file: Path, index: int, *, graphs: bool = False, whole: bool = True, operators: bool = False
    ) -> Any:
        """An onnxruntime session of a graph on this device and on nothing else; SessionError.

        graphs: calls may be captured.  whole: a node that is left to the CPU is an error.
        operators: register those of ours.
        """
        place = self.place(index)
        captures = {self.captures: str(int(graphs))} if self.captures else {}
        place["settings"] = place["settings"] | captures | dict(self.options)
        entries = {"session.disable_cpu_ep_fallback": "1"} if whole and self.whole else {}
        try:
            session = open_inference(file, operators=operators, entries=entries, severity=FATAL, **place)
        except Exception as error:
            raise explain(error, f"{file}: {self.name} cannot load it") from error
        used = session.get_providers()[0]
        if used != self.name:
            raise SessionError(f"asked for {self.name}, onnxruntime used {used}; {self.install}")
        return session


GPU = "pip install 'dijiang[gpu]' in an environment without onnxruntime"
#: ONNX Runtime's word for the memory of the host.
HOST = "cpu"
#: TF32 rounds float32 matmuls to 10 bits: never behind the graph's back.
CUDA = Device(
    "CUDAExecutionProvider", GPU, "cuda", captures="enable_cuda_graph", whole=True, options=(("use_tf32", "0"),)
)
ORT_TENSORRT = Device(
    "TensorrtExecutionProvider",
    f"{GPU}, and TensorRT's own libraries",
    "tensorrt",
    options=(("trt_engine_cache_enable", "1"), ("trt_timing_cache_enable", "1")),
)
ORT_TENSORRT_RTX = Device(
    "NvTensorRTRTXExecutionProvider", "install an onnxruntime that was built with TensorRT-RTX", "nv_tensorrt_rtx"
)


class Tensor:
    """An OrtValue in a device's memory.

    known: what the host knows to be in it; None: nothing.
    """

    def __init__(self, ort: Any, row: Device, index: int, shape: tuple[int, ...], dtype: Any) -> None:
        self.known: np.ndarray | None = None
        place = (row.memory, index) if row.has_memory else (HOST, 0)
        try:
            self.value = ort.OrtValue.ortvalue_from_shape_and_type(list(shape), dtype, *place)
        except Exception as error:
            raise explain(error, f"{row.name} has no memory for a tensor of {list(shape)}") from error

    def write(self, array: np.ndarray) -> None:
        self.value.update_inplace(array)

    def update(self, array: np.ndarray) -> None:
        """Write what it does not hold yet: the device's own choice of a token need not come back."""
        if self.known is None or not np.array_equal(self.known, array):
            self.known = None  # an interrupt in between leaves nobody wrong
            self.write(array)
            self.known = array.copy()

    def read(self, array: np.ndarray) -> None:
        array[...] = self.numpy()

    def prove(self) -> None:
        """SessionError unless it holds what is written."""
        ones = np.ones(self.value.shape(), np.float32)
        self.write(ones)
        if not np.array_equal(self.numpy(), ones):
            raise SessionError(f"the device has no memory for {ones.nbytes:,} bytes more; {LESS}")

    def numpy(self) -> np.ndarray:
        """A copy on the host."""
        try:
            data: np.ndarray = self.value.numpy()
        except Exception as error:
            raise explain(error, "the device does not give its numbers back") from error
        return data
