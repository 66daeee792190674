"""Which onnxruntime packages are installed, and the CUDA libraries that Python packages brought."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import redirect_stdout
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

from ..errors import SessionError

#: Packages whose module is `onnxruntime`.
PACKAGES = ("onnxruntime", "onnxruntime-gpu")


def check_single_onnxruntime(find: Callable[[str], Distribution] = distribution) -> None:
    """SessionError if onnxruntime and onnxruntime-gpu overwrote each other.

    In folders of their own they do not: Python takes the first on its path.
    """
    places: dict[str, list[str]] = {}
    for package in PACKAGES:
        try:
            found = find(package)
        except PackageNotFoundError:
            continue
        places.setdefault(str(found.locate_file("onnxruntime")), []).append(f"{package} {found.version}")
    for here in places.values():
        if len(here) > 1:
            raise SessionError(
                f"{' and '.join(here)} are both installed and overwrite each other; "
                "pip uninstall -y onnxruntime onnxruntime-gpu, then pip install 'dijiang[gpu]'"
            )


def preload_libraries(ort: Any) -> None:
    """Load CUDA and cuDNN from NVIDIA's Python packages, beside onnxruntime or elsewhere.

    onnxruntime looks beside itself, and prints what it misses. Nothing is said here: opening a session
    tells what is missing.
    """
    if not hasattr(ort, "preload_dlls"):
        return
    spec = find_spec("nvidia")
    places = [] if spec is None else [Path(p) for p in spec.submodule_search_locations or ()]
    beside = Path(ort.__file__).parents[1]
    elsewhere = [f for p in places if p.parent != beside for f in sorted(p.glob("*/lib"))]
    with redirect_stdout(StringIO()):
        ort.preload_dlls()
        for folder in elsewhere:
            ort.preload_dlls(directory=str(folder))
