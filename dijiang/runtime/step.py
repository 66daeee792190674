"""What goes through a graph at once."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ..bundle import names


@dataclass(frozen=True)
class Step:
    """Tokens that go through a graph together.

    ids, positions, mask: [B, T] int64; mask 0 is padding.  kept: [B, N] int64, indices into T of the
    tokens whose results are wanted.  padded: whether any mask is 0.  reused: the arrays are memory of the
    session, which the next step overwrites.
    """

    ids: np.ndarray
    positions: np.ndarray
    mask: np.ndarray
    kept: np.ndarray
    padded: bool = False
    reused: bool = False

    @classmethod
    def of(cls, ids: np.ndarray, start: np.ndarray, kept: np.ndarray, mask: np.ndarray | None = None) -> Step:
        """A step of sequences that have `start` [B] tokens; mask None: no padding."""
        ids = np.array(ids, np.int64)  # the caller may reuse its own
        if mask is None:
            positions = start[:, None] + np.arange(ids.shape[1])
            return cls(ids, positions, np.ones_like(ids), kept)
        positions = np.maximum(start[:, None] + np.cumsum(mask, axis=1) - 1, 0)
        return cls(ids, positions, mask, kept, padded=not mask.all())

    @classmethod
    def single(cls, batch: int) -> Step:
        """One token a sequence, to be filled in: `ids` and `positions`."""
        ids, positions, kept = (np.zeros((batch, 1), np.int64) for _ in range(3))
        return cls(ids, positions, np.ones_like(ids), kept, reused=True)

    def copy(self) -> Step:
        """With ids and mask of its own."""
        return replace(self, ids=self.ids.copy(), mask=self.mask.copy(), reused=False)

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """The inputs of a graph, by name."""
        return dict(zip(names.INPUTS, (self.ids, self.positions, self.mask, self.kept), strict=True))
