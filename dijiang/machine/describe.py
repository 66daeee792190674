"""What this machine is: processor, memory, GPUs, Jetson board, clocks, temperatures, versions.

Everything is read from files and libraries; nothing is guessed: what cannot be read is None.
"""

from __future__ import annotations

import os
import platform
import re
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .kernel_files import text_of
from .limits import available_bytes, physical_cores, total_bytes, usable_cores
from .sensors import answered, handles, load_nvml

#: Feature -> its names in /proc/cpuinfo: what quantized matmuls and half precision use.
CPU_FEATURES = {
    "AVX2": "avx2",
    "AVX512": "avx512f",
    "AVX512-VNNI": "avx512_vnni",
    "AVX-VNNI": "avx_vnni",
    "AVX512-BF16": "avx512_bf16",
    "AVX512-FP16": "avx512_fp16",
    "AMX-INT8": "amx_int8",
    "NEON": "asimd",
    "NEON dotprod": "asimddp",
    "I8MM": "i8mm",
    "FP16 (ARM)": "fphp",
    "SVE": "sve",
    "SVE2": "sve2",
}
PACKAGES = (
    *("dijiang", "numpy", "onnxruntime", "onnxruntime-gpu", "onnxruntime-ep-webgpu"),
    *("tensorrt", "tensorrt-rtx", "onnx", "onnx-ir", "torch", "tokenizers", "nvidia-ml-py", "matplotlib"),
)
#: Start of the L4T release -> JetPack. Source: NVIDIA's Jetson Linux archive.
JETPACKS = {"39.2": "7.2", "38.": "7.0 or 7.1", "36.4": "6.1 or 6.2", "36.3": "6.0", "35.": "5"}


def describe_machine(root: Path = Path("/"), nvml: Any = None) -> dict[str, Any]:
    """Facts for the header of a report and for `dijiang doctor`; JSON-ready.

    Args:
        root: of the file system, for recorded layouts.
        nvml: a module like pynvml; None: the installed one, if there is one.
    """
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": installed(PACKAGES),
        "cpu": describe_cpu(root),
        "memory": {"total_bytes": total_bytes(), "available_bytes": available_bytes(root)},
        "gpus": describe_gpus(load_nvml() if nvml is None else nvml),
        "cuda": _found(r'"cuda"[^}]*"version"\s*:\s*"([\d.]+)"', text_of(root / "usr/local/cuda/version.json")),
        "jetson": describe_jetson(root),
        "temperatures": _temperatures(root),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def installed(packages: tuple[str, ...]) -> dict[str, str]:
    """Versions of those packages that are installed."""
    found = {}
    for package in packages:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def describe_cpu(root: Path) -> dict[str, Any]:
    """Model, cores, features, clock and governor."""
    info, policy = text_of(root / "proc/cpuinfo"), root / "sys/devices/system/cpu/cpu0/cpufreq"
    words = set((_found(r"^(?:flags|Features)\s*:\s*(.+)$", info) or "").split())
    clocks = [float(mhz) for mhz in re.findall(r"^cpu MHz\s*:\s*([\d.]+)$", info, re.MULTILINE)]
    kilohertz = _number(policy / "scaling_cur_freq")
    return {
        "model": _found(r"^(?:model name|Model|Hardware)\s*:\s*(.+)$", info)
        or platform.processor()
        or platform.machine()
        or None,
        "physical_cores": physical_cores(),
        "logical_cores": os.cpu_count(),
        "usable_cores": usable_cores(root),
        "features": [name for name, word in CPU_FEATURES.items() if word in words],
        "mhz": max(clocks, default=kilohertz and kilohertz / 1e3),
        "governor": text_of(policy / "scaling_governor") or None,
    }


def describe_gpus(nvml: Any) -> list[dict[str, Any]]:
    """Name, driver and memory of every NVIDIA GPU that NVML shows, and that answers."""
    found = [answered(_describe_gpu, nvml, handle) for handle in handles(nvml).values()]
    return [gpu for gpu in found if gpu is not None]


def _describe_gpu(nvml: Any, handle: Any) -> dict[str, Any]:
    cuda = int(nvml.nvmlSystemGetCudaDriverVersion())
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    memory = answered(nvml.nvmlDeviceGetMemoryInfo, handle)
    return {
        "name": str(nvml.nvmlDeviceGetName(handle)),
        "driver": str(nvml.nvmlSystemGetDriverVersion()),
        "cuda_driver": f"{cuda // 1000}.{cuda % 1000 // 10}",
        "compute_capability": f"{major}.{minor}",
        "total_bytes": memory and int(memory.total),
        "used_bytes": memory and int(memory.used),
    }


def describe_jetson(root: Path) -> dict[str, Any] | None:
    """Board, L4T, JetPack and power mode as nvpmodel has set it; None where this is no Jetson."""
    model = text_of(root / "proc/device-tree/model").strip("\0")
    found = re.search(r"R(\d+) \(release\), REVISION: ([\d.]+)", text_of(root / "etc/nv_tegra_release"))
    if found is None and "Jetson" not in model:
        return None
    l4t = ".".join(found.groups()) if found else ""
    mode = _found(r"pmode:0*(\d+)", text_of(root / "var/lib/nvpmodel/status"))
    name = _found(rf"POWER_MODEL\s+ID={mode}\s+NAME=(\S+)", text_of(root / "etc/nvpmodel.conf"))
    return {
        "model": model or None,
        "l4t": l4t or None,
        "jetpack": next((name for start, name in JETPACKS.items() if l4t.startswith(start)), None),
        "power_mode": name or mode,
    }


def _temperatures(root: Path) -> dict[str, float]:
    """Degrees Celsius of each kind of thermal zone, of the hottest one."""
    zones = sorted((root / "sys/class/thermal").glob("thermal_zone*"))
    found: dict[str, float] = {}
    for name, milli in ((text_of(zone / "type"), _number(zone / "temp")) for zone in zones):
        if name and milli is not None:  # processors with several packages have several zones of one name
            found[name] = max(found.get(name, milli / 1e3), milli / 1e3)
    return found


def _found(pattern: str, text: str) -> str | None:
    """The first group of a pattern's first match."""
    match = re.search(pattern, text, re.MULTILINE)
    return match[1].strip() if match else None


def _number(path: Path) -> float | None:
    try:
        return float(text_of(path))
    except ValueError:
        return None
