"""What a model needs in memory, said before it is loaded or built."""

from __future__ import annotations

import re

from ..errors import DijiangError, SessionError
from ..recipe import PRECISIONS
from .limits import available_bytes

#: What a process takes beside weights and states: onnxruntime, a piece's activations. FIRST_BYTES and a part of
#: the weights, SPARE_BYTES at most. In int8, from there on where it is checked, 24 MB at 4 MB of weights were
#: measured, 18 at 75 and 78 at 446.
FIRST_BYTES, PART, SPARE_BYTES = 32 << 20, 0.25, 200 << 20
#: Host memory of `dijiang build`: so many times the weights, and so much more. Peaks of TensorRT-RTX
#: 1.7: 0.71 GB at 0.10 GB of weights, 1.51 at 0.34, 2.19 at 0.50, 3.30 at 0.86, for one GPU or five.
#: TensorRT is taken to need as much.
BUILD_FACTOR, BUILD_BYTES = 3.75, 400 << 20
#: How libraries say that the system gave no memory, and what to do.
NO_MEMORY = re.compile("bad_alloc|failed to map segment|cannot allocate memory|failed to allocate", re.IGNORECASE)
MORE = "close something, raise ulimit -v or the container's limit, or use a smaller model or precision"
#: What to do where a GPU's memory does not suffice.
LESS = "use a smaller model, precision or batch, or end what else is on the GPU"


def run_bytes(weights: int, states: int) -> int:
    """Memory of a loaded model with the states of its sequences."""
    return weights + states + min(SPARE_BYTES, FIRST_BYTES + int(PART * weights))


def build_bytes(weights: int) -> int:
    """Host memory of an engine's build."""
    return round(BUILD_FACTOR * weights) + BUILD_BYTES


def is_no_memory(error: BaseException) -> bool:
    """Whether an error says that the system gave no memory."""
    return isinstance(error, MemoryError) or bool(NO_MEMORY.search(str(error)))


def require_memory(what: str, need: int, advice: str, error: type[DijiangError] = SessionError) -> None:
    """Raise `error` if the machine has less than `need` bytes of memory left."""
    free = available_bytes()
    if need > free:
        raise error(f"{what} needs {need / 1e9:.2f} GB of memory, {free / 1e9:.2f} GB are free; {advice}")


def require_gpu_memory(what: str, need: int, free: int) -> None:
    """SessionError if a GPU has less than `need` bytes of memory left."""
    if need > free:
        raise SessionError(f"{what}: needs {need / 1e9:.2f} GB of GPU memory, {free / 1e9:.2f} GB are free; {LESS}")


def parameters_that_fit(free: int, *, build: bool = False) -> dict[str, int]:
    """Precision -> parameters of a model that runs, or whose engine can be built, in `free` bytes.

    The state is not counted: it is 1 to 70 MB for the published shapes.
    """
    runs = max(free - SPARE_BYTES, (free - FIRST_BYTES) / (1 + PART))
    weights = (free - BUILD_BYTES) / BUILD_FACTOR if build else runs
    return {name: max(0, int(weights / row.weight_bytes)) for name, row in PRECISIONS.items()}
