"""How weights are stored, and what the result must meet: the table of precisions."""

from __future__ import annotations

from dataclasses import dataclass, replace

#: Bytes of a number of each floating-point type that weights and activations can have.
TYPE_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
#: How many times further from float64 a graph may be than the float32 reference is on the same tokens:
#: 0.9 to 2.6 on random models of every family, 0.6 to 1.3 on SmolLM2 and on the trained example. Planted faults: 80
#: and more (ADR 0019).
FLOAT32_FACTOR = 8.0
#: The same of a graph in 16 bits, or with weights in blocks, over the reference that is rounded as plainly as
#: can be (`parity.rounded`). Right graphs in 16 bits: states 0.4 to 3.9, logits 0.5 to 2.8; in blocks 0.1 to 2.0
#: (ADR 0042).
STATES_16_BITS, LOGITS_16_BITS, IN_BLOCKS = 8.0, 4.0, 3.0
#: The same of what a graph says of the same tokens in other calls. Right graphs: 0 to 2.3 where each call rounds to
#: 16 bits, else 0 to 0.13.
CALLS_16_BITS, CALLS_IN_BLOCKS = 4.0, 0.5
#: What is said of logits: of a window at once; of its tokens one at a time, and in a padded batch, beside that; of
#: tokens far beyond it; of the worst token of the vocabulary. Right graphs that round: far 0.3 to 2.9, worst 0.2 to
#: 3.7 (ADR 0042).
LOGITS = ("error", "step", "padded", "far", "column")
#: What logits in blocks may be off, relative to the reference, beyond what plain rounding is off. Where that costs
#: much, three times as much would be all there is: 1.4 means that nothing is left. Right graphs of random models:
#: states up to 0.07 (int8) and 0.2 (int4) beyond, logits up to 0.05 (ADR 0042).
ERROR_BEYOND = 0.1
#: Input channels that share one scale, and that are mixed before they are rounded (ADR 0024). Bytes of a
#: scale (ADR 0039).
BLOCK, ROTATION, SCALE = 64, 64, 2
BLOCKS = (16, 32, 64, 128, 256)
#: Share of the parameters from which on the embedding takes part in rounding to few bits. A step reads one
#: row of it, so a smaller one costs no time and little space at 8 bits, and its rounding is felt.
EMBEDDING_SHARE = 0.25
#: That are packed, and that kernels read.
BITS = (4, 8)


@dataclass(frozen=True)
class Blocks:
    """Weights as integers of `bits`; `block` consecutive input channels share a scale.

    rotation: input channels that a Hadamard matrix mixes before rounding, a power of two; where it does
        not divide the width, the largest that does. 0: none.
    scale_bytes: 2, scales are bfloat16; 4, float32, as in bundles of before.
    """

    bits: int
    block: int
    rotation: int = 0
    scale_bytes: int = 4

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ValueError(f"blocks of {self.bits} bits, expected {' or '.join(map(str, BITS))}")

    @property
    def weight_bytes(self) -> float:
        """Bytes of one weight, its share of the scale included."""
        return self.bits / 8 + self.scale_bytes / self.block


def embedding_blocks(blocks: Blocks | None, share: float) -> Blocks | None:
    """Blocks of an embedding that has a share of a model's parameters; blocks: as the precision says."""
    return replace(blocks, bits=8) if blocks is not None and share < EMBEDDING_SHARE else blocks


@dataclass(frozen=True)
class Gate:
    """One bound of a verification: `metric` must not exceed it, where it was measured."""

    metric: str
    bound: float


def over_rounding(states: float, logits: float, calls: float) -> tuple[Gate, ...]:
    """What rounding may cost, in units of what it costs this model at its plainest; KL grows as the square."""
    return (
        Gate("state_over_rounding", states),
        Gate("error_over_rounding", logits),
        Gate("step_over_rounding", calls),
        Gate("padded_over_rounding", calls),
        Gate("far_over_rounding", logits),
        Gate("column_over_rounding", 2 * logits),
        Gate("kl_over_rounding", logits**2),
    )


@dataclass(frozen=True)
class Precision:
    """How weights are stored and what the result must meet.

    type: of the activations, and of every weight that is not in blocks.  body, head, embed: the
    projections of the layers, the head and the embedding as blocks of integers; None: in `type`.
    kept: the projections that a budget leaves more bits; None: it has no budget.
    gates: metrics are the keys of `parity.findings.Parity.metrics`; those about a text are None without
    one.  seconds: to write 10^9 weights on 2 cores (docs/models.md).
    turing: TensorRT-RTX has its matmul for GPUs of compute capability 7.5.
    """

    help: str
    gates: tuple[Gate, ...]
    type: str = "fp32"
    body: Blocks | None = None
    head: Blocks | None = None
    embed: Blocks | None = None
    kept: Blocks | None = None
    seconds: float = 18.0
    turing: bool = False

    @property
    def weight_bytes(self) -> float:
        """Bytes of one weight of the layers."""
        return TYPE_BYTES[self.type] if self.body is None else self.body.weight_bytes


IN_16_BITS_GATES = over_rounding(STATES_16_BITS, LOGITS_16_BITS, CALLS_16_BITS)
IN_BLOCKS_GATES = over_rounding(IN_BLOCKS, IN_BLOCKS, CALLS_IN_BLOCKS)
PRECISIONS = {
    "fp32": Precision(
        "as exact as the checkpoint",
        tuple(Gate(f"{what}_over_float32", FLOAT32_FACTOR) for what in LOGITS),
    ),
    "fp16": Precision(
        "16-bit weights and activations, for GPUs",
        IN_16_BITS_GATES,
        type="fp16",
        turing=True,
    ),
    "bf16": Precision(
        "as fp16, with the range of float32",
        IN_16_BITS_GATES,
        type="bf16",
    ),
    "int8": Precision(
        "8-bit weights in blocks",
        (*IN_BLOCKS_GATES, Gate("state_beyond_rounding", 0.15), Gate("error_beyond_rounding", ERROR_BEYOND)),
        body=Blocks(8, BLOCK, ROTATION, SCALE),
        head=Blocks(8, BLOCK, ROTATION, SCALE),
        embed=Blocks(8, BLOCK, 0, SCALE),
        seconds=14.0,
        turing=True,
    ),
    # The head keeps 8 bits: rounding it changes the most likely token most (ADR 0009).
    "int4": Precision(
        "4-bit weights in blocks, the head in 8",
        (*IN_BLOCKS_GATES, Gate("state_beyond_rounding", 0.25), Gate("error_beyond_rounding", ERROR_BEYOND)),
        body=Blocks(4, BLOCK, ROTATION, SCALE),
        head=Blocks(8, BLOCK, ROTATION, SCALE),
        embed=Blocks(4, BLOCK, 0, SCALE),
        kept=Blocks(8, BLOCK, ROTATION, SCALE),
        seconds=40.0,
    ),
}
#: Precisions of the head -> its blocks; None: it has none.
HEADS = {name: row.body for name, row in PRECISIONS.items() if row.type == "fp32"}
