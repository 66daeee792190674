"""The next command for each piece that can be missing; docs/jetson.md has the same for a Jetson."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Remedy:
    """Commands for any machine, and for a Jetson where they differ; the first one first."""

    usual: tuple[str, ...]
    jetson: tuple[str, ...] | None = None

    def text(self, *, jetson: bool) -> str:
        """One line."""
        return "; or ".join(self.jetson if jetson and self.jetson else self.usual)


_TENSORRT = Remedy(("pip install 'dijiang[tensorrt]'",), ("sudo apt install tensorrt",))
REMEDIES = {
    "GPU": Remedy(("nvidia-smi",)),
    "governor": Remedy(("sudo cpupower frequency-set -g performance",), ("sudo jetson_clocks",)),
    "power mode": Remedy(("sudo nvpmodel -q",)),
    "onnxruntime": Remedy(("pip install 'dijiang[cpu]'",)),
    "two onnxruntimes": Remedy(("pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'dijiang[cpu]'",)),
    "LinearAttention": Remedy(
        ("pip install -U 'onnxruntime>=1.30'", "dijiang export CHECKPOINT -o BUNDLE --graph primitive")
    ),
    "CUDAExecutionProvider": Remedy(
        ("nvidia-smi", "pip install 'dijiang[gpu]'"),
        ("pip install onnxruntime-gpu --index-url https://pypi.jetson-ai-lab.io/jp6/cu126",),
    ),
    "TensorrtExecutionProvider": _TENSORRT,
    "tensorrt": _TENSORRT,
    "onnx-ir": Remedy(("pip install 'dijiang[export]'",)),
    "matplotlib": Remedy(("pip install 'dijiang[bench]'",)),
    "native operator": Remedy(
        ("sudo apt-get install g++ && pip install --force-reinstall --no-binary=dijiang dijiang",)
    ),
    "energy sensors": Remedy(
        ("pip install 'dijiang[bench]'", "sudo chmod a+r /sys/class/powercap/intel-rapl:*/energy_uj"),
        ("ls /sys/class/hwmon/*/in*_label",),
    ),
}
