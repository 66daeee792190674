"""What runs a bundle: the table of providers."""

from __future__ import annotations

from dataclasses import dataclass, field

from .forms import GRAPHS, SCHEMES
from .precisions import TYPE_BYTES


@dataclass(frozen=True)
class Provider:
    """One way to run a bundle.

    open: its constructor, called as (bundle, graph, detail, device, options: `runtime.options.Loading`).
    graphs, schemes: what it runs.  refused: type of activations -> why it does not run that.
    detail: what the constructor needs to know.
    auto: (bundle, name) -> whether `auto` takes it here; None: only when asked for.  trial: and only if it is
    faster than what comes next.  proven: on what its kernels have run for this project; empty: built only.
    numbered: it may be followed by :N.  onnxruntime: it runs graphs with it.
    emulated: verification rounds 16-bit types on it as a GPU would.
    """

    open: str
    graphs: tuple[str, ...]
    schemes: tuple[str, ...]
    refused: dict[str, str] = field(default_factory=dict)
    detail: str | None = None
    auto: str | None = None
    trial: bool = False
    proven: str = ""
    numbered: bool = True
    onnxruntime: bool = True
    emulated: bool = False

    @property
    def types(self) -> tuple[str, ...]:
        """Of activations, that it runs."""
        return tuple(name for name in TYPE_BYTES if name not in self.refused)


SESSIONS = "dijiang.runtime.sessions"
#: `auto` takes the last that it can.
PROVIDERS = {
    "cpu": Provider(
        f"{SESSIONS}.cpu:open_cpu",
        graphs=tuple(GRAPHS),
        schemes=tuple(SCHEMES),
        refused={"bf16": "ONNX Runtime has no bfloat16 kernels for the CPU"},
        proven="x86-64",
        auto=f"{SESSIONS}.providers:always",
        numbered=False,
        emulated=True,
    ),
    "webgpu": Provider(
        f"{SESSIONS}.device_session:open_device",
        graphs=("webgpu",),
        schemes=("floats", "nbits"),
        refused={
            # tiny-python, 1,024 tokens of its text; 2.8 times on the CPU, that rounds as a GPU would.
            "fp16": "it sums in 16 bits: on the example an error of about 20 times plain rounding's, allowed 4",
            "bf16": "WebGPU has no bfloat16",
        },
        detail=f"{SESSIONS}.webgpu:WEBGPU",
        auto=f"{SESSIONS}.webgpu:has_gpu",
        trial=True,
        proven="Mesa's lavapipe, a Vulkan driver in software (`make gpu`), and an NVIDIA H200",
        numbered=False,
    ),
    "cuda": Provider(
        f"{SESSIONS}.device_session:open_device",
        graphs=("cuda", "ort", "primitive", "onnx"),
        schemes=("floats", "nbits_gpu"),
        detail=f"{SESSIONS}.device:CUDA",
        proven="an NVIDIA H200",
        auto=f"{SESSIONS}.providers:has_provider",
    ),
    "ort-tensorrt": Provider(
        f"{SESSIONS}.device_session:open_device",
        graphs=("ort", "primitive", "onnx"),
        schemes=("floats", "nbits_gpu", "dequantize"),
        detail=f"{SESSIONS}.device:ORT_TENSORRT",
    ),
    "ort-tensorrt-rtx": Provider(
        f"{SESSIONS}.device_session:open_device",
        graphs=("ort", "primitive", "onnx"),
        schemes=("floats", "nbits_gpu", "dequantize"),
        detail=f"{SESSIONS}.device:ORT_TENSORRT_RTX",
    ),
    **{
        name: Provider(
            f"{SESSIONS}.tensorrt:open_engine",
            graphs=("primitive",),
            schemes=("floats", "dequantize"),
            auto=f"{SESSIONS}.providers:has_engine",
            onnxruntime=False,
        )
        for name in ("tensorrt_rtx", "tensorrt")
    },
}
