"""What else ran on this machine meanwhile."""

from __future__ import annotations

import time
from pathlib import Path

import psutil

#: Percent of all CPUs' time over MOMENT seconds that an idle machine may use.
IDLE, MOMENT = 10, 0.3
#: Field of /proc/stat's first line that counts what the hypervisor gave to other machines.
STOLEN = 7


class Watch:
    """What the machine did since this was made; zeros where Linux does not say."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._waited, self._ticks = _waited(), _ticks()

    def seen(self) -> tuple[float, float]:
        """(waited, stolen) as shares.

        waited: of the time, in which a runnable thread waited for a CPU that another had.
        stolen: of CPU time, that the hypervisor gave to other machines.
        """
        elapsed = time.perf_counter() - self._started
        spent = [after - before for before, after in zip(self._ticks, _ticks(), strict=True)]
        stolen = spent[STOLEN] / sum(spent) if sum(spent) else 0.0
        return round((_waited() - self._waited) / elapsed, 4), round(stolen, 4)


def wait_until_idle(seconds: float) -> None:
    """Return when the CPUs were nearly idle for a moment, or after `seconds`."""
    ending = time.monotonic() + seconds
    while psutil.cpu_percent(MOMENT) > IDLE and time.monotonic() < ending:
        pass


def _waited() -> float:
    """Seconds so far in which some thread waited for a CPU (Linux pressure stall information)."""
    path = Path("/proc/pressure/cpu")
    try:
        return int(path.read_text().split("\n", 1)[0].rpartition("total=")[2]) / 1e6
    except OSError:
        return 0.0


def _ticks() -> list[int]:
    """Ticks of all CPUs by kind, as Linux counts them."""
    path = Path("/proc/stat")
    return [int(n) for n in path.read_text().split("\n", 1)[0].split()[1:9]] if path.is_file() else []
