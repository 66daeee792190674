"""Our own operator for ONNX Runtime on the CPU, in C++: the step of one layer as one node.

It is compiled when dijiang is installed, if there is a C++ compiler; everything else works without it.
"""

from __future__ import annotations

from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

from ...errors import SessionError

#: What `setup.py` compiles.
STEM = "_step"


def find_library() -> Path | None:
    """The compiled operator; None where the installation has none."""
    candidates = (Path(__file__).with_name(STEM + suffix) for suffix in EXTENSION_SUFFIXES)
    return next((path for path in candidates if path.is_file()), None)


def operator_library() -> Path:
    """The compiled operator; SessionError where the installation has none."""
    found = find_library()
    if found is None:
        raise SessionError(
            "the operator of the native dialect was not compiled when dijiang was installed; install a "
            "C++ compiler (g++ or clang++) and dijiang again, or export with --dialect ort"
        )
    return found
