"""What is not finished: hidden names that are unique, locked by who writes, and swept when that one is dead.

A name is `.NAME.HASH-RANDOM.partial`: the start of the target's name, a hash of all of it, a random number.
The lock is on the file or folder itself and ends with the process, however that ends. Where the system has
no locks nothing is taken for dead.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

#: Characters of a target's name in a hidden one: names have 255 bytes at most.
SHORT = 40
#: Being written; and put aside for the moment in which another takes its place.
PARTIAL, REPLACED = ".partial", ".replaced"
OURS = re.compile(rf"\..{{0,{SHORT}}}\.[0-9a-f]{{8}}-[0-9a-f]{{12}}(\{PARTIAL}|\{REPLACED})", re.DOTALL)


def hidden_name(name: str, end: str = PARTIAL) -> str:
    """A new hidden name for a target."""
    return f"{_start(name)}{secrets.token_hex(6)}{end}"


def _start(name: str) -> str:
    return f".{name[:SHORT]}.{hashlib.sha256(os.fsencode(name)).hexdigest()[:8]}-"


def lock(descriptor: int, *, wait: bool) -> bool | None:
    """Whether the lock was taken, which ends with the descriptor; None: the system has no locks."""
    try:
        import fcntl
    except ImportError:  # Windows, not run
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:  # the file system has none
        return None
    return True


def stands(path: Path, descriptor: int) -> bool:
    """Whether a path still names what was opened."""
    with suppress(OSError):
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    return False


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold the lock of what stands at a path. wait: until nobody else has it; else it may stay theirs.

    Raises:
        OSError: nothing stands there.
    """
    while True:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            lock(descriptor, wait=wait)
            if stands(path, descriptor):
                yield
                return
        finally:
            os.close(descriptor)


def sweep(folder: Path, name: str | None = None) -> None:
    """Remove what killed processes left in a folder, for a target of this name; None: for any."""
    for path in _hidden(folder, name):
        with _claimed(path) as dead:
            if dead:
                remove(path)


def recover(target: Path) -> None:
    """Give a target its name back if a process was killed that had put it aside."""
    for path in _hidden(target.parent, target.name):
        if path.suffix == REPLACED:
            with _claimed(path) as dead:
                if dead and not os.path.lexists(target):
                    path.rename(target)


def remove(path: Path) -> None:
    """Remove a file or a folder, as far as that goes."""
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def _hidden(folder: Path, name: str | None) -> list[Path]:
    start = "." if name is None else _start(name)
    with suppress(OSError):
        return [folder / n for n in os.listdir(folder) if n.startswith(start) and OURS.fullmatch(n)]
    return []


@contextmanager
def _claimed(path: Path) -> Iterator[bool]:
    """Whether nobody alive has the lock of a path; it is ours until the block ends."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        yield False
        return
    try:
        yield bool(lock(descriptor, wait=False)) and stands(path, descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def hidden_folder(target: Path, mode: int = 0o777) -> Iterator[Path]:
    """A new folder beside a target, removed when the block ends unless it was renamed.

    Raises:
        OSError: it cannot be made.
    """
    sweep(target.parent, target.name)
    while True:
        path = target.parent / hidden_name(target.name)
        path.mkdir(mode=mode)
        descriptor = -1
        try:
            with suppress(FileNotFoundError):  # swept before it was locked: once more
                descriptor = os.open(path, os.O_RDONLY)
                lock(descriptor, wait=True)
            if descriptor >= 0 and stands(path, descriptor):
                yield path
                return
        finally:
            remove(path)
            if descriptor >= 0:
                os.close(descriptor)


def new_file(folder: int, name: str) -> tuple[str, int]:
    """A new file for a target in an opened folder: its hidden name, and its locked descriptor.

    Raises:
        OSError: it cannot be made.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    while True:
        hidden = hidden_name(name)
        descriptor = os.open(hidden, flags, 0o666, dir_fd=folder)
        lock(descriptor, wait=True)
        if os.fstat(descriptor).st_nlink:
            return hidden, descriptor
        os.close(descriptor)  # swept before it was locked: once more
