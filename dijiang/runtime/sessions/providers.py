"""Every way to run a bundle: `--provider NAME[:DEVICE]`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...bundle.opened import Bundle
from ...errors import DijiangError, SessionError
from ...machine.driver import Cuda
from ...recipe import PRECISIONS, TARGETS, named, resolve
from .base import Session
from .device import Device
from .engines import BACKENDS
from .inference import import_onnxruntime, why_not
from .preflight import check_single_onnxruntime

AUTO = "auto"


@dataclass(frozen=True)
class Provider:
    """One row of the table.

    open: import path of its constructor, called as (bundle, graph, detail, device, threads=,
    cuda_graph=).  detail: what that needs to know.  numbered: it may be followed by :N.
    onnxruntime: it runs graphs with it.  auto: whether `auto` takes it here for a bundle, rows in their
    order; None: only when asked for.  emulated: verification rounds 16-bit types on it as a GPU would.
    """

    open: str
    detail: Any = None
    numbered: bool = True
    onnxruntime: bool = True
    auto: Callable[[Bundle, str], bool] | None = None
    emulated: bool = False


def _has_gpu() -> bool:
    try:
        Cuda()
    except SessionError:
        return False
    return True


def _has_engine(bundle: Bundle, name: str) -> bool:
    return name in bundle.manifest.engines and _has_gpu()


def _has_provider(bundle: Bundle, name: str) -> bool:
    if not any(name in record.providers for record in bundle.manifest.graphs.values()) or not _has_gpu():
        return False
    check_single_onnxruntime()
    return PROVIDERS[name].detail.name in import_onnxruntime().get_available_providers()


GPU = "pip install 'dijiang[gpu]' in an environment without onnxruntime"
SESSIONS = "dijiang.runtime.sessions"
PROVIDERS = {
    **{
        name: Provider(f"{SESSIONS}.tensorrt:open_engine", name, onnxruntime=False, auto=_has_engine)
        for name in BACKENDS
    },
    "cuda": Provider(
        f"{SESSIONS}.device:open_device",
        # TF32 rounds float32 matmuls to 10 bits: never behind the graph's back.
        Device(
            "CUDAExecutionProvider",
            GPU,
            "cuda",
            captures=True,
            whole=True,
            options=(("use_tf32", "0"),),
        ),
        auto=_has_provider,
    ),
    "cpu": Provider(f"{SESSIONS}.cpu:open_cpu", numbered=False, auto=lambda bundle, name: True, emulated=True),
    "ort-tensorrt": Provider(
        f"{SESSIONS}.device:open_device",
        Device(
            "TensorrtExecutionProvider",
            f"{GPU}, and TensorRT's own libraries",
            "tensorrt",
            options=(("trt_engine_cache_enable", "1"), ("trt_timing_cache_enable", "1")),
        ),
    ),
    "ort-tensorrt-rtx": Provider(
        f"{SESSIONS}.device:open_device",
        Device(
            "NvTensorRTRTXExecutionProvider",
            "install an onnxruntime that was built with TensorRT-RTX",
            "nv_tensorrt_rtx",
        ),
    ),
}


def open_session(
    bundle: Bundle,
    *,
    provider: str = AUTO,
    graph: str | None = None,
    threads: int | None = None,
    cuda_graph: bool | None = None,
) -> Session:
    """The session that was asked for; SessionError if it is not to be had: never another one.

    graph: None: the best of the bundle that runs here.
    """
    name, device = parse(bundle, provider)
    row, chosen = PROVIDERS[name], choose_graph(bundle, name, graph)
    session: Session = named(row.open)(bundle, chosen, row.detail, device, threads=threads, cuda_graph=cuda_graph)
    return session


def parse(bundle: Bundle, provider: str) -> tuple[str, int]:
    """Name and device index of NAME[:DEVICE]; `auto` looks at what is there."""
    name, colon, index = provider.partition(":")
    if provider == AUTO:
        found = (n for n, row in PROVIDERS.items() if row.auto is not None and row.auto(bundle, n))
        return next(found), 0
    if name not in PROVIDERS or (colon and not index.isdecimal()):
        raise SessionError(
            f"execution provider {provider!r} is not available, expected auto or one of "
            f"{', '.join(PROVIDERS)}, with :N for the N-th GPU"
        )
    if colon and not PROVIDERS[name].numbered:
        raise SessionError(f"execution provider {provider!r}: it has no number; use {name}")
    return name, int(index or 0)


def emulates(provider: str) -> bool:
    """Whether a verification on this provider rounds 16-bit types as a GPU would."""
    row = PROVIDERS.get(provider)
    return row is not None and row.emulated


def choose_graph(bundle: Bundle, provider: str, graph: str | None = None) -> str:
    """The graph that a provider runs here: the one asked for, else the first that it can."""
    records = bundle.manifest.graphs
    if graph is not None and graph not in records:
        raise SessionError(
            f"{bundle.path} has no {graph} graph, it has {', '.join(records)}; choose one of them, or "
            f"export with --graph {graph}"
        )
    wanted = [graph] if graph is not None else list(records)
    able = [name for name in wanted if provider in records[name].providers]
    if not able:
        raise SessionError(_refusal(bundle, wanted, provider))
    reasons = dict.fromkeys(able, "")
    if PROVIDERS[provider].onnxruntime:
        for name in able:
            major, minor = records[name].onnxruntime.split(".")
            reasons[name] = why_not(name, (int(major), int(minor)))
    found = next((name for name, reason in reasons.items() if not reason), None)
    if found is None:
        told = "; ".join(f"the {name} graph: {reason}" for name, reason in reasons.items())
        raise SessionError(f"{bundle.path}: none of its graphs runs here: {told}")
    return found


def _refusal(bundle: Bundle, graphs: list[str], provider: str) -> str:
    recipe = bundle.manifest.recipe
    runs = dict.fromkeys(p for name in graphs for p in recipe.providers(name))
    return (
        f"{bundle.path}: its {' and '.join(graphs)} graph in {recipe.precision} runs on "
        f"{', '.join(runs)}, not on {provider}; use --provider {next(iter(runs), 'cpu')}, or "
        f"{_export_for(recipe.precision, provider)}"
    )


def _export_for(precision: str, provider: str) -> str:
    """How to export so that a provider runs the result."""
    for name in (precision, *PRECISIONS):
        for target in TARGETS:
            try:
                recipe = resolve(name, target=target)
            except DijiangError:
                continue
            if any(provider in recipe.providers(graph) for graph in recipe.graphs):
                options = f" --precision {name}" if name != precision else ""
                return f"export again with --target {target}{options}"
    return "choose another provider"
