"""Which execution providers really run: a tiny session on each, in a process of its own.

A provider's libraries can be missing or can take the process down with them, and ONNX Runtime falls
back to the CPU without an error; so the list of available providers proves nothing.
"""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

from ..runtime.sessions.preflight import preload_libraries

#: Seconds that a provider may take to start: CUDA loads gigabytes the first time.
TIMEOUT = 120
#: Runs no graphs of this machine.
REMOTE = "AzureExecutionProvider"
#: ONNX models: a [4, 4] product, and one decode step of com.microsoft.LinearAttention with K = 64.
MATMUL = (
    "CAg6WQoRCgFhCgFiEgF5IgZNYXRNdWwSBXByb2JlWhMKAWESDgoMCAESCAoCCAQKAggEWhMKAWISDgoMCAESCAoCCAQKAggE"
    "YhMKAXkSDgoMCAESCAoCCAQKAggEQgQKABAR"
)
LINEAR_ATTENTION = (
    "CAg6yQIKiAEKAXEKAWsKAXYKAXMKAWQSAXkSAXQiD0xpbmVhckF0dGVudGlvbioTCgxrdl9udW1faGVhZHMYAaABAioSCgtx"
    "X251bV9oZWFkcxgBoAECKg8KBXNjYWxlFQAAgD+gAQEqFwoLdXBkYXRlX3J1bGUiBWdhdGVkoAEDOg1jb20ubWljcm9zb2Z0"
    "EgVwcm9iZVoXCgFxEhIKEAgBEgwKAggBCgIIAQoCCEBaFwoBaxISChAIARIMCgIIAQoCCAEKAghAWhcKAXYSEgoQCAESDAoC"
    "CAEKAggBCgIIQFobCgFzEhYKFAgBEhAKAggBCgIIAQoCCEAKAghAWhcKAWQSEgoQCAESDAoCCAEKAggBCgIIAWIXCgF5EhIK"
    "EAgBEgwKAggBCgIIAQoCCEBiGwoBdBIWChQIARIQCgIIAQoCCAEKAghACgIIQEIECgAQEUIRCg1jb20ubWljcm9zb2Z0EAE="
)


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
    """One Probe for each provider that the installed ONNX Runtime lists; empty without one."""
    try:
        import onnxruntime
    except ImportError:
        return []
    return [probe(name) for name in onnxruntime.get_available_providers() if name != REMOTE]


def probe(provider: str) -> Probe:
    """Try one provider in a child process."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", __name__, provider], capture_output=True, text=True, timeout=TIMEOUT
        )
    except subprocess.TimeoutExpired:
        return Probe(provider, False, False, f"no answer within {TIMEOUT} s")
    try:
        return Probe(provider, **json.loads(done.stdout.splitlines()[-1]))
    except (IndexError, ValueError):
        lines = done.stderr.strip().splitlines()
        ended = f"the process ended with status {done.returncode}"
        return Probe(provider, False, False, lines[-1] if lines else ended)


def _run(model: str, provider: str) -> str | None:
    """Run a tiny model on a provider and on nothing else; what went wrong, or None."""
    import numpy as np
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    if provider != "CPUExecutionProvider":
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    try:
        session = ort.InferenceSession(base64.b64decode(model), options, providers=[provider])
        feed = {i.name: np.ones(i.shape, np.float32) for i in session.get_inputs()}
        session.run(None, feed)
    except Exception as error:  # onnxruntime's errors share no base class
        return str(error).strip().splitlines()[0]
    used: str = session.get_providers()[0]
    return None if used == provider else f"onnxruntime used {used} instead"


def main(provider: str) -> dict[str, Any]:
    """What the child process prints."""
    import onnxruntime as ort

    preload_libraries(ort)
    reason = _run(MATMUL, provider)
    fused = reason or _run(LINEAR_ATTENTION, provider)
    return {"runs": reason is None, "linear_attention": fused is None, "reason": fused}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1])))
