"""Writing files and folders: whole or not at all, and never through a link.

Everything that dijiang keeps is written here. A file is written under a hidden name in its folder, which is
held by a handle, brought to the disk, and renamed. A folder is written under a hidden name beside its target
and takes its place in one step. What a killed process leaves is found by its free lock and removed by the
next one that writes there.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from .errors import DijiangError
from .hidden import REPLACED, hidden_folder, hidden_name, locked, new_file, recover, sweep

#: renameat2 of Linux: both names exchange what they stand for; nothing is replaced.
AT_FDCWD, RENAME_EXCHANGE, RENAME_NOREPLACE = -100, 2, 1
#: Links that one may lead through, as the system has it.
LINKS = 40
#: What the system says of a disk, or a user's part of it, that is full; and what helps.
FULL, SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "free some space, or choose a folder that is yours"
#: What it says where a file system has no permissions to give: of Windows, of a network, of a card.
NO_PERMISSIONS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)


@contextmanager
def written_file(path: Path, error: type[DijiangError]) -> Iterator[BinaryIO]:
    """A stream whose bytes are the file when the block ends well, else nothing.

    What stood at `path` is replaced in one step; a link or a hard link is replaced, not followed. A file that is
    replaced hands on its permissions.

    Raises:
        error: it cannot be written; what was there before is untouched.
    """
    with _reported(path, error), _opened(path.parent) as folder:
        sweep(path.parent, path.name)
        hidden, descriptor = new_file(folder, path.name)
        try:
            with os.fdopen(descriptor, "wb") as stream:
                yield stream
                stream.flush()
                _take_after(stream.fileno(), path.name, folder)
                os.fsync(stream.fileno())
                os.rename(hidden, path.name, src_dir_fd=folder, dst_dir_fd=folder)
            _flush(folder)
        finally:
            with suppress(OSError):
                os.unlink(hidden, dir_fd=folder)


def write_file(path: Path, data: bytes, error: type[DijiangError]) -> None:
    """Write a file whole or not at all, see `written_file`."""
    with written_file(path, error) as stream:
        stream.write(data)


def check_file(path: Path, error: type[DijiangError]) -> None:
    """`error` where `written_file` could not write, whatever for: to be said before there is something to lose."""
    with _reported(path, error), _opened(path.parent) as folder:
        hidden, descriptor = new_file(folder, path.name)
        try:
            _take_after(descriptor, path.name, folder)
        finally:
            os.close(descriptor)
            os.unlink(hidden, dir_fd=folder)


def move_file(source: Path, path: Path, error: type[DijiangError]) -> None:
    """Give a finished file, on the same disk, its name in one step; what `written_file` says holds.

    Raises:
        error: it cannot be written; what was there before is untouched.
    """
    with _reported(path, error), _opened(path.parent) as folder:
        _settle(source, folder)
        os.rename(source, path.name, dst_dir_fd=folder)
        _flush(folder)


def check_output(target: Path, inputs: Iterable[Path], error: type[DijiangError]) -> None:
    """`error` if a folder to be written is, or contains, something that is read, or is a link.

    A target that a killed process had put aside is brought back first.
    """
    with _reported(target, error):
        recover(target)
        _refuse_link(target, error)
        here = Path(os.path.realpath(target))  # Path.resolve raises RuntimeError for links in a circle
        for source in inputs:
            found = Path(os.path.realpath(source))
            if here == found or here in found.parents:
                raise error(f"{target} is or holds {source}, which is read; choose another folder")


def check_new(
    target: Path, inputs: Iterable[Path], error: type[DijiangError], advice: str = "choose another folder"
) -> None:
    """`check_output`, and `error` with `advice` if anything stands at the target."""
    check_output(target, inputs, error)
    if os.path.lexists(target):
        raise error(f"{target} exists and is never overwritten; {advice}")


@contextmanager
def new_folder(
    target: Path, error: type[DijiangError], *, foreign: Callable[[Path], list[str]] | None = None
) -> Iterator[Path]:
    """A folder beside the target that takes its name when the block ends well, else vanishes.

    Its files get ordinary permissions. Missing parents are made, and vanish with it.

    Args:
        foreign: what a folder at the target holds that may not be lost. A folder without any is replaced in
            one step. None: nothing is ever replaced.

    Raises:
        error: the folder cannot be written, or something stands at the target that may not be lost.
    """
    made: list[Path] = []
    done = False
    try:
        with _reported(target, error):
            _make_parents(target.parent, made)
            recover(target)
            with hidden_folder(target) as hidden:
                with _named(hidden, target):
                    yield hidden
                _settle_all(hidden)
                replaced = _take_place(hidden, target, error, foreign)
                done = True
                for parent in (target.parent, *(path.parent for path in made)):
                    with suppress(OSError), _opened(parent) as folder:
                        _flush(folder)
    finally:
        if not done:
            for parent in reversed(made):
                with suppress(OSError):  # somebody else's folder is in it by now
                    parent.rmdir()
    if replaced and hidden.exists():
        raise error(f"{target} is written, but what it replaced cannot be removed; remove {hidden} yourself")


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder for what one call needs, readable by its user only; OSError if it cannot be made."""
    with hidden_folder(Path(tempfile.gettempdir()) / "dijiang", 0o700) as folder:
        yield folder


def _take_place(
    hidden: Path, target: Path, error: type[DijiangError], foreign: Callable[[Path], list[str]] | None
) -> bool:
    """Rename a finished folder to its target. Whether another was replaced: that has the hidden name then."""
    if foreign is None or not os.path.lexists(target):
        if _rename(hidden, target, RENAME_NOREPLACE):
            return False
        if foreign is None and os.path.lexists(target):
            raise error(f"{target} exists and is never overwritten: it came meanwhile; choose another")
        if foreign is None or not os.path.lexists(target):
            hidden.rename(target)
            return False
    _refuse_link(target, error)
    refuse_foreign(target, foreign(target), error)
    exchange(hidden, target)
    try:
        refuse_foreign(target, foreign(hidden), error)  # what came in at the last moment
    except BaseException:
        exchange(hidden, target)
        raise
    return True


