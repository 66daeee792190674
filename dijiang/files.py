"""Writing files and folders: whole or not at all, and never through a link.

A folder is written under a hidden name beside its target, locked by the process that writes it. What a
killed process leaves is found by its free lock, and removed by the next one that writes there.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import DijiangError

#: renameat2 of Linux: both names exchange what they stand for, in one step.
AT_FDCWD, RENAME_EXCHANGE = -100, 2
#: Characters of a target's name in a hidden one: names have 255 bytes at most.
SHORT = 40


def write_file(path: Path, data: bytes, error: type[DijiangError]) -> None:
    """Write a file, or replace it in one step; a link or a hard link at `path` is replaced, not followed.

    Raises:
        error: it cannot be written; what was there before is untouched.
    """
    hidden = f".{path.name[:SHORT]}.{secrets.token_hex(6)}.partial"
    try:
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
            with os.fdopen(os.open(hidden, flags, 0o666, dir_fd=folder), "wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            os.rename(hidden, path.name, src_dir_fd=folder, dst_dir_fd=folder)
            os.fsync(folder)
        finally:
            with suppress(OSError):
                os.unlink(hidden, dir_fd=folder)
            os.close(folder)
    except OSError as reason:
        raise error(
            f"{path}: cannot be written ({reason.strerror or reason}); free some space, or make the folder writable"
        ) from reason


def check_output(target: Path, inputs: Iterable[Path], error: type[DijiangError]) -> None:
    """`error` if a folder to be written is, or contains, one that is read, or is a link."""
    if target.is_symlink():
        raise error(f"{target} is a link, and writing never follows one; give the folder it leads to")
    here = target.resolve()
    for source in inputs:
        if source.resolve() == here or here in source.resolve().parents:
            raise error(f"{target} is or holds {source}, which is read; choose another folder")


@contextmanager
def new_folder(target: Path, error: type[DijiangError]) -> Iterator[Path]:
    """A folder beside the target that takes its name when the block ends well, else vanishes.

    A folder that stands at the target is replaced in that moment, in one step.

    Raises:
        error: the folder cannot be written.
    """
    hidden: Path | None = None
    lock = -1
    try:
        _remove_dead(target)
        hidden, lock = _new_hidden(target)
        yield hidden
        _flush(hidden)
        if target.exists():
            _exchange(hidden, target)
        else:
            hidden.rename(target)
            hidden = None
        _flush_folder(target.parent)
    except OSError as reason:
        raise error(
            f"{target}: cannot be written ({reason.strerror or reason}); "
            "free some space, or choose a folder that exists and is yours"
        ) from reason
    finally:
        if hidden is not None:
            shutil.rmtree(hidden, ignore_errors=True)
        if lock >= 0:
            os.close(lock)
    if hidden is not None and hidden.exists():
        raise error(f"{target} is written, but what it replaced cannot be removed; remove {hidden} yourself")


def _pattern(target: Path) -> str:
    name = "".join(f"[{letter}]" if letter in "*?[" else letter for letter in target.name[:SHORT])
    return f".{name}.*.partial"


def _new_hidden(target: Path) -> tuple[Path, int]:
    """A new hidden folder beside the target, and the descriptor that holds its lock."""
    while True:
        hidden = target.parent / f".{target.name[:SHORT]}.{secrets.token_hex(6)}.partial"
        hidden.mkdir()
        with suppress(FileNotFoundError):  # removed as dead before it was locked: once more
            lock = os.open(hidden, os.O_RDONLY)
            if _try_lock(lock, wait=True) and hidden.exists():
                return hidden, lock
            os.close(lock)


def _remove_dead(target: Path) -> None:
    """Remove what processes left that were killed while they wrote to this target."""
    for hidden in target.parent.glob(_pattern(target)):
        with suppress(OSError):
            lock = os.open(hidden, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                if _try_lock(lock, wait=False):
                    shutil.rmtree(hidden, ignore_errors=True)
            finally:
                os.close(lock)


def _try_lock(descriptor: int, *, wait: bool) -> bool:
    """Whether the lock was taken; it ends with the descriptor. Where there are no locks: not."""
    try:
        import fcntl
    except ImportError:  # Windows, not run: nothing is removed as dead there
        return wait
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return wait  # a file system without locks
    return True


def _exchange(hidden: Path, target: Path) -> None:
    """Swap two folders in one step; where the system cannot, in two renames that end in one of them."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is not None:
        names = (os.fsencode(hidden), os.fsencode(target))
        if rename(AT_FDCWD, names[0], AT_FDCWD, names[1], RENAME_EXCHANGE) == 0:
            return
    old = hidden.with_suffix(".replaced")
    target.rename(old)
    try:
        hidden.rename(target)
    except OSError:
        old.rename(target)
        raise
    old.rename(hidden)


def _flush(folder: Path) -> None:
    """Have every file of a folder on the disk before the folder gets its name."""
    for path in folder.iterdir():
        if path.is_file():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
    _flush_folder(folder)


def _flush_folder(folder: Path) -> None:
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
