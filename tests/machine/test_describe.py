"""Machine facts on recorded layouts."""

import json
import platform
from types import SimpleNamespace

import psutil

from dijiang.machine.describe import describe_machine
from dijiang.machine.sensors import handles

NO_GPU = SimpleNamespace(
    nvmlSystemGetDriverVersion=lambda: "",
    nvmlSystemGetCudaDriverVersion=lambda: 0,
    nvmlDeviceGetCount=lambda: 0,
)

#: Files of a Jetson Orin Nano with JetPack 6, shortened.
JETSON = {
    "proc/device-tree/model": "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super\0",
    "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081",
    "var/lib/nvpmodel/status": "pmode:0001 fmode:quiet",
    "etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=15W >\n< POWER_MODEL ID=1 NAME=25W >\n",
    "usr/local/cuda/version.json": '{"cuda": {"name": "CUDA SDK", "version": "12.6.11"}}',
    "proc/cpuinfo": "processor\t: 0\nFeatures\t: fp asimd fphp asimddp\n",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "schedutil\n",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "1344000\n",
    "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
    "sys/class/thermal/thermal_zone0/temp": "48250\n",
}


def lay_out(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_jetson_is_described_by_its_files(tmp_path):
    machine = describe_machine(lay_out(tmp_path, JETSON), NO_GPU)
    assert machine["jetson"] == {
        "model": "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super",
        "l4t": "36.4.3",
        "jetpack": "6.1 or 6.2",
        "power_mode": "25W",
    }
    assert machine["cuda"] == "12.6.11"
    assert machine["cpu"]["features"] == ["NEON", "NEON dotprod", "FP16 (ARM)"]
    assert machine["cpu"]["mhz"] == 1344
    assert machine["cpu"]["governor"] == "schedutil"
    assert machine["temperatures"] == {"cpu-thermal": 48.25}


def test_processor_features_of_x86(tmp_path):
    info = "model name\t: Some CPU\ncpu MHz\t\t: 2596.096\nflags\t\t: fpu avx2 avx512f avx512_vnni\n"
    cpu = describe_machine(lay_out(tmp_path, {"proc/cpuinfo": info}), NO_GPU)["cpu"]
    assert (cpu["model"], cpu["mhz"]) == ("Some CPU", 2596.096)
    assert cpu["features"] == ["AVX2", "AVX512", "AVX512-VNNI"]


def test_what_cannot_be_read_is_none(tmp_path):
    machine = describe_machine(tmp_path, NO_GPU)
    assert machine["jetson"] is machine["cuda"] is machine["cpu"]["governor"] is None
    assert (machine["gpus"], machine["temperatures"], machine["cpu"]["features"]) == ([], {}, [])


def test_processor_that_tells_neither_its_name_nor_its_cores(tmp_path, monkeypatch):
    """As many kernels for ARM do."""
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: 8 if logical else None)
    monkeypatch.setattr(platform, "processor", lambda: "")
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    cpu = describe_machine(tmp_path, NO_GPU)["cpu"]
    assert (cpu["model"], cpu["physical_cores"]) == ("aarch64", 8)


#: What NVML says of a GPU.
NVML = {
    "nvmlSystemGetDriverVersion": lambda: "570.86",
    "nvmlSystemGetCudaDriverVersion": lambda: 12080,
    "nvmlDeviceGetCount": lambda: 1,
    "nvmlDeviceGetHandleByIndex": lambda index: index,
    "nvmlDeviceGetCudaComputeCapability": lambda handle: (8, 7),
    "nvmlDeviceGetMemoryInfo": lambda handle: SimpleNamespace(total=8 << 30, used=1 << 30),
    "nvmlDeviceGetName": lambda handle: "Orin",
}


def test_gpu_is_described_by_nvml(tmp_path):
    (gpu,) = describe_machine(tmp_path, SimpleNamespace(**NVML))["gpus"]
    assert gpu == {
        "name": "Orin",
        "driver": "570.86",
        "cuda_driver": "12.8",
        "compute_capability": "8.7",
        "total_bytes": 8 << 30,
        "used_bytes": 1 << 30,
    }


def test_gpu_that_nvml_has_lost_is_left_out(tmp_path):
    def handle(index):
        if index == 0:
            raise RuntimeError("GPU is lost")
        return index

    nvml = SimpleNamespace(**NVML | {"nvmlDeviceGetCount": lambda: 2, "nvmlDeviceGetHandleByIndex": handle})
    assert [gpu["name"] for gpu in describe_machine(tmp_path, nvml)["gpus"]] == ["Orin"]
    assert handles(nvml) == {1: 1}


def test_the_hottest_of_several_zones_of_one_name_is_told(tmp_path):
    zones = {
        f"sys/class/thermal/thermal_zone{at}/temp": heat for at, heat in enumerate(["40000", "91000", "50000"])
    }
    names = {f"sys/class/thermal/thermal_zone{at}/type": "x86_pkg_temp" for at in range(3)}
    assert describe_machine(lay_out(tmp_path, zones | names), NO_GPU)["temperatures"] == {"x86_pkg_temp": 91.0}


def refused(*_):
    raise RuntimeError("Not Supported")


#: As NVML says it on a Jetson Orin, a Jetson Thor and a DGX Spark: their GPUs have the host's memory.
UNANSWERED = ("DeviceGetMemoryInfo", "DeviceGetTotalEnergyConsumption", "DeviceGetComputeRunningProcesses")
SHARED = SimpleNamespace(
    **NVML
    | {"nvmlSystemGetDriverVersion": lambda: "540.4.0", "nvmlSystemGetCudaDriverVersion": lambda: 12060}
    | {f"nvml{name}": refused for name in UNANSWERED}
)


def test_a_gpu_with_the_hosts_memory_is_described(tmp_path):
    (gpu,) = describe_machine(lay_out(tmp_path, JETSON), SHARED)["gpus"]
    assert (gpu["name"], gpu["total_bytes"], gpu["used_bytes"]) == ("Orin", None, None)


def test_this_machine_is_described_and_json_ready():
    machine = json.loads(json.dumps(describe_machine()))
    assert machine["memory"]["total_bytes"] > machine["memory"]["available_bytes"] > 0
    assert machine["cpu"]["physical_cores"] >= 1
    assert "onnxruntime" in machine["packages"]
