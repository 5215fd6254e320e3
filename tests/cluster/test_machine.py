from __future__ import annotations

import os
from pathlib import Path

import pytest

from cluster.machine import CPUS_VARIABLE, memory_bytes, num_cpus, num_processes

CORES = len(os.sched_getaffinity(0))
GIB = 2**30


def machine(root: Path, cgroups: str, files: dict[str, str]) -> Path:
    """Files of /proc and /sys as the kernel shows them to a process in `cgroups`."""
    for name, content in {"proc/self/cgroup": cgroups, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content + "\n")
    return root


@pytest.fixture
def five_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """An affinity of five cores, more than the tests' machine may have."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(5)))


def test_num_cpus__follows_the_affinity(tmp_path: Path):
    """As under taskset, or in a scheduler's cpuset."""
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert num_cpus(machine(tmp_path, "0::/", {})) == 1
    finally:
        os.sched_setaffinity(0, before)


@pytest.mark.parametrize(
    ("cgroups", "files"),
    [
        ("0::/", {"sys/fs/cgroup/cpu.max": "200000 100000"}),
        ("0::/", {"sys/fs/cgroup/cpu.max": "150000 100000"}),  # of a second core a half
        ("0::/pod/one", {"sys/fs/cgroup/pod/one/cpu.max": "max 100000", "sys/fs/cgroup/pod/cpu.max": "200000 100000"}),
        ("4:cpu,cpuacct:/", {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "200000", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"}),
        # A container of version 1 sees the path of its host, and its own files at the mount.
        ("4:cpu,cpuacct:/docker/1f\n3:memory:/docker/1f",
         {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "100000", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "50000"}),
    ],
)  # fmt: skip
def test_num_cpus__is_no_more_than_the_quota(five_cores: None, tmp_path: Path, cgroups: str, files: dict[str, str]):
    assert num_cpus(machine(tmp_path, cgroups, files)) == 2


@pytest.mark.parametrize(
    ("cgroups", "files"),
    [
        ("0::/", {"sys/fs/cgroup/cpu.max": "max 100000"}),
        ("0::/../..", {}),
        ("4:cpu:/", {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"}),
        ("4:cpu:/", {}),
    ],
)
def test_num_cpus__without_a_quota_is_the_affinity(
    five_cores: None, tmp_path: Path, cgroups: str, files: dict[str, str]
):
    assert num_cpus(machine(tmp_path, cgroups, files)) == 5
    assert num_cpus(tmp_path / "without_proc") == 5


def test_num_cpus__is_what_a_launcher_gave(five_cores: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(CPUS_VARIABLE, "3")
    assert num_cpus(machine(tmp_path, "0::/", {})) == 3


@pytest.mark.parametrize(
    ("cgroups", "files"),
    [
        ("0::/", {"sys/fs/cgroup/memory.max": str(GIB)}),
        ("0::/a", {"sys/fs/cgroup/a/memory.max": "max", "sys/fs/cgroup/memory.max": str(GIB)}),
        ("4:memory:/", {"sys/fs/cgroup/memory/memory.limit_in_bytes": str(GIB)}),
    ],
)
def test_num_processes__fit_into_the_memory(five_cores: None, tmp_path: Path, cgroups: str, files: dict[str, str]):
    root = machine(tmp_path, cgroups, files)
    assert memory_bytes(root) == GIB
    assert num_processes(root=root) == 2
    assert num_processes(bytes_each=4 * GIB, root=root) == 1


def test_memory_bytes__without_a_limit_is_the_machines(tmp_path: Path):
    unlimited = {"sys/fs/cgroup/memory/memory.limit_in_bytes": str(2**63 - 4096)}
    assert memory_bytes(machine(tmp_path, "4:memory:/", unlimited)) == os.sysconf("SC_PHYS_PAGES") * os.sysconf(
        "SC_PAGE_SIZE"
    )
