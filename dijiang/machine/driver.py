"""The NVIDIA driver by ctypes: which GPU is there, its memory, streams and graphs.

TensorRT takes raw device addresses. The driver library is on every machine that can run an engine, so
no CUDA package is needed for them; and a missing driver is found here, before TensorRT crashes on it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import byref, c_char_p, c_int, c_size_t, c_uint, c_void_p
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import SessionError
from .limits import available_bytes
from .memory import LESS

LIBRARY = "libcuda.so.1"
#: CUresult of an allocation that does not fit.
OUT_OF_MEMORY = 2
#: CUdevice_attribute: compute capability; whether the GPU shares the memory of the host.
MAJOR, MINOR, INTEGRATED = 75, 76, 18
#: CU_STREAM_NON_BLOCKING; CU_STREAM_CAPTURE_MODE_THREAD_LOCAL.
NON_BLOCKING, THREAD_LOCAL = 1, 1
#: The stream of calls that name none.
LEGACY = 0


@dataclass(frozen=True)
class Gpu:
    """One GPU. memory, free: bytes; driver: the CUDA version it supports, as in "13.0".

    A Jetson's free memory includes what the system would drop for it: the driver counts file pages as
    taken.
    """

    index: int
    name: str
    sm: str
    memory: int
    free: int
    driver: str

    def __str__(self) -> str:
        return f"{self.name} ({self.sm})"


def load_library() -> Any:
    """libcuda; SessionError where there is none."""
    try:
        return ctypes.CDLL(LIBRARY)
    except OSError:
        raise SessionError(
            f"no NVIDIA driver: {LIBRARY} was not found; install the driver, or stay on the CPU"
        ) from None


class Cuda:
    """One GPU's primary context, a stream on it, and checked calls.

    Raises:
        SessionError: no driver, no such GPU, or (any method) a call that the driver refused.
    """

    def __init__(self, device: int = 0) -> None:
        self._library = load_library()
        self._call("cuInit", c_uint(0))
        count = c_int()
        self._call("cuDeviceGetCount", byref(count))
        if not 0 <= device < count.value:
            raise SessionError(
                f"GPU {device} does not exist, expected one of {count.value}; "
                "check nvidia-smi and CUDA_VISIBLE_DEVICES"
            )
        handle, context = c_int(), c_void_p()
        self._call("cuDeviceGet", byref(handle), c_int(device))
        self._device, self._index = handle, device
        self._call("cuDevicePrimaryCtxRetain", byref(context), handle)
        self._context = context
        self.activate()

    def _call(self, name: str, *arguments: Any) -> None:
        """Python's integers are addresses, handles and counts of bytes: all are as wide as a pointer."""
        code = getattr(self._library, name)(*(c_size_t(a) if type(a) is int else a for a in arguments))
        if code == 0:
            return
        text = c_char_p()
        self._library.cuGetErrorString(c_int(code), byref(text))
        reason = (text.value or b"unknown error").decode()
        advice = (
            LESS if code == OUT_OF_MEMORY else "check nvidia-smi, and the driver against the CUDA version in use"
        )
        raise SessionError(f"{name}: CUDA error {code} ({reason}); {advice}")

    def activate(self) -> None:
        """Make the context current in this thread."""
        self._call("cuCtxSetCurrent", self._context)

    @property
    def gpu(self) -> Gpu:
        """Name, compute capability and memory, as they are now."""
        name = ctypes.create_string_buffer(256)
        self._call("cuDeviceGetName", name, c_int(len(name)), self._device)
        free, total = c_size_t(), c_size_t()
        self._call("cuMemGetInfo_v2", byref(free), byref(total))
        unused = free.value
        if self._integer("cuDeviceGetAttribute", c_int(INTEGRATED), self._device):
            unused = max(unused, available_bytes())
        version = self._integer("cuDriverGetVersion")
        sm = "".join(
            str(self._integer("cuDeviceGetAttribute", c_int(which), self._device)) for which in (MAJOR, MINOR)
        )
        driver = f"{version // 1000}.{version % 1000 // 10}"
        return Gpu(self._index, name.value.decode(), f"sm{sm}", total.value, unused, driver)

    def _integer(self, call: str, *arguments: Any) -> int:
        value = c_int()
        self._call(call, byref(value), *arguments)
        return value.value

    def allocate(self, nbytes: int) -> int:
        """Address of zeroed device memory; freed by `free`."""
        self.activate()
        address = c_void_p()
        self._call("cuMemAlloc_v2", byref(address), nbytes)
        self._call("cuMemsetD8_v2", address, c_uint(0), nbytes)
        self.synchronize(LEGACY)  # on which that is put; our streams do not wait for it
        return int(address.value or 0)

    def free(self, address: int) -> None:
        """Give memory back; any thread may."""
        self.activate()
        self._call("cuMemFree_v2", address)

    def stream(self) -> int:
        """A new stream."""
        stream = c_void_p()
        self._call("cuStreamCreate", byref(stream), c_uint(NON_BLOCKING))
        return int(stream.value or 0)

    def upload(self, address: int, array: np.ndarray, stream: int) -> None:
        """Copy an array to the device, in the order of the stream."""
        assert array.flags.c_contiguous
        self._call("cuMemcpyHtoDAsync_v2", address, array.ctypes.data, array.nbytes, stream)

    def download(self, array: np.ndarray, address: int, stream: int) -> None:
        """Copy from the device into an array and wait for it; any thread may."""
        assert array.flags.c_contiguous
        self.activate()
        self._call("cuMemcpyDtoHAsync_v2", array.ctypes.data, address, array.nbytes, stream)
        self.synchronize(stream)

    def copy(self, target: int, source: int, nbytes: int, stream: int) -> None:
        """Copy within the device, in the order of the stream."""
        self._call("cuMemcpyDtoDAsync_v2", target, source, nbytes, stream)

    def synchronize(self, stream: int) -> None:
        """Wait for all work of a stream."""
        self._call("cuStreamSynchronize", stream)

    @contextmanager
    def capture(self, stream: int) -> Iterator[list[int]]:
        """Record what the block puts on the stream; the list then holds one launchable graph."""
        graphs: list[int] = []
        graph, ready = c_void_p(), c_void_p()
        self._call("cuStreamBeginCapture_v2", stream, c_int(THREAD_LOCAL))
        try:
            yield graphs
        finally:
            self._call("cuStreamEndCapture", stream, byref(graph))
        self._call("cuGraphInstantiateWithFlags", byref(ready), graph, 0)
        self._call("cuGraphDestroy", graph)
        graphs.append(int(ready.value or 0))

    def launch(self, graph: int, stream: int) -> None:
        """Put a captured graph on a stream."""
        self._call("cuGraphLaunch", graph, stream)

    def destroy(self, graph: int) -> None:
        """Give a captured graph back."""
        self._call("cuGraphExecDestroy", graph)
