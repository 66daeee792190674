"""What a bundle of each precision must meet before it may be kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Gate:
    """One bound: `metric` must not exceed it, where it was measured."""

    metric: str
    bound: float


#: precision -> gates. Metrics: the keys of `parity.Parity.metrics`; those about a text are None without.
GATES: dict[str, tuple[Gate, ...]] = {
    "fp32": (Gate("max_error", 1e-4), Gate("step_error", 1e-4)),
    # Rounding the weights alone moves small random models by 0.7e-3 to 1.9e-3 RMS in fp16, and all of it
    # by up to 3.2e-3; bf16 has three bits less. On the trained example fp16 is 0.4e-3 off, bf16 3e-3.
    "fp16": (Gate("rms_relative_error", 5e-3), Gate("kl", 1e-5), Gate("top1_disagreement", 0.01)),
    # Integer weights: where the model has learned something, text counts, its own if there is no other.
    # Without weights that mean anything only gross errors can be told. The states of the first two
    # layers are 0.003 to 0.04 off (int8), 0.04 to 0.37 (int4) in every family; channels in a wrong place
    # make it 1.4. Depth amplifies the rounding of random weights: the logits of LLaMA2-7B in int4 are
    # 1.07 off, and 1.4 means that nothing is left.
    "int8": (
        Gate("early_state_error", 0.1),
        Gate("rms_relative_error", 0.7),
        Gate("kl_on_text", 1e-3),
        Gate("perplexity_change", 1e-3),
        Gate("top1_disagreement", 0.015),
    ),
    "int4": (
        Gate("early_state_error", 0.6),
        Gate("rms_relative_error", 1.3),
        Gate("kl_on_text", 5e-2),
        Gate("perplexity_change", 8e-3),
        Gate("top1_disagreement", 0.08),
    ),
    "bf16": (Gate("rms_relative_error", 4e-2), Gate("kl", 1e-3), Gate("top1_disagreement", 0.05)),
}


@dataclass(frozen=True)
class Verdict:
    """A gate and what was found; NaN never passes."""

    metric: str
    found: float
    bound: float
    passed: bool


def judge(precision: str, metrics: Mapping[str, float | None]) -> tuple[Verdict, ...]:
    """The verdict of every gate of a precision whose metric was measured."""
    found = [(gate, metrics[gate.metric]) for gate in GATES[precision]]
    return tuple(
        Verdict(gate.metric, value, gate.bound, value <= gate.bound)
        for gate, value in found
        if value is not None
    )
