"""What a bundle is written for: the table of targets."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """What a bundle is written for.

    graphs: what it may hold, the best first.  blocks: graph -> scheme of weights in blocks of integers.
    others: other graphs may be asked for, too.
    """

    help: str
    graphs: tuple[str, ...]
    blocks: dict[str, str]
    others: bool = False


TARGETS = {
    "onnxruntime": Target(
        "the CPU; fp32, fp16 and bf16 on GPUs, too",
        ("native", "ort", "webgpu", "primitive", "cuda"),
        {"native": "nbits", "ort": "nbits", "webgpu": "nbits", "primitive": "dequantize"},
        others=True,
    ),
    "cuda": Target(
        "int8 and int4 with activations in fp16", ("cuda", "ort"), dict.fromkeys(("cuda", "ort"), "nbits_gpu")
    ),
    "tensorrt": Target("for dijiang build", ("primitive",), {"primitive": "dequantize"}),
}
