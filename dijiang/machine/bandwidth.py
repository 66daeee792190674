"""Memory bandwidth that this process can read with, measured without a compiler."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from ..errors import InputError
from .limits import available_bytes, usable_cores

#: Far beyond any last-level cache.
BYTES = 1 << 30
#: Pieces that idle threads take: with one piece a thread, the slowest core decides.
PIECES = 32


@dataclass(frozen=True)
class Bandwidth:
    """bytes_per_second: of the fastest pass; passes: seconds of each; size: bytes read in a pass."""

    bytes_per_second: float
    threads: int
    size: int
    passes: tuple[float, ...]


def measure_bandwidth(*, threads: int | None = None, size: int | None = None, passes: int = 10) -> Bandwidth:
    """Read `size` bytes with `threads` threads, as a decode step reads its weights.

    NumPy's maximum of bytes uses the widest vectors that the processor has, lets other threads run, and
    reaches what a compiled loop reaches (tests compare them).

    Args:
        threads: None: as many as usable cores.
        size: bytes; None: 1 GiB, or half of the free memory if that is less.

    Raises:
        InputError: sizes that are not positive.
    """
    threads = threads or usable_cores()
    size = min(BYTES, available_bytes() // 2) if size is None else size
    if min(threads, size, passes) < 1:
        raise InputError(f"threads {threads}, {size} bytes, {passes} passes: expected 1 or more of each")
    pieces = np.array_split(np.ones(size, np.uint8), min(PIECES, size))
    seconds = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(passes):
            started = time.perf_counter()
            list(pool.map(np.maximum.reduce, pieces))
            seconds.append(time.perf_counter() - started)
    total = sum(piece.nbytes for piece in pieces)
    return Bandwidth(total / min(seconds), threads, total, tuple(seconds))


def timed(run: Callable[[], object], moved: int, passes: int = 10) -> Bandwidth:
    """Of a call that moves `moved` bytes on a device and returns when it has; the first call warms up."""
    seconds = []
    for _ in range(passes + 1):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return Bandwidth(moved / float(np.median(seconds[1:])), 1, moved, tuple(seconds[1:]))
