"""The recurrent state of a batch of sequences: constant size, cloneable, savable."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol
from zipfile import BadZipFile

import numpy as np

from ..errors import InputError


class Keeper(Protocol):
    """Holds the numbers of a state on a device."""

    def give_back(self, arrays: list[np.ndarray]) -> None:
        """Copy them into the arrays and hold them no longer."""
        ...


class State:
    """Recurrent states and positions of a batch.

    position: tokens seen, [B] int64.
    A session on the CPU binds the arrays and updates them in place: their addresses never change. One
    on a GPU borrows them; the first look at `layers` after that copies the numbers back.
    """

    def __init__(self, layers: list[np.ndarray], position: np.ndarray) -> None:
        self._layers = layers
        self._keeper: Keeper | None = None
        self.position = position

    @property
    def layers(self) -> list[np.ndarray]:
        """One [B, Hkv, K, V] float32 array a layer."""
        self.bring_home()
        return self._layers

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Shape of each layer, wherever its numbers are."""
        return [layer.shape for layer in self._layers]

    def lend(self, keeper: Keeper) -> list[np.ndarray]:
        """The arrays, whose numbers the keeper holds from now on."""
        arrays = self.layers
        self._keeper = keeper
        return arrays

    def bring_home(self) -> None:
        """Copy the numbers back into the arrays, if a keeper holds them."""
        if self._keeper is not None:
            keeper, self._keeper = self._keeper, None
            keeper.give_back(self._layers)

    @classmethod
    def empty(cls, batch: int, layers: int, shape: tuple[int, int, int]) -> State:
        """The state before the first token."""
        if batch < 1:
            raise InputError(f"batch is {batch}, expected at least 1; ask for one sequence or more")
        arrays = [np.zeros((batch, *shape), np.float32) for _ in range(layers)]
        return cls(arrays, np.zeros(batch, np.int64))

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return len(self.position)

    @property
    def nbytes(self) -> int:
        """Bytes of all layers; does not depend on the position."""
        return sum(layer.nbytes for layer in self._layers)

    def clone(self) -> State:
        """An independent copy: fork a sequence, or keep a point to come back to."""
        return State([layer.copy() for layer in self.layers], self.position.copy())

    def save(self, path: str | Path) -> None:
        """Write to an .npz file (exactly this path)."""
        arrays: dict[str, Any] = {f"layer_{i}": layer for i, layer in enumerate(self.layers)}
        with Path(path).open("wb") as stream:
            np.savez(stream, position=self.position, **arrays)

    @classmethod
    def load(cls, path: str | Path) -> State:
        """Read what `save` wrote; InputError if the file is not a state."""
        try:
            with Path(path).open("rb") as stream, np.load(stream, allow_pickle=False) as data:
                layers = [data[f"layer_{i}"] for i in range(len(data.files) - 1)]
                return cls(layers, data["position"])
        except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
            raise InputError(f"{path}: not a saved state ({error}); save it again") from error
