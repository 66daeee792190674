"""Any GPU, through ONNX Runtime's WebGPU plug-in: Vulkan, Metal or Direct3D 12."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from ...bundle.opened import Bundle
from ...environment import SOFTWARE_GPU
from ...errors import SessionError
from ...machine.limits import available_bytes
from .device import FATAL, Device
from .inference import first_line, import_onnxruntime, is_onnxruntimes
from .preflight import check_single_onnxruntime

PACKAGE, MODULE = "onnxruntime-ep-webgpu", "onnxruntime_ep_webgpu"
#: The oldest plug-in, and the oldest onnxruntime beside it.
OLDEST, OLDEST_ONNXRUNTIME = (0, 4), (1, 30)


@dataclass(frozen=True)
class WebGpu(Device):
    """See `Device`."""

    def require(self, index: int) -> Any:
        ort = import_onnxruntime()
        ort.set_default_logger_severity(FATAL)  # what it says is in the errors that it raises
        adapter(self.name)
        return ort

    def free(self, index: int) -> int | None:
        """See `Device.free`. WebGPU does not say it; what runs in software has the host's."""
        return available_bytes() if is_software(adapter(self.name)) else None

    def title(self, index: int) -> str:
        return f"{self.name} (in software)" if is_software(adapter(self.name)) else self.name

    def place(self, index: int) -> dict[str, Any]:
        return {"devices": [adapter(self.name)], "settings": {}}


#: Its int64 arithmetic has 32 bits.
WEBGPU = WebGpu(
    "WebGpuExecutionProvider",
    "pip install 'dijiang[webgpu]' (Python 3.11 or newer)",
    "webgpu",
    memory="webgpu",
    captures="enableGraphCapture",
    pieces=False,
    whole=True,
    end=1 << 31,
    silent=True,
    options=(("enableInt64", "1"),),
)


def adapter(name: str = WEBGPU.name) -> Any:
    """ONNX Runtime's device for WebGPU, a GPU before what runs in software; SessionError without one."""
    check_single_onnxruntime()
    ort = _registered()
    found = [device for device in ort.get_ep_devices() if device.ep_name == name]
    if not found:
        raise SessionError(
            f"{name} finds no GPU here; install its Vulkan driver. A driver in software, or a GPU that "
            f"onnxruntime does not see, is used with {SOFTWARE_GPU}=1 in the environment"
        )
    return sorted(found, key=is_software)[0]


def has_gpu(bundle: Bundle, name: str) -> bool:
    """Whether a graph of the bundle runs on it, and the machine has a GPU that is none of software."""
    graphs = bundle.manifest.graphs.values()
    try:
        runs = installed(PACKAGE) is not None and any(name in record.providers for record in graphs)
        return runs and not is_software(adapter())
    except SessionError:
        return False


def is_software(device: Any) -> bool:
    """Whether a device is not a GPU of its own."""
    return bool(device.device.type != import_onnxruntime().OrtHardwareDeviceType.GPU)


@cache
def _registered() -> Any:
    """onnxruntime, with the plug-in registered in it."""
    ort = import_onnxruntime()
    found = installed(PACKAGE)
    if found is None:
        raise SessionError(f"{PACKAGE} is not installed; {WEBGPU.install}")
    for package, here, oldest in (
        (PACKAGE, found, OLDEST),
        ("onnxruntime", _numbers(ort.__version__), OLDEST_ONNXRUNTIME),
    ):
        if here < oldest:
            needed, old = (".".join(map(str, one)) for one in (oldest, here))
            raise SessionError(f"{package} is {old}, WebGPU needs {needed} or newer; pip install -U {package}")
    try:
        ort.register_execution_provider_library("webgpu", import_module(MODULE).get_library_path())
    except Exception as error:
        if not is_onnxruntimes(error) and not isinstance(error, (ImportError, OSError)):
            raise
        raise SessionError(
            f"{PACKAGE} {'.'.join(map(str, found))} does not start beside onnxruntime {ort.__version__} "
            f"({first_line(error)[:200]}); pip install -U onnxruntime {PACKAGE}"
        ) from error
    return ort


def installed(package: str) -> tuple[int, int] | None:
    """Version of an installed package; None: it is not."""
    with suppress(PackageNotFoundError):
        return _numbers(version(package))
    return None


def _numbers(text: str) -> tuple[int, int]:
    major, minor = text.split(".")[:2]
    return int(major), int(minor)
