"""Cores and memory in containers: recorded layouts of control groups, and this process's affinity."""

import os
import resource

import psutil
import pytest

from dijiang.machine import limits

GB = 10**9


@pytest.fixture(autouse=True)
def large_machine(monkeypatch):
    memory = psutil.virtual_memory()._replace(available=100 * GB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: 64 if logical else 32)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)


@pytest.fixture
def system(tmp_path):
    """system({file: text}): a root with these files."""

    def write(files):
        for name, text in files.items():
            file = tmp_path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"{text}\n")
        return tmp_path

    return write


def v2(group, cpu="max 100000", limit="max", current=0, inactive=0, active=0):
    folder = f"sys/fs/cgroup{group}"
    stat = f"anon 5\ninactive_file {inactive}\nactive_file {active}\nunevictable 0"
    return {
        f"{folder}/cpu.max": cpu,
        f"{folder}/memory.max": limit,
        f"{folder}/memory.current": current,
        f"{folder}/memory.stat": stat,
    }


def test_a_machine_without_control_groups_has_its_own_limits(tmp_path):
    assert (limits.usable_cores(tmp_path), limits.available_bytes(tmp_path)) == (32, 100 * GB)


def test_an_unlimited_group_changes_nothing(system):
    root = system({"proc/self/cgroup": "0::/", **v2("")})
    assert (limits.usable_cores(root), limits.available_bytes(root)) == (32, 100 * GB)


@pytest.mark.parametrize(("quota", "cores"), [(400_000, 4), (250_000, 2), (50_000, 1), (9_900_000, 32)])
def test_whole_cores_of_a_quota_are_usable(system, quota, cores):
    root = system({"proc/self/cgroup": "0::/", **v2("", cpu=f"{quota} 100000")})
    assert limits.usable_cores(root) == cores


def test_files_in_memory_count_as_free(system):
    group = v2("", limit=4 * GB, current=3 * GB, inactive=GB, active=GB // 2)
    assert limits.available_bytes(system({"proc/self/cgroup": "0::/", **group})) == 2.5 * GB


def test_a_full_group_has_nothing_left(system):
    root = system({"proc/self/cgroup": "0::/", **v2("", limit=4 * GB, current=5 * GB)})
    assert limits.available_bytes(root) == 0


def test_the_tightest_of_the_groups_around_counts(system):
    files = {"proc/self/cgroup": "0::/user.slice/app.scope"}
    files |= v2("/user.slice", cpu="300000 100000", limit=8 * GB)
    files |= v2("/user.slice/app.scope", cpu="600000 100000", limit=6 * GB, current=GB)
    root = system(files)
    assert (limits.usable_cores(root), limits.available_bytes(root)) == (3, 5 * GB)


def test_version_1_in_a_container_that_sees_its_folder_as_the_outermost(system):
    root = system(
        {
            "proc/self/cgroup": "4:memory:/docker/1f\n2:cpu,cpuacct:/docker/1f\n1:name=systemd:/",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": 200_000,
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": 100_000,
            "sys/fs/cgroup/memory/memory.limit_in_bytes": 4 * GB,
            "sys/fs/cgroup/memory/memory.usage_in_bytes": 2 * GB,
            "sys/fs/cgroup/memory/memory.stat": f"total_inactive_file {GB}\ntotal_active_file 0",
        }
    )
    assert (limits.usable_cores(root), limits.available_bytes(root)) == (2, 3 * GB)


def test_version_1_without_limits(system):
    root = system(
        {
            "proc/self/cgroup": "4:memory:/\n2:cpu,cpuacct:/",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": -1,
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": 100_000,
            "sys/fs/cgroup/memory/memory.limit_in_bytes": 2**63 - 4096,
            "sys/fs/cgroup/memory/memory.usage_in_bytes": 2 * GB,
            "sys/fs/cgroup/memory/memory.stat": "total_inactive_file 0\ntotal_active_file 0",
        }
    )
    assert (limits.usable_cores(root), limits.available_bytes(root)) == (32, 100 * GB)


def test_memory_from_which_a_group_is_slowed_down_is_a_limit(system):
    files = {"proc/self/cgroup": "0::/", **v2("", limit=8 * GB, current=3 * GB, inactive=GB)}
    root = system(files | {"sys/fs/cgroup/memory.high": 4 * GB})
    assert limits.available_bytes(root) == 2 * GB
    assert limits.available_bytes(system({"sys/fs/cgroup/memory.high": "max"})) == 6 * GB


def test_threads_of_one_core_that_an_affinity_names_are_one_core(monkeypatch, system):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    folder = "sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    root = system({folder.format(cpu): f"{cpu // 2 * 2}-{cpu // 2 * 2 + 1}" for cpu in range(64)})
    assert limits.usable_cores(root) == 2


def test_an_affinity_is_a_limit(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 5, 9}, raising=False)
    assert limits.usable_cores(tmp_path) == 3


def test_an_affinity_that_a_sandbox_does_not_tell_is_no_limit(monkeypatch, tmp_path):
    def refuse(_):
        raise PermissionError

    monkeypatch.setattr(os, "sched_getaffinity", refuse)
    assert limits.usable_cores(tmp_path) == 32


@pytest.mark.parametrize(
    "damage",
    [
        {"proc/self/cgroup": "nothing known"},
        {"proc/self/cgroup": "0::/\n\udcff"},
        {"sys/fs/cgroup/cpu.max": "100000 0"},
        {"sys/fs/cgroup/cpu.max": ""},
        {"sys/fs/cgroup/memory.max": "much"},
    ],
    ids=str,
)
def test_a_group_that_cannot_be_read_is_no_limit(system, damage):
    files = {"proc/self/cgroup": "0::/", **v2("")} | damage
    root = system(dict.fromkeys(files, ""))
    for name, text in files.items():
        (root / name).write_bytes(f"{text}\n".encode(errors="surrogateescape"))
    assert (limits.usable_cores(root), limits.available_bytes(root)) == (32, 100 * GB)


@pytest.mark.parametrize("stat", [None, "", "anon 5", "inactive_file many"])
def test_a_group_that_tells_no_files_keeps_its_limit(system, stat):
    root = system({"proc/self/cgroup": "0::/", **v2("", limit=4 * GB, current=GB)})
    file = root / "sys/fs/cgroup/memory.stat"
    file.unlink() if stat is None else file.write_text(stat)
    assert limits.available_bytes(root) == 3 * GB


def test_addresses_are_a_limit(monkeypatch, system):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (GB, GB))
    page = resource.getpagesize()
    assert limits.available_bytes(system({"proc/self/statm": "1000 900 0 0 0 0 0"})) == GB - 1000 * page


def test_without_proc_the_system_is_asked(monkeypatch, tmp_path):
    def refuse(*_, **__):
        raise FileNotFoundError

    for name in ("virtual_memory", "cpu_count"):
        monkeypatch.setattr(psutil, name, refuse)
    assert 0 < limits.available_bytes(tmp_path) <= limits.total_bytes()
    assert 1 <= limits.physical_cores() <= os.cpu_count()
