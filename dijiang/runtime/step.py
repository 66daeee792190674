"""What goes through a graph at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from ..bundle import names

#: Of ids, kept and starts.
Shapes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class Step:
    """Tokens that go through a graph together.

    ids, positions, mask: [B, T] int64; mask 0 is padding.  kept: [B, N] int64, indices into T of the
    tokens whose results are wanted.  starts: [S + 1] int64, where the tokens of each of S sequences begin, in
    the ids read row after row; a ragged step has one row for all of them, any other one a row for each.
    padded: whether any mask is 0.  reused: the arrays are memory of the session, which the next step overwrites.
    All of them lie row after row: sessions read their memory.
    """

    ids: np.ndarray
    positions: np.ndarray
    mask: np.ndarray
    kept: np.ndarray
    starts: np.ndarray
    padded: bool = False
    reused: bool = False

    @classmethod
    def of(cls, ids: np.ndarray, start: np.ndarray, kept: np.ndarray, mask: np.ndarray | None = None) -> Step:
        """A step of sequences that have `start` [B] tokens; mask None: no padding."""
        ids = np.array(ids, np.int64, order="C")  # the caller may reuse its own
        starts = even_starts(ids.shape)
        if mask is None:
            positions = start[:, None] + np.arange(ids.shape[1])
            return cls(ids, positions, np.ones_like(ids), kept, starts)
        mask = np.ascontiguousarray(mask)
        positions = np.maximum(start[:, None] + np.cumsum(mask, axis=1) - 1, 0)
        return cls(ids, positions, mask, kept, starts, padded=not mask.all())

    @classmethod
    def ragged(cls, pieces: Sequence[Sequence[int] | np.ndarray], start: np.ndarray, wanted: Sequence[int]) -> Step:
        """A step of sequences that have `start` [S] tokens, each of which gets a piece of its own length, or none.

        wanted: whose last token's result is.
        """
        lengths = [len(piece) for piece in pieces]
        starts = np.cumsum([0, *lengths])
        ids = np.concatenate([np.asarray(piece, np.int64) for piece in pieces])[None]
        positions = np.arange(ids.size)[None] + np.repeat(start - starts[:-1], lengths)
        return cls(ids, positions, np.ones_like(ids), starts[1:][wanted][None] - 1, starts)

    @classmethod
    def single(cls, batch: int) -> Step:
        """One token a sequence, to be filled in: `ids` and `positions`."""
        ids, positions, kept = (np.zeros((batch, 1), np.int64) for _ in range(3))
        return cls(ids, positions, np.ones_like(ids), kept, even_starts(ids.shape), reused=True)

    @staticmethod
    def single_shapes(batch: int) -> Shapes:
        """Of `single`."""
        return (batch, 1), (batch, 1), (batch + 1,)

    @property
    def is_ragged(self) -> bool:
        """Whether one row of ids is of several sequences."""
        return len(self.starts) - 1 != len(self.ids)

    @property
    def shapes(self) -> Shapes:
        """What its arrays are as large as."""
        return self.ids.shape, self.kept.shape, self.starts.shape

    def fed(self) -> Iterator[np.ndarray]:
        """The ids of each sequence, without padding."""
        ids, mask = self.ids.ravel(), self.mask.ravel()
        for first, end in pairwise(self.starts.tolist()):
            yield ids[first:end][mask[first:end] != 0] if self.padded else ids[first:end]

    def copy(self) -> Step:
        """With ids and mask of its own."""
        return replace(self, ids=self.ids.copy(), mask=self.mask.copy(), reused=False)

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """The inputs that every graph has, by name."""
        return dict(zip(names.INPUTS, (self.ids, self.positions, self.mask, self.kept), strict=True))

    def feeds(self, inputs: Iterable[str]) -> dict[str, np.ndarray]:
        """Those of `inputs` that a step fills, by name."""
        every = self.arrays | {names.SEQUENCE_STARTS: self.starts}
        return {name: every[name] for name in inputs if name in every}


def even_starts(shape: tuple[int, ...]) -> np.ndarray:
    """Where each of B sequences of T tokens begins, see `Step`."""
    batch, tokens = shape
    return np.arange(batch + 1) * tokens
