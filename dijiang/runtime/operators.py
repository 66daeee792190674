"""Our own operator for ONNX Runtime on the CPU, in C++ (`native/`): the step of one layer as one node.

The library is compiled when dijiang is installed, if there is a C++ compiler; everything else works
without it. It has no Python in it: ONNX Runtime loads it, and what it knows is asked here by ctypes.
"""

from __future__ import annotations

import ctypes
import sys
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import SessionError

if TYPE_CHECKING:
    import numpy as np  # asking for the library needs none

#: What `native/CMakeLists.txt` installs beside this file, or where an editable installation keeps it.
FILE = "_native.dll" if sys.platform == "win32" else "_native.so"
#: Largest head size and numbers in graphs, for an export where no library is to be asked. Tests compare
#: both with the library.
LONGEST_HEAD = 512
ACTIVATION_NUMBERS = {"relu": 1, "silu": 2, "gelu": 3, "gelu_tanh": 4}


def find_library() -> Path | None:
    """The compiled operator; None where the installation has none."""
    spec = find_spec(__package__)
    folders = spec.submodule_search_locations if spec is not None else None
    return next((path for path in (Path(f, FILE) for f in folders or ()) if path.is_file()), None)


def installed_library() -> Path:
    """The compiled operator; SessionError where the installation has none, or the processor cannot load it."""
    found = find_library()
    if found is None:
        raise SessionError(
            "the library of the native and cuda graphs was not compiled when dijiang was installed; install a C++ "
            "compiler (g++ or clang++) and dijiang again, or choose --graph ort"
        )
    open_library(found)
    return found


def operator_library() -> Path:
    """The compiled operator, ready to run here.

    SessionError as `installed_library`, and where `DIJIANG_ISA` asks for an instruction set that cannot be had.
    """
    found = installed_library()
    error = open_library(found).dijiang_isa_error()
    if error is not None:
        raise SessionError(f"the operator of the native graph: {error.decode(errors='replace')}")
    return found


@lru_cache
def open_library(path: Path) -> ctypes.CDLL:
    """The library with its interface (`native/interface.cc`) typed; SessionError if it is another."""
    floats = ctypes.POINTER(ctypes.c_float)
    text, number, status = ctypes.c_char_p, ctypes.c_int64, ctypes.c_int
    try:
        library = ctypes.CDLL(str(path))
        for name, result, arguments in (
            ("isa", text, []),
            ("isa_error", text, []),
            ("isa_names", text, []),
            ("longest_head", number, []),
            ("activation_names", text, []),
            ("activation_number", number, [text]),
            ("activation", status, [number, floats, floats, number]),
            ("cuda_load", status, [text]),
            ("multiply_add", status, [floats, floats, floats, floats, number]),
            ("gptq", status, [floats, floats, floats, ctypes.POINTER(ctypes.c_uint8), floats, *5 * [number]]),
        ):
            function = getattr(library, f"dijiang_{name}")
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise SessionError(
            f"{path}: not the library of this dijiang ({error}); install dijiang again, or export with --graph ort"
        ) from error
    return library


def isa() -> str:
    """The instruction set that the operator uses in this process: `avx512`, `avx2`, `neon` or `plain`.

    SessionError as `operator_library`.
    """
    return str(open_library(operator_library()).dijiang_isa().decode())


def isa_names() -> list[str]:
    """The instruction sets that this processor runs, best first; none without the library."""
    found = find_library()
    return open_library(found).dijiang_isa_names().decode().split() if found else []


def has_library() -> bool:
    """Whether the library is there and runs here; SessionError: `DIJIANG_ISA` asks for what cannot be had."""
    try:
        installed_library()
    except SessionError:
        return False
    operator_library()
    return True


def gptq(
    left: np.ndarray, upper: np.ndarray, importance: np.ndarray, bits: int, block: int, scale_type: int
) -> tuple[np.ndarray, np.ndarray]:
    """Round rows of a weight by what their inputs look like; see `graph.rounding.round_gptq`.

    Args:
        left: float32 [out, in] of whole blocks, row-major; overwritten with what `upper` carries on.
        upper: float32 [in, in], importance: float32 [in]; row-major.
        scale_type: number of a `graph.rounding.ScaleType`.

    Returns codes uint8 [out, blocks, block] and scales float32 [out, blocks].
    """
    import numpy as np

    floats, (outputs, inputs) = ctypes.POINTER(ctypes.c_float), left.shape
    codes = np.empty((outputs, inputs // block, block), np.uint8)
    scales = np.empty(codes.shape[:2], np.float32)
    assert all(a.flags.c_contiguous and a.dtype == np.float32 for a in (left, upper, importance))
    status = open_library(operator_library()).dijiang_gptq(
        *(a.ctypes.data_as(floats) for a in (left, upper, importance)),
        codes.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8)),
        scales.ctypes.data_as(floats),
        *(outputs, inputs, block, bits, scale_type),
    )
    if status:
        raise MemoryError("no memory to round a weight")
    return codes, scales


def longest_head() -> int:
    """The largest head size that the operator has room for, by the library where there is one."""
    found = find_library()
    return int(open_library(found).dijiang_longest_head()) if found else LONGEST_HEAD


def activation_number(name: str) -> int:
    """What a graph stores for an activation, by the library where there is one; KeyError if unknown."""
    found = find_library()
    if found is None:
        return ACTIVATION_NUMBERS[name]
    number = int(open_library(found).dijiang_activation_number(name.encode()))
    if number < 0:
        raise KeyError(name)
    return number
