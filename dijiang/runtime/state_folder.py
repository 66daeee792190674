"""States on disk by name, for processes that may share a folder."""

from __future__ import annotations

import logging
import os
import re
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from ..errors import InputError, VersionError
from ..hidden import sweep
from ..reading import read_regular
from .snapshot import LARGEST, Note, Snapshot
from .state import State

log = logging.getLogger("dijiang.states")
#: Of files; and what a file notes, so that it is not taken for another.
SUFFIX, NAME = ".state", "name"
#: Names that are ours, of answers and of beginnings: no other name leads to a file, and no other file is removed.
NAMES = re.compile(r"(?:chat)?cmpl-[0-9a-f]{32}|[0-9a-f]{64}")
#: Saves after which the files are listed again: other processes may write there.
RELISTED = 100
#: Files of which each is worth keeping.
FEW = 10
#: States that wait to be written.
MOST_WAITING = 8
#: Of a new folder: states tell much of their texts.
PRIVATE = 0o700


class StateFolder:
    """States that were used last. A file is whole or not there, and is checked when it is read.

    What a killed process had not finished is removed at the start.

    Args:
        path: made where it is missing.
        most: bytes of all files; the oldest ones make room. Where others write there, too, it may be more for
            RELISTED saves.

    Raises:
        InputError: the folder cannot be made, or nothing be written there.
    """

    def __init__(self, path: Path, most: int) -> None:
        try:
            path.mkdir(mode=PRIVATE, parents=True, exist_ok=True)
            sweep(path)
            if not os.access(path, os.W_OK):
                raise OSError("nothing can be written there")
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: cannot be used ({error}); choose another folder") from error
        self._path, self._most = path, most
        self._writer = ThreadPoolExecutor(1, "states")
        self._waiting: dict[str, State] = {}
        #: What was said: that states cannot be written, that they cannot be removed.
        self._failed = self._stuck = False
        #: Bytes of all files, and saves, since they were listed.
        self._bytes, self._saves = most, RELISTED
        #: States that could not be written.
        self.lost = 0

    def save_later(self, name: str, state: State, *, most: float = MOST_WAITING) -> bool:
        """Write a state that nobody changes any more; False, and nothing is done, where so many wait."""
        if len(self._waiting) >= most:
            return False
        self._waiting[name] = state
        self._writer.submit(self._save_next, name)
        return True

    def save(self, name: str, state: State) -> bool:
        """Write a state; False: it could not be, and the log says why, once until one is written again."""
        try:
            self._path.mkdir(mode=PRIVATE, parents=True, exist_ok=True)
            path = self._path / (name + SUFFIX)
            state.snapshot(Note({NAME: name})).save(path)
        except (InputError, OSError) as error:
            self.lost += 1
            if not self._failed:
                log.warning("%s: states cannot be kept (%s); those are lost until they can be", self._path, error)
            self._failed = True
            return False
        self._failed = False
        with suppress(OSError):  # another process, that removes the same ones
            self._bytes, self._saves = self._bytes + path.stat().st_size, self._saves + 1
            if self._bytes > self._most or self._saves >= RELISTED:
                self._make_room(path)
        return True

    def _make_room(self, new: Path) -> None:
        """List our files; where they do not fit, remove the oldest, of many a tenth more, so that this is seldom.

        Of those of one age the new one is the last to go.
        """
        files, stuck = [], None
        for one in self._path.glob(f"*{SUFFIX}"):
            with suppress(OSError):  # another process has removed it
                found = one.lstat()
                if NAMES.fullmatch(one.stem) and stat.S_ISREG(found.st_mode):
                    files.append((_age(found.st_mtime), one == new, found.st_size, one))
        total = sum(size for _, _, size, _ in files)
        goal = self._most if len(files) < FEW else self._most * 9 // 10
        for _, _, size, one in sorted(files) if total > self._most else ():
            if total <= goal:
                break
            try:
                one.unlink(missing_ok=True)
            except OSError as error:
                stuck = error
                continue
            total -= size
        self._bytes, self._saves = total, 0
        if stuck is not None and not self._stuck:
            log.warning("%s: states cannot be removed (%s); they take more room than they may", self._path, stuck)
        self._stuck = stuck is not None

    def load(self, name: str) -> State | None:
        """The state of a name, not to be changed; None: there is none.

        A file that is damaged stays, for it may be on its way here: the log says so. What has another name in it,
        or is of another version of dijiang, stays, too.
        """
        if (waiting := self._waiting.get(name)) is not None:
            return waiting
        path = self._path / (name + SUFFIX)
        if not NAMES.fullmatch(name):
            return None
        try:
            data = read_regular(path, LARGEST)
        except (OSError, ValueError):  # it is not there, or cannot be read now, as where a disk is away
            return None
        try:
            kept = Snapshot.parse(data, str(path))
        except VersionError:
            return None
        except InputError as error:
            log.warning("%s; it is taken for none until it is restored", error)
            return None
        if kept.note.made != {NAME: name}:
            return None
        with suppress(OSError):
            path.touch()
        return State.of(kept)

    def _save_next(self, name: str) -> None:
        if (state := self._waiting.get(name)) is not None:  # else written already, under the same name
            self.save(name, state)
            self._waiting.pop(name, None)

    def close(self) -> None:
        """Write what waits."""
        self._writer.shutdown()


def _age(when: float) -> float:
    """What files are removed by, the smallest first. One of the future is from before a clock went back."""
    return when if when <= time.time() else 0.0
