"""Cores and memory that this process may use: the machine's, or less in a container or a systemd slice.

Linux keeps the limits of containers in control groups, which neither psutil nor onnxruntime looks at: a
container with two of 64 cores would get 64 threads, most of them asleep in the middle of a step.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import psutil

from .kernel_files import text_of

ROOT = Path("/")
#: Bytes of a page of memory.
PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096


def physical_cores() -> int:
    """Of this machine, at least 1; its processors where the kernel does not say which share a core."""
    with suppress(OSError):  # there is no /proc
        return psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
    return os.cpu_count() or 1


def usable_cores(root: Path = ROOT) -> int:
    """Physical cores that this process may use; at least 1. A quota of time counts by whole cores."""
    return max(1, int(min([physical_cores(), *_allowed(root), *_limits(root, "cpu", CPU_FILES)])))


def _allowed(root: Path) -> Iterator[int]:
    """Cores of the processors that the affinity names: those that are threads of one core count once."""
    try:
        named = os.sched_getaffinity(0)
    except (AttributeError, OSError):  # Windows, macOS; a sandbox
        return
    cores = set()
    for cpu in named:
        threads = root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
        try:
            cores.add(threads.read_text().strip())
        except OSError:
            cores.add(str(cpu))
    yield len(cores)


def available_bytes(root: Path = ROOT) -> int:
    """Memory that this process can take without swapping, being killed or refused."""
    try:
        free = psutil.virtual_memory().available
    except OSError:  # there is no /proc
        free = os.sysconf("SC_AVPHYS_PAGES") * PAGE
    return int(min([free, *_limits(root, "memory", MEMORY_FILES), *_addresses(root)]))


def total_bytes() -> int:
    """Memory of this machine."""
    with suppress(OSError):  # there is no /proc
        return int(psutil.virtual_memory().total)
    return os.sysconf("SC_PHYS_PAGES") * PAGE


def _addresses(root: Path) -> Iterator[int]:
    """What `ulimit -v` leaves."""
    try:
        import resource

        most = resource.getrlimit(resource.RLIMIT_AS)[0]
        taken = int((root / "proc/self/statm").read_text().split()[0]) * PAGE
    except (ImportError, OSError, ValueError, IndexError):  # Windows; there is no /proc
        return
    if most != resource.RLIM_INFINITY:
        yield max(0, most - taken)


def _limits(root: Path, controller: str, files: tuple[Limit, ...]) -> Iterator[float]:
    """What each group says that this process is in, itself or by a group around it."""
    for group in _groups(root, controller):
        for limit in files:
            try:
                found = limit(group)
            except (OSError, ValueError, ZeroDivisionError):  # not this version's files, or no limit
                continue
            if found >= 0:
                yield found


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Folders of the groups, innermost first. A container may see its own folder as the outermost."""
    mounts = root / "sys/fs/cgroup"
    try:
        text = (root / "proc/self/cgroup").read_text(errors="surrogateescape")
    except OSError:
        return
    for controllers, path in re.findall(r"^\d+:([^:\n]*):(.*)$", text, re.MULTILINE):
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
    """Bytes of files in memory, which are dropped where memory is needed; 0 where the group does not say."""
    stat = text_of(group / "memory.stat")
    return sum(map(int, re.findall(rf"^{prefix}(?:in)?active_file (\d+)$", stat, re.MULTILINE)))


def _number(file: Path) -> int:
    return int(file.read_text())


#: Of a group's folder: a limit; below 0 there is none.
Limit = Callable[[Path], float]
CPU_FILES: tuple[Limit, ...] = (_cores_v2, _cores_v1)
#: Beyond the first a group's processes are killed, beyond the second they are slowed down.
BYTES_V2 = (partial(_bytes_v2, "memory.max"), partial(_bytes_v2, "memory.high"))
MEMORY_FILES: tuple[Limit, ...] = (*BYTES_V2, _bytes_v1)
