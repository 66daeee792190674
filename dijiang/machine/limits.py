"""Cores and memory that this process may use: the machine's, or less in a container or a systemd slice.

Linux keeps the limits of containers in control groups, which neither psutil nor onnxruntime looks at: a
container with two of 64 cores would get 64 threads, most of them asleep in the middle of a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import psutil

ROOT = Path("/")


def physical_cores() -> int:
    """Of this machine, at least 1; its processors where the kernel does not say which share a core."""
    return psutil.cpu_count(logical=False) or psutil.cpu_count() or 1


def usable_cores(root: Path = ROOT) -> int:
    """Physical cores that this process may use; at least 1. A quota of time counts by whole cores."""
    cores = physical_cores()
    allowed = _allowed(root) if hasattr(psutil.Process, "cpu_affinity") else cores
    return max(1, int(min([cores, allowed, *_limits(root, "cpu", CPU_FILES)])))


def _allowed(root: Path) -> int:
    """Cores of the processors that the affinity names: those that are threads of one core count once."""
    cores = set()
    for cpu in psutil.Process().cpu_affinity():
        threads = root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
        try:
            cores.add(threads.read_text().strip())
        except OSError:
            cores.add(str(cpu))
    return len(cores)


def available_bytes(root: Path = ROOT) -> int:
    """Memory that this process can take without swapping or being killed."""
    return int(min([psutil.virtual_memory().available, *_limits(root, "memory", MEMORY_FILES)]))


def _limits(root: Path, controller: str, files: tuple[Limit, ...]) -> Iterator[float]:
    """What each group says that this process is in, itself or by a group around it."""
    for group in _groups(root, controller):
        for limit in files:
            try:
                found = limit(group)
            except (OSError, ValueError, KeyError):  # not this version's files, or no limit
                continue
            if found >= 0:
                yield found


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Folders of the groups, innermost first. A container may see its own folder as the outermost."""
    mounts = root / "sys/fs/cgroup"
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        outermost = mounts / controller if controllers else mounts  # version 1, version 2
        group = outermost / path.lstrip("/")
        yield from (group, *(p for p in group.parents if p.is_relative_to(outermost)))


def _cores_v2(group: Path) -> float:
    quota, period = (group / "cpu.max").read_text().split()
    return int(quota) / int(period)


def _cores_v1(group: Path) -> float:
    return _number(group / "cpu.cfs_quota_us") / _number(group / "cpu.cfs_period_us")


def _bytes_v2(limit: str, group: Path) -> float:
    used = _number(group / "memory.current") - _file_pages(group, "")
    return max(0, _number(group / limit) - used)


def _bytes_v1(group: Path) -> float:
    used = _number(group / "memory.usage_in_bytes") - _file_pages(group, "total_")
    return max(0, _number(group / "memory.limit_in_bytes") - used)


def _file_pages(group: Path, prefix: str) -> int:
    """Bytes of files in memory, which are dropped where memory is needed."""
    words = (line.split() for line in (group / "memory.stat").read_text().splitlines())
    stat = {name: int(count) for name, count in words}
    return stat[f"{prefix}inactive_file"] + stat[f"{prefix}active_file"]


def _number(file: Path) -> int:
    return int(file.read_text())


#: Of a group's folder: a limit; below 0 there is none.
Limit = Callable[[Path], float]
CPU_FILES: tuple[Limit, ...] = (_cores_v2, _cores_v1)
#: Beyond the first a group's processes are killed, beyond the second they are slowed down.
BYTES_V2 = (partial(_bytes_v2, "memory.max"), partial(_bytes_v2, "memory.high"))
MEMORY_FILES: tuple[Limit, ...] = (*BYTES_V2, _bytes_v1)
