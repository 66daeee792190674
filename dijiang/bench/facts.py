"""What the bench has to know about a precision, a graph form or a provider, and nothing else of them."""

from __future__ import annotations

#: What the cached Transformer can be written in beside the bundle's own shape.
BASELINE_PRECISIONS, BASELINE_DIALECTS = ("fp32", "int8", "int4"), ("ort", "native")
#: --provider names that the cached Transformer runs on.
BASELINE_PROVIDERS = ("auto", "cpu")
#: Providers, as ONNX Runtime names them, that read their weights from the memory of the host.
HOST_PROVIDERS = ("CPUExecutionProvider",)


def reads_host_memory(provider: str) -> bool:
    """Whether the bandwidth of the host's memory bounds a step."""
    return provider in HOST_PROVIDERS


def without_baseline(precision: str, dialect: str) -> str | None:
    """Why a bundle has no Transformer to be compared with, and what to do; None if it has one."""
    if precision not in BASELINE_PRECISIONS:
        return (
            f"precision {precision} has no baseline to compare with, expected fp32 or int8; "
            "export with --precision int8"
        )
    if dialect not in BASELINE_DIALECTS:
        return (
            f"the {dialect} dialect has no baseline to compare with, expected ort or native; "
            "export with --dialect ort"
        )
    return None


def baseline_runs_on(provider: str) -> bool:
    """Whether the Transformer can be asked for with this --provider."""
    return provider in BASELINE_PROVIDERS
