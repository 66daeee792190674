"""Log lines on their way to stderr: a reader that does not read stops nobody."""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

#: Lines that wait, at most; seconds that they have at the end.
MOST, PATIENCE = 10_000, 1.0
STDERR = 2


class Lines(logging.Handler):
    """Writes records in a thread of its own, a line each. Where too many wait, a line is lost, and counted.

    descriptor: where they go. It is written without Python's own buffer: its lock would be held at the end, too.
    """

    def __init__(self, descriptor: int = STDERR, most: int = MOST) -> None:
        super().__init__()
        self._descriptor, self._waiting = descriptor, queue.Queue[str](most)
        #: Lines that nobody got.
        self.lost = 0
        threading.Thread(target=self._write, name="log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        """See logging."""
        try:
            self._waiting.put_nowait(self.format(record))
        except queue.Full:
            self.lost += 1

    def _write(self) -> None:
        while True:
            data = (self._waiting.get() + "\n").encode(errors="backslashreplace")
            try:
                while data:
                    data = data[os.write(self._descriptor, data) :]
            except OSError:  # a full disk, or nobody reads any more
                self.lost += 1
            self._waiting.task_done()

    def drain(self, seconds: float = PATIENCE) -> None:
        """Wait until all is written, but no longer."""
        end = time.monotonic() + seconds
        while self._waiting.unfinished_tasks and time.monotonic() < end:
            time.sleep(0.005)


@contextmanager
def logged() -> Iterator[Lines]:
    """All loggers write to stderr this way, until the block ends."""
    lines, root = Lines(), logging.getLogger()
    root.addHandler(lines)
    try:
        yield lines
    finally:
        root.removeHandler(lines)
        lines.drain()
