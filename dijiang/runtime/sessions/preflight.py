"""What is asked before ONNX Runtime opens a GPU: with something missing it would go on on the CPU."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import redirect_stdout
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

from ...errors import SessionError
from ...machine.driver import Cuda
from ...machine.memory import LESS
from .inference import PACKAGES

#: What onnxruntime says -> what to do about it.
ADVICE = (
    ("out of memory", LESS),
    ("Failed to allocate", LESS),
    ("No supported adapters", "install the GPU's Vulkan driver (vulkaninfo shows it)"),
    ("device is lost", "the GPU's driver gave up (its log says why): load the bundle again"),
    ("device lost", "the GPU's driver gave up (its log says why): load the bundle again"),
    ("driver version is insufficient", "install a newer NVIDIA driver (nvidia-smi shows this one)"),
    ("no CUDA-capable device", "check nvidia-smi and CUDA_VISIBLE_DEVICES"),
    ("libcuda.so", "install the NVIDIA driver (nvidia-smi shows it)"),
    ("no kernel image", "install an onnxruntime-gpu that was built for this GPU"),
    ("invalid device ordinal", "choose one of the GPUs that nvidia-smi lists"),
    ("libnvinfer", "install TensorRT's libraries: pip install 'dijiang[tensorrt]'"),
    ("libnvonnxparser", "install TensorRT's libraries: pip install 'dijiang[tensorrt]'"),
    ("default CPU EP", "install CUDA and cuDNN: pip install 'onnxruntime-gpu[cuda,cudnn]'"),
    ("cannot open shared object", "install CUDA and cuDNN: pip install 'onnxruntime-gpu[cuda,cudnn]'"),
    ("require cuDNN", "install CUDA and cuDNN: pip install 'onnxruntime-gpu[cuda,cudnn]'"),
)


#: Before this a plug-in's error says where in onnxruntime it was passed on.
PASSED_ON = " was false. "


def clashing_packages(find: Callable[[str], Distribution] = distribution) -> list[str]:
    """Names and versions of onnxruntime and onnxruntime-gpu if they overwrote each other.

    In folders of their own they do not: Python takes the first on its path.
    """
    places: dict[str, list[str]] = {}
    for package in PACKAGES:
        try:
            found = find(package)
        except PackageNotFoundError:
            continue
        places.setdefault(str(found.locate_file("onnxruntime")), []).append(f"{package} {found.version}")
    return next((here for here in places.values() if len(here) > 1), [])


def check_single_onnxruntime(find: Callable[[str], Distribution] = distribution) -> None:
    """SessionError if onnxruntime and onnxruntime-gpu overwrote each other."""
    if clash := clashing_packages(find):
        raise SessionError(
            f"{' and '.join(clash)} are both installed and overwrite each other; "
            "pip uninstall -y onnxruntime onnxruntime-gpu, then pip install 'dijiang[gpu]'"
        )


def nvidia_libraries() -> list[Path]:
    """Folders of libraries in NVIDIA's Python packages, wherever these are installed."""
    spec = find_spec("nvidia")
    places = [] if spec is None else spec.submodule_search_locations or ()
    return [folder for place in places for folder in sorted(Path(place).glob("*/lib"))]


def preload_libraries(ort: Any) -> None:
    """Load CUDA and cuDNN from NVIDIA's Python packages, beside onnxruntime or elsewhere.

    onnxruntime looks beside itself, and prints what it misses. Nothing is said here: opening a session
    tells what is missing.
    """
    if not hasattr(ort, "preload_dlls"):
        return
    beside = Path(ort.__file__).parents[1] / "nvidia"
    elsewhere = [folder for folder in nvidia_libraries() if folder.parents[1] != beside]
    with redirect_stdout(StringIO()):
        ort.preload_dlls()
        for folder in elsewhere:
            ort.preload_dlls(directory=str(folder))


def load_provider_library(ort: Any, name: str) -> None:
    """Load the library of an execution provider, so that OSError names the one that is missing.

    onnxruntime writes that to stderr and goes on to the CPU. A provider that is built in, or called
    otherwise on this system, is left to it.
    """
    folder = Path(ort.__file__).parent / "capi"
    library = folder / f"libonnxruntime_providers_{name}.so"
    if library.is_file():
        ctypes.CDLL(str(folder / "libonnxruntime_providers_shared.so"), mode=ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(library))


def check_driver(ort: Any, driver: str) -> None:
    """SessionError if the driver is older than the CUDA that onnxruntime was built with.

    driver: the CUDA version it supports, as in "12.6"; a newer one of the same major version is no harm.
    """
    built = str(getattr(ort, "cuda_version", "") or "")
    if built and int(built.split(".")[0]) > int(driver.split(".")[0]):
        raise SessionError(
            f"the NVIDIA driver supports CUDA {driver}, onnxruntime {ort.__version__} was built with "
            f"CUDA {built}; install a newer NVIDIA driver (nvidia-smi shows this one), or an "
            f"onnxruntime-gpu for CUDA {driver.split('.')[0]}"
        )


def said(error: Exception) -> str:
    """What an error of onnxruntime says, in one line; of a plug-in's, what it says itself."""
    text = " ".join(str(error).split())
    return text.rpartition(PASSED_ON)[2][:200]


def explain(error: Exception, what: str) -> SessionError:
    """One line for an error of onnxruntime, whose errors share no base class."""
    text = " ".join(str(error).split())
    advice = next(
        (known for part, known in ADVICE if part.lower() in text.lower()),
        "see dijiang doctor, or use --provider cpu",
    )
    return SessionError(f"{what} ({said(error)}); {advice}")


def require_gpu(ort: Any, index: int, library: str) -> None:
    """Driver, GPU and libraries, or one SessionError.

    Args:
        index: of the GPU.
        library: of the execution provider; see `load_provider_library`.
    """
    gpu = Cuda(index).gpu
    check_driver(ort, gpu.driver)
    preload_libraries(ort)
    try:
        load_provider_library(ort, library)
    except OSError as error:
        raise explain(error, f"onnxruntime {ort.__version__} cannot load its {library} provider") from error
