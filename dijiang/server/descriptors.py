"""Descriptors: each connection has one, and the system has only so many."""

from __future__ import annotations

import logging
import math
import time
from contextlib import suppress

#: Descriptors taken, at most; seconds between two lines about a lack of them.
MOST, EVERY = 1 << 16, 60


def raise_descriptors() -> None:
    """Take as many descriptors as the system allows, MOST at most."""
    try:
        import resource
    except ImportError:  # Windows
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST if hard == resource.RLIM_INFINITY else min(hard, MOST)
    if soft != resource.RLIM_INFINITY and soft < most:
        with suppress(OSError, ValueError):  # macOS has a limit beside
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


class Scarce(logging.Filter):
    """One line in EVERY seconds where no descriptor is left: asyncio has a traceback for each try to accept.

    After each it listens once more, a second later: that fails where the server ends meanwhile, and is no news.
    """

    def __init__(self) -> None:
        super().__init__()
        self._said = -math.inf

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record is told."""
        text = record.getMessage()
        if "_start_serving" in text:
            return False
        if "accept() out of system resource" not in text:
            return True
        now = time.monotonic()
        if now < self._said + EVERY:
            return False
        self._said, record.exc_info, record.args = now, None, ()
        record.msg = "no descriptor is left for another connection, so clients wait; raise ulimit -n"
        return True
