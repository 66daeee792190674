"""What else ran on this machine meanwhile."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

#: Percent of all CPUs' time over MOMENT seconds that an idle machine may use.
IDLE, MOMENT = 10, 0.3
#: Kinds of CPU time that are no part of others: what guests took, behind them, is part of `user`.
KINDS = 8


class Watch:
    """What the machine did since this was made; zeros where Linux does not say."""

    def __init__(self) -> None:
        self._started, self._waited, self._times = time.perf_counter(), _waited(), _times()

    def seen(self) -> tuple[float, float]:
        """(waited, stolen) as shares.

        waited: of the time, in which a runnable thread waited for a CPU that another had.
        stolen: of CPU time, that the hypervisor gave to other machines.
        """
        elapsed, now = time.perf_counter() - self._started, _times()
        stolen = getattr(now, "steal", 0.0) - getattr(self._times, "steal", 0.0)
        spent = sum(now[:KINDS]) - sum(self._times[:KINDS])
        return round((_waited() - self._waited) / elapsed, 4), round(stolen / spent, 4) if spent else 0.0


def wait_until_idle(seconds: float) -> None:
    """Return when the CPUs were nearly idle for a moment, or after `seconds`."""
    ending = time.monotonic() + seconds
    with suppress(OSError):  # there is no /proc
        while psutil.cpu_percent(MOMENT) > IDLE and time.monotonic() < ending:
            pass


def _times() -> Any:
    """Seconds of all CPUs so far, by kind; empty where Linux does not say."""
    with suppress(OSError):
        return psutil.cpu_times()
    return ()


def _waited() -> float:
    """Seconds so far in which some thread waited for a CPU (Linux pressure stall information)."""
    path = Path("/proc/pressure/cpu")
    try:
        return int(path.read_text().split("\n", 1)[0].rpartition("total=")[2]) / 1e6
    except OSError:
        return 0.0
