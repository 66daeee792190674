"""Which text integers were rounded by: a verification on it tells too good a figure."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

#: Characters of a hash, and tokens of a piece of text that has one.
SHORT, PIECE = 16, 32


@dataclass(frozen=True)
class CalibrationText:
    """A file that was calibrated on. text: its name.  length: tokens of a piece.  pieces: their hashes."""

    text: str
    length: int
    pieces: tuple[str, ...]

    @classmethod
    def of(cls, text: str, batches: Sequence[np.ndarray]) -> CalibrationText:
        """Of sequences of ids, [N, T] int64 each; of a sequence, a rest shorter than a piece is left out."""
        length = min(PIECE, batches[0].shape[1])
        starts = range(0, batches[0].shape[1] - length + 1, length)
        rows = (ids for batch in batches for ids in batch)
        return cls(text, length, tuple(_hash(ids[start : start + length]) for ids in rows for start in starts))

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> CalibrationText:
        """Read what a manifest keeps; KeyError, TypeError or ValueError for anything else."""
        found = cls(str(data["text"]), int(data["length"]), tuple(map(str, data["pieces"])))
        if found.length < 1:
            raise ValueError(f"calibration on pieces of {found.length} tokens")
        return found

    def shared(self, ids: np.ndarray) -> int:
        """How many of these ids [N] are in one of its pieces, wherever it begins."""
        known, within = set(self.pieces), bytearray(len(ids))
        for start in range(len(ids) - self.length + 1):
            if _hash(ids[start : start + self.length]) in known:
                within[start : start + self.length] = b"\1" * self.length
        return sum(within)


def _hash(ids: np.ndarray) -> str:
    return hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest()[:SHORT]
