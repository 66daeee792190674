"""What each precision means for each kind of weight."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..errors import ExportError

#: Input channels that share one scale.
BLOCK = 128
BLOCKS = (16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Rounding:
    """Weights as integers of `bits`, `block` consecutive input channels to a scale."""

    bits: int
    block: int


@dataclass(frozen=True)
class Precision:
    """How the projections of the layers, the head and the embedding are stored; None: in `type`.

    type: of all other weights and of the activations: a row of `passes.precision.TYPES`, or fp32.
    """

    body: Rounding | None = None
    head: Rounding | None = None
    embed: Rounding | None = None
    type: str = "fp32"

    @property
    def quantized(self) -> bool:
        """Whether weights are blocks of integers."""
        return self.body is not None


#: The head keeps 8 bits under int4: rounding it changes the most likely token most (ADR 0009).
PRECISIONS = {
    "fp32": Precision(),
    "fp16": Precision(type="fp16"),
    "bf16": Precision(type="bf16"),
    "int8": Precision(Rounding(8, BLOCK), Rounding(8, BLOCK), Rounding(8, BLOCK)),
    "int4": Precision(Rounding(4, BLOCK), Rounding(8, BLOCK), Rounding(4, BLOCK)),
}
HEAD_PRECISIONS = {"fp32": None, "int8": 8, "int4": 4}


def precision_of(name: str, head: str | None = None, block: int | None = None) -> Precision:
    """A row of PRECISIONS, with the head's precision and the block size changed on request.

    Raises:
        ExportError: an unknown name or size, or an option that a float32 export does not have.
    """
    for what, value, known in (
        ("precision", name, tuple(PRECISIONS)),
        ("head precision", head, (None, *HEAD_PRECISIONS)),
        ("block size", block, (None, *BLOCKS)),
    ):
        if value not in known:
            names = ", ".join(str(k) for k in known if k is not None)
            raise ExportError(f"{what} {value!r} is unknown, expected one of {names}")
    found = PRECISIONS[name]
    if not found.quantized:
        if head is not None or block is not None:
            raise ExportError(
                f"precision {name} has no head precision or block size; use --precision int8 or int4"
            )
        return found
    size = block or BLOCK
    body, kept, embed = (
        None if rounding is None else replace(rounding, block=size)
        for rounding in (found.body, found.head, found.embed)
    )
    if head is not None:
        bits = HEAD_PRECISIONS[head]
        kept = None if bits is None else Rounding(bits, size)
    return replace(found, body=body, head=kept, embed=embed)