def _refuse_link(target: Path, error: type[DijiangError]) -> None:
    if target.is_symlink():
        raise error(f"{target} is a link, and writing never follows one; give the folder it leads to")


def refuse_foreign(target: Path, names: list[str], error: type[DijiangError]) -> None:
    """`error` if any of these would be lost with the folder at a target."""
    if names:
        raise error(
            f"{target}: {', '.join(names[:4])} {'is' if len(names) == 1 else 'are'} no part of the bundle there, "
            "and would be lost; move it away, or choose another folder"
        )


def exchange(hidden: Path, target: Path) -> None:
    """Swap two folders in one step; where the system cannot, in three renames that a killed process leaves
    to `recover`.
    """
    if _rename(hidden, target, RENAME_EXCHANGE):
        return
    with locked(target, wait=False):  # so that nobody takes it for dead while it is aside
        aside = target.parent / hidden_name(target.name, REPLACED)
        try:
            target.rename(aside)
        except OSError as error:
            if error.errno == errno.EXDEV:  # of an overlay, its lower layers stay as they are
                raise OSError(error.errno, "a folder of a container's image cannot be replaced") from error
            raise
        try:
            hidden.rename(target)
        finally:
            aside.rename(hidden if os.path.lexists(target) else target)


def _rename(first: Path, second: Path, flags: int) -> bool:
    """Rename with flags; False, and nothing done, where the system or the file system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    return bool(rename(AT_FDCWD, os.fsencode(first), AT_FDCWD, os.fsencode(second), flags) == 0)


@contextmanager
def _named(hidden: Path, target: Path) -> Iterator[None]:
    """Errors name a target, not the hidden folder that is to take its place."""
    try:
        yield
    except DijiangError as error:
        if str(hidden) not in str(error):
            raise
        raise type(error)(str(error).replace(str(hidden), str(target))) from error


def _make_parents(folder: Path, made: list[Path]) -> None:
    """Make a folder and its parents; `made` gets those that were missing, the outermost first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        with suppress(FileExistsError):
            path.mkdir()
            made.append(path)


@contextmanager
def _reported(path: Path, error: type[DijiangError]) -> Iterator[None]:
    """What the system refuses, as one line."""
    try:
        unnamed = path.name in ("", "..") or b"\0" in os.fsencode(path)
    except UnicodeEncodeError:
        unnamed = True
    if unnamed:
        raise error(f"{str(path)!r} cannot be the name of a file or folder; give another")
    try:
        yield
    except OSError as reason:
        advice = SPACE if reason.errno in FULL else "choose a folder where you may write"
        raise error(f"{path}: cannot be written ({reason.strerror or reason}); {advice}") from reason


@contextmanager
def _opened(folder: Path) -> Iterator[int]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _take_after(descriptor: int, name: str, folder: int) -> None:
    """Give a new file the owner and the permissions of the one that it replaces.

    OSError if that is a folder, a device or a pipe, or a link to one of these two or into /proc, as /dev/stdout is.
    """
    with suppress(FileNotFoundError):
        old = os.stat(name, dir_fd=folder, follow_symlinks=False)
        if stat.S_ISREG(old.st_mode):
            _give(descriptor, old)
            _permit(descriptor, stat.S_IMODE(old.st_mode))
            return
        if stat.S_ISDIR(old.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        found = os.stat(name, dir_fd=folder).st_mode
        if _leads_to_open(name, folder) or (not stat.S_ISREG(found) and not stat.S_ISDIR(found)):
            raise OSError(errno.EEXIST, "something stands there that is no file")


def _leads_to_open(name: str, folder: int) -> bool:
    """Whether a link leads through /proc: to what a process has open."""
    where = name
    for _ in range(LINKS):
        try:
            link = os.readlink(where, dir_fd=folder)
        except OSError:  # it is none
            return False
        where = os.path.join(os.path.dirname(where), link)
        if where.startswith("/proc/"):
            return True
    return False


def _give(descriptor: int, old: os.stat_result) -> None:
    """Let a new file be of the owner of another one, where that is not so already, and may be."""
    new = os.fstat(descriptor)
    if (new.st_uid, new.st_gid) != (old.st_uid, old.st_gid):
        with suppress(OSError):  # nobody but root may
            os.fchown(descriptor, old.st_uid, old.st_gid)


def _settle_all(path: Path) -> None:
    """Bring a folder and all that is in it to the disk, with the folder's own permissions."""
    with _opened(path) as folder:
        for entry in path.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                with _opened(entry) as inner:
                    _permit(inner, stat.S_IMODE(os.fstat(folder).st_mode))
                _settle_all(entry)
            else:
                _settle(entry, folder)
        _flush(folder)


def _settle(file: Path, folder: int) -> None:
    """Bring a file to the disk, with the permissions that those of its folder stand for.

    One that has another name elsewhere keeps its own: they are those of the other, too.
    """
    descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        if os.fstat(descriptor).st_nlink == 1:
            _permit(descriptor, os.fstat(folder).st_mode & 0o666)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _permit(descriptor: int, mode: int) -> None:
    """Give a file or folder permissions, where its file system has any."""
    try:
        os.fchmod(descriptor, mode)
    except OSError as reason:
        if reason.errno not in NO_PERMISSIONS:
            raise


def _flush(folder: int) -> None:
    """Have the names in a folder on the disk, where its file system can say so."""
    with suppress(OSError):
        os.fsync(folder)
