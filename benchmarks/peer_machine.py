"""The machine of a run: what else it did meanwhile, and what it is."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from typing import Any

import psutil

from dijiang.machine.describe import describe_machine, installed

#: Percent of all CPUs' time over MOMENT seconds that an idle machine may use.
IDLE, MOMENT = 10, 0.3


class Watch:
    """What the machine did since this was made; zeros where Linux does not say."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._waited, self._ticks = _waited(), _ticks()

    def seen(self) -> dict[str, float]:
        """`waited`: share of the time in which a runnable thread waited for a CPU that another had.
        `stolen`: share of CPU time that the hypervisor gave to other machines.
        """
        elapsed = time.perf_counter() - self._started
        spent = [after - before for before, after in zip(self._ticks, _ticks(), strict=True)]
        stolen = spent[7] / sum(spent) if sum(spent) else 0.0
        return {"waited": round((_waited() - self._waited) / elapsed, 4), "stolen": round(stolen, 4)}


def wait_until_idle(seconds: float) -> None:
    """Return when the CPUs were nearly idle for a moment, or after `seconds`."""
    ending = time.monotonic() + seconds
    while psutil.cpu_percent(MOMENT) > IDLE and time.monotonic() < ending:
        pass


def _waited() -> float:
    """Seconds so far in which some thread waited for a CPU (Linux pressure stall information)."""
    path = Path("/proc/pressure/cpu")
    return int(path.read_text().split("\n", 1)[0].rpartition("total=")[2]) / 1e6 if path.is_file() else 0.0


def _ticks() -> list[int]:
    """Ticks of all CPUs by kind, as Linux counts them."""
    path = Path("/proc/stat")
    return [int(n) for n in path.read_text().split("\n", 1)[0].split()[1:9]] if path.is_file() else []


def environment() -> dict[str, Any]:
    """Machine, versions and commit."""
    commit = subprocess.run(
        ("git", "describe", "--always", "--dirty", "--exclude", "*"),
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent,
    )
    machine = describe_machine()
    machine["packages"] |= installed(("transformers", "gguf"))
    return machine | {"commit": commit.stdout.strip()}
