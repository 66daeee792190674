"""The kernels of the cuda graph: compiled for a GPU by NVRTC, and handed to the operators' library."""

from __future__ import annotations

import ctypes
from ctypes import byref, c_char_p, c_int, c_size_t, c_void_p
from functools import lru_cache
from pathlib import Path

from ...errors import SessionError
from ...machine.driver import Cuda
from ..operators import open_library, operator_library
from .preflight import nvidia_libraries

#: NVIDIA's compiler, by the CUDA version that onnxruntime-gpu is built for.
NVRTC = ("libnvrtc.so.13", "libnvrtc.so.12")
#: What `native/CMakeLists.txt` installs beside the library.
SOURCE = "kernels.cu"
#: The GPUs' generation whose machine code the library has: it has room for one.
LOADED: list[str] = []
INSTALL = "pip install 'onnxruntime-gpu[cuda,cudnn]', or use --graph ort"


def why_no_kernels() -> str:
    """What is missing to compile them, and what to do; empty: nothing."""
    try:
        _compiler()
    except SessionError as error:
        return str(error)
    return "" if _source().is_file() else f"{_source()} is missing; install dijiang again, or use --graph ort"


@lru_cache
def load_kernels(index: int) -> None:
    """Compile the kernels for the GPU `index` and load them, once; SessionError."""
    sm = Cuda(index).gpu.sm
    if LOADED and sm not in LOADED:
        raise SessionError(
            f"GPU {index} is {sm}, and this process has the kernels of the cuda graph for {LOADED[0]}; "
            "use a process for each, or --graph ort"
        )
    image = compile_kernels(_source().read_bytes(), sm)
    status = open_library(operator_library()).dijiang_cuda_load(image)
    if status:
        raise SessionError(
            f"the GPU's driver did not load the kernels of the cuda graph (CUresult {status}); install a newer "
            "NVIDIA driver, or use --graph ort"
        )
    LOADED[:] = [sm]


def compile_kernels(source: bytes, sm: str) -> bytes:
    """Machine code of a GPU's generation, as in "sm90"; SessionError with what the compiler says."""
    compiler, program, size = _compiler(), c_void_p(), c_size_t()
    options = (c_char_p * 1)(f"--gpu-architecture=sm_{sm.removeprefix('sm')}".encode())
    compiler.nvrtcCreateProgram(byref(program), source, SOURCE.encode(), 0, None, None)
    try:
        status = compiler.nvrtcCompileProgram(program, len(options), options)
        get = ("ProgramLog", "ProgramLogSize") if status else ("CUBIN", "CUBINSize")
        getattr(compiler, f"nvrtcGet{get[1]}")(program, byref(size))
        found = ctypes.create_string_buffer(size.value)
        getattr(compiler, f"nvrtcGet{get[0]}")(program, found)
    finally:
        compiler.nvrtcDestroyProgram(byref(program))
    if status:
        said = " ".join(found.value.decode(errors="replace").split())[:300] or f"status {status}"
        raise SessionError(f"NVRTC does not compile the kernels for {sm} ({said}); use --graph ort")
    return found.raw


@lru_cache
def _compiler() -> ctypes.CDLL:
    for name in _candidates():
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        for function in ("CreateProgram", "CompileProgram", "GetProgramLog", "GetCUBIN", "DestroyProgram"):
            getattr(library, f"nvrtc{function}").restype = c_int
        library.nvrtcCreateProgram.argtypes = [c_void_p, c_char_p, c_char_p, c_int, c_void_p, c_void_p]
        library.nvrtcCompileProgram.argtypes = [c_void_p, c_int, c_void_p]
        return library
    raise SessionError(f"NVIDIA's compiler for kernels, {NVRTC[0]}, is not installed; {INSTALL}")


def _candidates() -> list[str]:
    """Where it may be: what the system finds, then NVIDIA's Python packages."""
    return [*NVRTC, *(str(folder / name) for name in NVRTC for folder in nvidia_libraries())]


def _source() -> Path:
    return operator_library().with_name(SOURCE)
