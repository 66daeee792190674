"""Every way to run a bundle: `--provider NAME[:DEVICE]`."""

from __future__ import annotations

from dataclasses import dataclass, field

from ...bundle.manifest import DATA, Bundle
from ...errors import SessionError
from ...machine.driver import Cuda
from ...machine.memory import require_memory, run_bytes
from .base import INTEGERS, OrtSession, Session, import_onnxruntime
from .engines import BACKENDS
from .preflight import check_single_onnxruntime


@dataclass(frozen=True)
class Provider:
    """One row of the table.

    execution_provider: of ONNX Runtime; None: our own TensorRT session.  library: its file, as in
    libonnxruntime_providers_NAME.so.  memory: where it keeps tensors, in ONNX Runtime's words.
    captures: it has CUDA graphs.  whole: it runs every node, so that one left to the CPU is an error.
    options: of the execution provider.
    """

    execution_provider: str | None
    install: str
    library: str = ""
    memory: str = "cuda"
    captures: bool = False
    whole: bool = False
    options: dict[str, str] = field(default_factory=dict)


GPU = "pip install 'dijiang[gpu]' in an environment without onnxruntime"
#: TF32 rounds float32 matmuls to 10 bits: never behind the graph's back.
PROVIDERS = {
    "cpu": Provider("CPUExecutionProvider", "pip install 'dijiang[cpu]'", memory="cpu"),
    "cuda": Provider(
        "CUDAExecutionProvider",
        GPU,
        library="cuda",
        captures=True,
        whole=True,
        options={"use_tf32": "0"},
    ),
    "ort-tensorrt": Provider(
        "TensorrtExecutionProvider",
        f"{GPU}, and TensorRT's own libraries",
        library="tensorrt",
        options={"trt_engine_cache_enable": "1", "trt_timing_cache_enable": "1"},
    ),
    "ort-tensorrt-rtx": Provider(
        "NvTensorRTRTXExecutionProvider",
        "install an onnxruntime that was built with TensorRT-RTX",
        library="nv_tensorrt_rtx",
    ),
    **{name: Provider(None, backend.install) for name, backend in BACKENDS.items()},
}


def open_session(
    bundle: Bundle,
    *,
    provider: str = "auto",
    threads: int | None = None,
    cuda_graph: bool | None = None,
) -> Session:
    """The session that was asked for; SessionError if it is not to be had: never another one."""
    name, device = _parse(bundle, provider)
    row = PROVIDERS[name]
    if name == "cpu":
        if bundle.manifest.precision == "bf16":
            raise SessionError(
                f"{bundle.path}: ONNX Runtime has no bfloat16 kernels for the CPU; use --provider cuda, "
                "or export with --precision fp32 (dijiang verify emulates bf16)"
            )
        if cuda_graph:
            raise SessionError("the CPU has no CUDA graphs; leave --cuda-graph out")
        weights = (bundle.path / DATA).stat().st_size
        require_memory(
            str(bundle.path),
            run_bytes(weights, bundle.manifest.spec.state_bytes),
            "close something, or use a smaller model or precision",
        )
        return OrtSession(bundle, provider=name, threads=threads)
    manifest = bundle.manifest
    if manifest.dialect == "native":
        raise SessionError(
            f"{bundle.path}: the operator of the native dialect runs on the CPU only; use --provider "
            "cpu, or export with --dialect ort"
        )
    if name == "cuda" and manifest.precision in INTEGERS and manifest.target != "cuda":
        raise SessionError(
            f"{bundle.path}: {manifest.precision} weights were written for {manifest.target}, not for "
            "CUDA; export again with --target cuda"
        )
    if row.execution_provider is None:
        from .tensorrt import TensorRtSession

        return TensorRtSession(bundle, name, device, cuda_graph=cuda_graph)
    from .device import DeviceSession

    return DeviceSession(bundle, name, device, cuda_graph=cuda_graph)


def _parse(bundle: Bundle, provider: str) -> tuple[str, int]:
    """Name and device index of NAME[:DEVICE]; `auto` looks at what is there."""
    name, colon, index = provider.partition(":")
    if provider == "auto":
        return _best(bundle), 0
    if name not in PROVIDERS or (colon and not index.isdecimal()):
        raise SessionError(
            f"execution provider {provider!r} is not available, expected auto or one of "
            f"{', '.join(PROVIDERS)}, with :N for the N-th GPU"
        )
    if name == "cpu" and index:
        raise SessionError(f"execution provider {provider!r}: the CPU has no number; use cpu")
    return name, int(index or 0)


def _best(bundle: Bundle) -> str:
    """An engine of the bundle if there is a GPU, CUDA if this onnxruntime has it, else the CPU."""
    if bundle.manifest.dialect == "native":
        return "cpu"
    try:
        Cuda()
    except SessionError:
        return "cpu"
    if bundle.manifest.engines:
        return next(iter(bundle.manifest.engines))
    check_single_onnxruntime()
    return "cuda" if "CUDAExecutionProvider" in import_onnxruntime().get_available_providers() else "cpu"
