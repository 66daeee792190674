"""A state on a device: two sets of buffers that take turns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar
from weakref import ref

import numpy as np

from ..state import State


class Buffer(Protocol):
    """Device memory of one array."""

    def write(self, array: np.ndarray) -> None:
        """Copy an array of the same size in."""

    def read(self, array: np.ndarray) -> None:
        """Copy out into an array of the same size."""


B = TypeVar("B", bound=Buffer)


class Resident(Generic[B]):
    """State buffers of one batch size; they hold the state of one `State` at a time.

    A step reads one set and writes the other; which is which, the state's point says. So a step that runs
    twice from the same set, as the capture of a CUDA graph makes it, gives the same state; one that is
    interrupted leaves no trace; and addresses never change.
    """

    def __init__(self, sets: tuple[Sequence[B], Sequence[B]]) -> None:
        self._sets = sets
        self._owner: ref[State] | None = None

    def past(self, side: int) -> Sequence[B]:
        """The set that a step from this side reads, a buffer a layer."""
        return self._sets[side]

    def present(self, side: int) -> Sequence[B]:
        """The set that it writes."""
        return self._sets[1 - side]

    def take(self, state: State) -> int:
        """Hold the numbers of this state; those of another are given back first. The side to go on from."""
        owner = None if self._owner is None else self._owner()
        if owner is not state:
            if owner is not None:
                owner.bring_home()
            for buffer, array in zip(self._sets[0], state.layers, strict=True):
                buffer.write(array)
            state.lend(self)  # an interrupt before leaves the numbers where they are
            self._owner = ref(state)
        return state.point.side

    def give_back(self, arrays: list[np.ndarray], side: int) -> None:
        """Copy the numbers to the owner's arrays and forget it."""
        for buffer, array in zip(self._sets[side], arrays, strict=True):
            buffer.read(array)
        self._owner = None
