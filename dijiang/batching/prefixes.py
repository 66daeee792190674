"""States of prompts' beginnings, by their tokens: what many prompts share is fed once."""

from __future__ import annotations

import hashlib
import json
import mmap
from collections import OrderedDict
from collections.abc import Mapping

import numpy as np

from ..bundle.manifest import DATA
from ..runtime.model import Model
from ..runtime.state import State
from ..runtime.state_folder import StateFolder

#: States are kept after multiples of so many tokens.
CHUNK = 64


class Prefixes:
    """The states that were used last, in memory and, if there is a folder, on disk.

    Their names say the tokens, weights, graph and provider, so that servers may share a folder.

    memory: bytes at most.
    """

    def __init__(self, model: Model, memory: int, folder: StateFolder | None = None) -> None:
        self._model, self._memory, self._folder = model, memory, folder
        weights = model.manifest.files[DATA].sha256
        maker = json.dumps([model.manifest.fingerprint, weights, model.graph, model.provider])
        self._maker = hashlib.sha256(maker.encode()).digest()
        self._kept: OrderedDict[str, State] = OrderedDict()
        self._size = model.spec.state_bytes + model.spec.vocab_size

    def borders(self, state: State, ids: np.ndarray, salt: str = "") -> dict[int, str]:
        """Counts of ids [T] after which a state may be kept -> its name; one id at least comes after each.

        A name is a hash of what was before (model, tokens of the state, ids), chained from chunk to chunk.
        salt: states are found by the same one only.
        """
        data, found = ids.astype("<i8"), {}
        before = self._maker + state.history[0].tobytes() + salt.encode("utf-8", "surrogatepass")
        name = hashlib.sha256(before).digest()
        for border in range(CHUNK, len(ids), CHUNK):
            name = hashlib.sha256(name + data[border - CHUNK : border].tobytes()).digest()
            found[border] = name.hex()
        return found

    def find(self, borders: Mapping[int, str]) -> tuple[int, State] | None:
        """The state after the most ids that is kept, a copy; and after how many."""
        for border, name in sorted(borders.items(), reverse=True):
            if (state := self._found(name)) is not None:
                return border, state.clone()
        return None

    def keep(self, name: str, state: State) -> None:
        """Keep a copy of a state under its name; states that were not used for longest make room."""
        if name in self._kept:
            self._kept.move_to_end(name)
            return
        kept = packed(state)
        self._remember(name, kept)
        if self._folder is not None:
            self._folder.save_later(name, kept)

    def close(self) -> None:
        """Write what waits."""
        if self._folder is not None:
            self._folder.close()

    def _remember(self, name: str, state: State) -> None:
        self._kept[name] = state
        while len(self._kept) * self._size > self._memory:
            self._kept.popitem(last=False)

    def _found(self, name: str) -> State | None:
        if name in self._kept:
            self._kept.move_to_end(name)
            return self._kept[name]
        state = None if self._folder is None else self._folder.load(name)
        if state is None or state.fingerprint != self._model.manifest.fingerprint:
            return None
        self._remember(name, state)
        return state


def packed(state: State) -> State:
    """A copy of one sequence's state in memory of its own: on the heap, copies that come and go leave holes."""
    memory = np.frombuffer(anonymous(state.nbytes), np.float32)
    return State.gathered([(state, 0)], list(memory.reshape(-1, *state.shapes[0])))


def anonymous(size: int) -> mmap.mmap | bytearray:
    """Memory that goes back to the system when nobody has it any more; where there is none of that, of the heap."""
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    try:
        return mmap.mmap(-1, size, **private)
    except OSError:  # the system counts mappings
        return bytearray(size)


def worth_keeping(borders: Mapping[int, str]) -> frozenset[int]:
    """The last border, and those 1, 2, 4, 8... before it.

    So few states are kept of a long prompt, and another one that shares all but its end finds one near the end.
    """
    counts = sorted(borders)
    steps = {0, *(1 << power for power in range(len(counts).bit_length()))}
    return frozenset(counts[-1 - step] for step in steps if step < len(counts))
