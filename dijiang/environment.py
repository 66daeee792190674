"""Variables of the environment that change what dijiang does: each is named here, once."""

from __future__ import annotations

import os

API_KEY, SEAL_KEY = "DIJIANG_API_KEY", "DIJIANG_SEAL_KEY"
SIGNERS = "DIJIANG_REQUIRE_SIGNATURE"
INSTRUCTION_SET = "DIJIANG_ISA"
SOFTWARE_GPU = "ORT_WEBGPU_EP_ALLOW_SOFTWARE_ADAPTER"
NO_TELEMETRY = "ORT_DISABLE_TELEMETRY"
#: Name -> what it does.
VARIABLES = {
    API_KEY: "The key of `dijiang serve`, which clients send. Without one it listens on this machine only.",
    SEAL_KEY: "Seals the states that clients of `dijiang serve` keep; 32 characters or more. Default: random.",
    SIGNERS: "File of public keys: every bundle that is opened must be signed by one of them.",
    INSTRUCTION_SET: "Instruction set of the compiled operator, as `avx2` or `plain`. Default: the best one here.",
    SOFTWARE_GPU: "`1`: WebGPU may take a Vulkan driver in software for a GPU.",
    NO_TELEMETRY: "dijiang sets it to `1` before it imports onnxruntime. `0`: onnxruntime may send telemetry.",
}


def value_of(variable: str) -> str | None:
    """The value; None where it is empty or not set."""
    return os.environ.get(variable) or None
