"""States of prompts' beginnings, by their tokens: what many prompts share is fed once."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np

from ..bundle.manifest import DATA
from ..errors import InputError
from ..runtime.model import Model
from ..runtime.snapshot import Note, Snapshot
from ..runtime.state import State

#: States are kept after multiples of so many tokens.
CHUNK = 64
#: Of files; and what a file notes, so that it is not taken for another.
SUFFIX, NAME = ".state", "prefix"
#: States that wait to be written; more are not.
MOST_PENDING = 8


class Prefixes:
    """The states that were used last, in memory and, if there is a folder, on disk.

    Processes may share a folder: a file is whole or not there, and is checked when it is read. Its name says its
    tokens, weights, graph and provider.

    Args:
        memory, disk: bytes at most.
        folder: exists.
    """

    def __init__(self, model: Model, memory: int, folder: Path | None = None, disk: int = 0) -> None:
        self._model, self._memory, self._folder, self._disk = model, memory, folder, disk
        weights = model.manifest.files[DATA].sha256
        maker = json.dumps([model.manifest.fingerprint, weights, model.graph, model.provider])
        self._maker = hashlib.sha256(maker.encode()).digest()
        self._kept: OrderedDict[str, State] = OrderedDict()
        self._size = model.spec.state_bytes + model.spec.vocab_size
        self._writer = ThreadPoolExecutor(1, "prefixes")
        self._pending: list[Future[None]] = []

    def borders(self, state: State, ids: np.ndarray) -> dict[int, str]:
        """Counts of ids [T] after which a state may be kept -> its name; one id at least comes after each.

        A name is a hash of what was before (model, tokens of the state, ids), chained from chunk to chunk.
        """
        data, found = ids.astype("<i8"), {}
        name = hashlib.sha256(self._maker + state.history[0].tobytes()).digest()
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
        kept = state.clone()
        self._remember(name, kept)
        if self._folder is not None:
            self._pending = [one for one in self._pending if not one.done()]
            if len(self._pending) < MOST_PENDING:
                self._pending.append(self._writer.submit(self._write, self._folder, name, kept))

    def close(self) -> None:
        """Write what waits."""
        self._writer.shutdown()

    def _remember(self, name: str, state: State) -> None:
        self._kept[name] = state
        while len(self._kept) * self._size > self._memory:
            self._kept.popitem(last=False)

    def _found(self, name: str) -> State | None:
        if name in self._kept:
            self._kept.move_to_end(name)
            return self._kept[name]
        if self._folder is None:
            return None
        path = self._folder / (name + SUFFIX)
        if not path.exists():
            return None
        try:
            kept = Snapshot.load(path)
            if kept.note.made != {NAME: name}:
                raise InputError(f"{path}: a state of another name; remove it")
            state = State.of(kept)
            state.check(self._model.spec, self._model.manifest.fingerprint)
        except InputError:  # damaged, renamed, or of another version: fed again
            with suppress(OSError):
                path.unlink()
            return None
        with suppress(OSError):
            path.touch()
        self._remember(name, state)
        return state

    def _write(self, folder: Path, name: str, state: State) -> None:
        """A file; the oldest ones make room. What cannot be written is not kept."""
        with suppress(InputError, OSError):
            state.snapshot(Note({NAME: name})).save(folder / (name + SUFFIX))
            files = sorted((one.stat().st_mtime, one.stat().st_size, one) for one in folder.glob(f"*{SUFFIX}"))
            total = sum(size for _, size, _ in files)
            for _, size, one in files:
                if total <= self._disk:
                    break
                one.unlink(missing_ok=True)
                total -= size


def worth_keeping(borders: Mapping[int, str]) -> frozenset[int]:
    """The last border, and those 1, 2, 4, 8... before it.

    So few states are kept of a long prompt, and another one that shares all but its end finds one near the end.
    """
    counts = sorted(borders)
    steps = {0, *(1 << power for power in range(len(counts).bit_length()))}
    return frozenset(counts[-1 - step] for step in steps if step < len(counts))
