"""Which execution providers really run: a tiny session on each, in a process of its own.

A provider's libraries can be missing or can take the process down with them, and ONNX Runtime falls
back to the CPU without an error; so the list of available providers proves nothing.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import SessionError
from ..runtime.sessions.inference import CPU_PROVIDER, import_onnxruntime, open_inference
from ..runtime.sessions.preflight import preload_libraries, said
from ..runtime.sessions.webgpu import PACKAGE, WEBGPU, installed

#: Seconds that a provider may take to start: CUDA loads gigabytes the first time.
TIMEOUT = 120
#: Runs no graphs of this machine.
REMOTE = "AzureExecutionProvider"
#: A [4, 4] product, and one decode step of com.microsoft.LinearAttention with K = 64.
MATMUL, LINEAR_ATTENTION = (Path(__file__).with_name(f"{name}.onnx") for name in ("matmul", "linear_attention"))


@dataclass(frozen=True)
class Probe:
    """runs: a product ran on the provider itself; linear_attention: so did the fused node.

    reason: the first line of what went wrong, None if nothing did.
    """

    provider: str
    runs: bool
    linear_attention: bool
    reason: str | None


def probe_providers() -> list[Probe]:
    """One Probe for each provider that the installed ONNX Runtime lists, and plug-in; empty without one."""
    try:
        onnxruntime = import_onnxruntime()
    except SessionError:
        return []
    plugins = [WEBGPU.name] if installed(PACKAGE) else []
    return [probe(name) for name in (*onnxruntime.get_available_providers(), *plugins) if name != REMOTE]


def probe(provider: str) -> Probe:
    """Try one provider in a child process."""
    command = [sys.executable, "-m", __name__, provider]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        return Probe(provider, False, False, f"no answer within {TIMEOUT} s")
    try:
        return Probe(provider, **json.loads(done.stdout.splitlines()[-1]))
    except (IndexError, ValueError):
        said = done.stderr.strip().splitlines() or [f"the process ended with status {done.returncode}"]
        return Probe(provider, False, False, said[-1])


def _run(model: Path, provider: str) -> str | None:
    """Run a tiny model on a provider and on nothing else; what went wrong, or None."""
    import numpy as np

    alone = {} if provider == CPU_PROVIDER else {"session.disable_cpu_ep_fallback": "1"}
    try:
        place = WEBGPU.place(0) if provider == WEBGPU.name else {"provider": provider}
        session = open_inference(model, entries=alone, severity=4, **place)
        session.run(None, {i.name: np.ones(i.shape, np.float32) for i in session.get_inputs()})
    except SessionError as error:
        return str(error)
    except Exception as error:  # onnxruntime's errors share no base class
        return said(error)
    used: str = session.get_providers()[0]
    return None if used == provider else f"onnxruntime used {used} instead"


def main(provider: str) -> dict[str, Any]:
    """What the child process prints."""
    preload_libraries(import_onnxruntime())
    reason = _run(MATMUL, provider)
    fused = reason or _run(LINEAR_ATTENTION, provider)
    return {"runs": reason is None, "linear_attention": fused is None, "reason": fused}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1])))
