"""Hashes of a bundle's files, chunk by chunk."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ..errors import BundleError

#: Bytes that one hash covers: chunks are hashed side by side, and one that is used can be checked alone.
CHUNK = 1 << 24
#: Bytes read at once.
PIECE = 1 << 20
THREADS = 2


@dataclass(frozen=True)
class FileRecord:
    """Size of a file, bytes, and the sha256 of each of its chunks."""

    bytes: int
    sha256: tuple[str, ...]


def record_file(path: Path) -> FileRecord:
    """Read a file once."""
    size = path.stat().st_size
    with ThreadPoolExecutor(THREADS) as pool:
        return FileRecord(size, tuple(pool.map(lambda start: sha256(path, start, CHUNK), _starts(size))))


def check_file(path: Path, expected: FileRecord, *, hashes: bool) -> None:
    """BundleError unless a file has the size, and the hashes, that the manifest says."""
    size = path.stat().st_size
    if size != expected.bytes:
        raise BundleError(f"{path}: {size:,} bytes, expected {expected.bytes:,}; copy or export the bundle again")
    if not hashes:
        return
    found = record_file(path).sha256
    for start, ours, theirs in zip(_starts(size), found, expected.sha256, strict=False):
        if ours != theirs:
            raise BundleError(
                f"{path}: sha256 {ours[:12]}... from byte {start}, expected {theirs[:12]}...; "
                "copy or export the bundle again"
            )
    if len(found) != len(expected.sha256):
        raise BundleError(f"{path}: {len(expected.sha256)} hashes, expected {len(found)}; export the bundle again")


def _starts(size: int) -> Iterator[int]:
    return iter(range(0, max(size, 1), CHUNK))


def sha256(path: Path, start: int, left: int) -> str:
    """Of so many bytes of a file from a place, or of those that there are."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        stream.seek(start)
        while left and (piece := stream.read(min(PIECE, left))):
            digest.update(piece)
            left -= len(piece)
    return digest.hexdigest()
