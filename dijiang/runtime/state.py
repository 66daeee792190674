"""The recurrent state of a batch of sequences: constant size, with a name, cloneable, savable."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from numbers import Integral
from pathlib import Path
from typing import Protocol

import numpy as np

from ..errors import InputError
from ..files import write_file
from ..models.spec import ModelSpec
from .lease import Lease
from .snapshot import HASH, LAST, NO_NOTE, NONE, Note, Seam, Snapshot, chained
from .step import Step


class Keeper(Protocol):
    """Holds the numbers of a state on a device."""

    def give_back(self, arrays: list[np.ndarray], side: int) -> None:
        """Copy them into the arrays and hold them no longer."""
        ...


@dataclass(frozen=True)
class Point:
    """Where a state is. A step replaces it as a whole: layers and position are of the same token.

    layers: one [B, Hkv, K, V] float32 array a layer.  position: tokens seen, [B] int64.
    last: ids of the last tokens, [B, LAST] int64, the newest at the end.
    fed: the step that led here; its tokens are noted as seen when the next one starts.
    side: which of a keeper's two sets holds the numbers.
    """

    layers: list[np.ndarray]
    position: np.ndarray
    last: np.ndarray
    fed: Step | None = None
    side: int = 0


class State:
    """States, positions and seams of a batch of sequences of one checkpoint.

    A session on the CPU updates the arrays in place. One on a GPU borrows them; the first look at
    `layers` after that copies the numbers back.

    One user at a time advances it. Meanwhile other threads may look at it, copy it and save it: a copy waits for
    the end of a step, and the next step for the copy.

    Args:
        layers, position: see `Point`.
        fingerprint: of the checkpoint, see `bundle.manifest.fingerprint_of`.
        vocab_size: number of token ids.
    """

    def __init__(
        self,
        layers: list[np.ndarray],
        position: np.ndarray,
        fingerprint: str,
        vocab_size: int,
        *,
        last: np.ndarray | None = None,
        seen: np.ndarray | None = None,
        history: np.ndarray | None = None,
        seams: list[Seam | None] | None = None,
        vocabulary: str = "",
    ) -> None:
        batch = len(position)
        last = np.full((batch, LAST), NONE, np.int64) if last is None else last
        self.fingerprint = fingerprint
        #: Of the tokenizer that its ids are of, see `Model.adopt`; empty: not known.
        self.vocabulary = vocabulary
        self._point = Point(layers, position, last)
        self._expected: tuple[Point, np.ndarray] | None = None
        self._torn = ""
        self._seen = np.zeros((batch, vocab_size), bool) if seen is None else seen
        history = np.zeros((batch, HASH), np.uint8) if history is None else history
        #: The last step whose tokens are in `_seen`, and the history up to it: replaced by one store.
        self._noted: tuple[Step | None, np.ndarray] = None, history
        self._seams: list[Seam | None] = [None] * batch if seams is None else seams
        self._keeper: Keeper | None = None
        self._lease = Lease()
        #: Held for a step, and for a copy. Again by the same thread: a signal's handler may copy.
        self.guard = threading.RLock()
        self._catch_up: Callable[[], None] | None = None

    @classmethod
    def empty(cls, batch: int, spec: ModelSpec, fingerprint: str) -> State:
        """The state before the first token."""
        if not isinstance(batch, Integral) or isinstance(batch, bool) or batch < 1:
            raise InputError(f"batch is {batch!r}, expected at least 1; ask for one sequence or more")
        shape = (batch, *spec.state_shape)
        try:
            layers = [np.zeros(shape, np.float32) for _ in range(spec.num_layers)]
        except (MemoryError, ValueError) as error:
            raise InputError(f"batch is {batch}, more than the memory has room for; ask for fewer") from error
        return cls(layers, np.zeros(batch, np.int64), fingerprint, spec.vocab_size)

    @property
    def point(self) -> Point:
        """Where it is now. A step that was interrupted counts if its session had ended it."""
        expected = self._expected  # whoever looks changes nothing: another thread may be in the middle of a step
        return expected[0] if expected is not None and expected[1].flat[0] != NONE else self._point

    @property
    def position(self) -> np.ndarray:
        """Tokens seen, [B] int64."""
        return self.point.position

    @property
    def layers(self) -> list[np.ndarray]:
        """One [B, Hkv, K, V] float32 array a layer."""
        self.bring_home()
        return self.point.layers

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Shape of each layer, wherever its numbers are."""
        return [layer.shape for layer in self._point.layers]

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return len(self._point.position)

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return int(self._seen.shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes of all layers; does not depend on the position."""
        return sum(layer.nbytes for layer in self._point.layers)

    @property
    def last(self) -> np.ndarray:
        """Ids of the last tokens, [B, LAST] int64, NONE where there were fewer."""
        return self.point.last

    @property
    def seen(self) -> np.ndarray:
        """Which token ids were fed, [B, vocab] bool."""
        self._note()
        return self._seen

    @property
    def history(self) -> np.ndarray:
        """A hash over the tokens fed, [B, 32] uint8; see `snapshot.chained`."""
        return self._note()

    def _note(self) -> np.ndarray:
        """Count the tokens of the step that led here; the history."""
        with self.guard:
            step, (noted, history) = self.point.fed, self._noted
            if step is not None and step is not noted:
                history = history.copy()
                for row, fed in enumerate(step.fed()):
                    self._seen[row, fed] = True
                    history[row] = chained(history[row], fed)
                self._noted = step, history
            return history

    def seam(self, row: int = 0) -> Seam | None:
        """What the last generation left behind; None: nothing, or tokens were fed since."""
        seam = self._seams[row]
        return seam if seam is not None and seam.at == self.position[row] else None

    def leave(self, row: int, seam: Seam) -> None:
        """Note what the next generation needs."""
        self._seams[row] = seam

    # Steps.

    def after(self, step: Step, layers: list[np.ndarray] | None = None, *, swap: bool = False) -> Point:
        """The point after a step; `layers` where they are not updated in place."""
        self._note()
        point = self.point
        if step.padded or step.is_ragged:
            pieces = list(step.fed())
            position = point.position + [len(piece) for piece in pieces]
            last = np.stack([np.concatenate(row)[-LAST:] for row in zip(point.last, pieces, strict=True)])
        else:
            position = point.position + step.ids.shape[1]
            last = np.concatenate([point.last, step.ids], axis=1)[:, -LAST:]
        fed = step.copy() if step.reused else step
        return Point(layers or point.layers, position, last, fed, point.side ^ swap)

    def commit(self, point: Point) -> None:
        """The step has ended."""
        self._point = point
        self._expected = None

    def settle(self) -> None:
        """A step that was interrupted is over: who advances the state says so before the next one."""
        self.commit(self.point)

    def expect(self, point: Point, written: np.ndarray) -> None:
        """A step is about to update the layers in place; it has ended when `written` is not NONE."""
        self._expected = point, written

    @contextmanager
    def lagging(self, catch_up: Callable[[], None]) -> Iterator[None]:
        """While who advances it waits, tokens may be told that are not in it: a copy has them fed first."""
        self._catch_up = catch_up
        try:
            yield
        finally:
            with self.guard:  # another thread's copy may be at it
                self._catch_up = None

    def tear(self, reason: str) -> None:
        """A step failed in the middle: nothing may go on from here."""
        self._torn = reason

    # Who it belongs to, and who uses it.

    def check(self, spec: ModelSpec, fingerprint: str, user: object = None) -> None:
        """InputError unless a model with this fingerprint can go on from it now."""
        self._require_whole()
        if self.shapes != [(self.batch, *spec.state_shape)] * spec.num_layers:
            raise InputError("the state is of another model, expected new_state() of this one")
        if self.vocab_size != spec.vocab_size:
            raise InputError(
                f"the state has a vocabulary of {self.vocab_size}, expected {spec.vocab_size}; use new_state()"
            )
        if self.fingerprint != fingerprint:
            raise InputError(
                f"the state is of checkpoint {self.fingerprint[:12] or 'unknown'}, expected "
                f"{fingerprint[:12]}; use the bundle that made it, or new_state()"
            )
        self._lease.require_free(user)

    def _require_whole(self) -> None:
        if self._torn:
            raise InputError(
                f"the state was lost in a step that failed ({self._torn}); go on from a clone, a saved "
                "state or new_state()"
            )

    def leased(self) -> AbstractContextManager[object]:
        """A lease for a block, see `Lease.held`."""
        return self._lease.held()

    def lend(self, keeper: Keeper) -> None:
        """The keeper's first set holds the numbers from now on."""
        self.bring_home()
        self.commit(replace(self.point, side=0))
        self._keeper = keeper

    def bring_home(self) -> None:
        """Copy the numbers back into the arrays, if a keeper holds them."""
        self._require_whole()
        with self.guard:
            if self._keeper is not None:
                self._keeper.give_back(self.point.layers, self.point.side)
                self._keeper = None

    # Copies.

    def clone(self) -> State:
        """An independent copy: fork a sequence, or keep a point to come back to."""
        return self.take(range(self.batch))

    def __copy__(self) -> State:
        return self.clone()

    def __deepcopy__(self, memo: object) -> State:
        return self.clone()

    def __reduce__(self) -> tuple[Callable[[Snapshot], State], tuple[Snapshot]]:
        return State.of, (self.clone().snapshot(),)

    def take(self, rows: Sequence[int] | np.ndarray) -> State:
        """A state of some of the sequences, independent of this one.

        Args:
            rows: [N] integers from 0 to batch - 1, N at least 1; in any order, one may come several times
                (the beams of a beam search).

        Raises:
            InputError: rows are anything else.
        """
        chosen = np.asarray(rows)
        if chosen.ndim != 1 or not chosen.size or chosen.dtype.kind not in "iu":
            raise InputError(
                f"rows are {chosen.dtype} of shape {list(chosen.shape)}, expected one or more integers"
            )
        if chosen.min() < 0 or chosen.max() >= self.batch:
            raise InputError(f"rows from {chosen.min()} to {chosen.max()}, expected 0 to {self.batch - 1}")
        with self.guard:
            kept = self.snapshot()
            return State.of(
                replace(
                    kept,
                    layers=[layer[chosen] for layer in kept.layers],
                    position=kept.position[chosen],
                    last=kept.last[chosen],
                    seen=kept.seen[chosen],
                    history=kept.history[chosen],
                    seams=[kept.seams[row] for row in chosen],
                )
            )

    def snapshot(self, note: Note = NO_NOTE) -> Snapshot:
        """All of it as it is now; shares its memory, so write it before the next step."""
        with self.guard:
            if self._catch_up is not None:
                self._catch_up()
            return Snapshot(
                self.layers,
                self.position,
                self.last,
                self.seen,
                self.history,
                [self.seam(row) for row in range(self.batch)],
                self.fingerprint,
                self.vocab_size,
                note,
                self.vocabulary,
            )

    @classmethod
    def gathered(cls, rows: Sequence[tuple[State, int]], memory: list[np.ndarray]) -> State:
        """The state of these sequences, each the row of a state, in the first rows of `memory`.

        Args:
            memory: one [B or more, Hkv, K, V] float32 array a layer. Rows that lie in it already may stay or
                move to the front, never back; those that stay are not copied.
        """
        layers = [array[: len(rows)] for array in memory]
        for at, (state, row) in enumerate(rows):
            found = state.layers
            if row == at and found[0].base is memory[0]:
                continue
            for layer, source in zip(layers, found, strict=True):
                layer[at] = source[row]
        first = rows[0][0]
        return cls(
            layers,
            np.array([state.position[row] for state, row in rows]),
            first.fingerprint,
            first.vocab_size,
            last=np.stack([state.last[row] for state, row in rows]),
            seen=np.stack([state.seen[row] for state, row in rows]),
            history=np.stack([state.history[row] for state, row in rows]),
            seams=[state.seam(row) for state, row in rows],
            vocabulary=first.vocabulary,
        )

    @classmethod
    def of(cls, kept: Snapshot) -> State:
        """From a snapshot, whose memory it takes over."""
        return cls(
            kept.layers,
            kept.position,
            kept.fingerprint,
            kept.vocab_size,
            last=kept.last,
            seen=kept.seen,
            history=kept.history,
            seams=kept.seams,
            vocabulary=kept.vocabulary,
        )

    def save(self, path: str | Path) -> None:
        """Write to a safetensors file (exactly this path), whole or not at all.

        Raises:
            InputError: it cannot be written; a file that was there is untouched.
        """
        with self.guard:
            data = self.snapshot().dump()
        write_file(Path(path), data, InputError)

    @classmethod
    def load(cls, path: str | Path) -> State:
        """Read what `save` wrote; InputError if the file is anything else."""
        return cls.of(Snapshot.load(Path(path)))


def as_state(value: object) -> State:
    """The value; InputError if it is no State."""
    if not isinstance(value, State):
        raise InputError(f"the state is {type(value).__name__}, expected a State; use new_state()")
    return value
