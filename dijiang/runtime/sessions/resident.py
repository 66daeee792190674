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
        ...

    def read(self, array: np.ndarray) -> None:
        """Copy out into an array of the same size."""
        ...


B = TypeVar("B", bound=Buffer)


class Resident(Generic[B]):
    """State buffers of one batch size; they hold the state of one `State` at a time.

    A step reads one set and writes the other. So a step that runs twice from the same set, as the
    capture of a CUDA graph makes it, gives the same state; and addresses never change.
    """

    def __init__(self, sets: tuple[Sequence[B], Sequence[B]]) -> None:
        self._sets = sets
        self._owner: ref[State] | None = None
        self.side = 0

    @property
    def past(self) -> Sequence[B]:
        """The set that the next step reads, a buffer a layer."""
        return self._sets[self.side]

    @property
    def present(self) -> Sequence[B]:
        """The set that the next step writes."""
        return self._sets[1 - self.side]

    def take(self, state: State) -> None:
        """Hold the numbers of this state; those of another are given back first."""
        owner = None if self._owner is None else self._owner()
        if owner is state:
            return
        if owner is not None:
            owner.bring_home()
        for buffer, array in zip(self.past, state.lend(self), strict=True):
            buffer.write(array)
        self._owner = ref(state)

    def swap(self) -> None:
        """What was written is the past of the next step."""
        self.side = 1 - self.side

    def give_back(self, arrays: list[np.ndarray]) -> None:
        """Copy the numbers to the owner's arrays and forget it."""
        for buffer, array in zip(self.past, arrays, strict=True):
            buffer.read(array)
        self._owner = None
