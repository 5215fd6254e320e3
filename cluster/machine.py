"""How many cores and how much memory this process may use, which can be less than the machine has.

A process is limited by its affinity (taskset, a scheduler's cpuset), by the quotas of the cgroups around it (a
container's limits, cgroups of version 1 and 2), and by what a launcher gave it (`DICM_CPUS`).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

CPUS_VARIABLE = "DICM_CPUS"  # cores for this process and its children; set for a worker on a Ray cluster
PROCESS_BYTES = 512 * 2**20  # what a process that decodes imports, and one picture of 100 megapixels
ROOT = Path("/")


def num_cpus(root: Path = ROOT) -> int:
    """Cores that this process may use, at least 1; a quota of a part of a core counts as one.

    Args:
        root: where /proc and /sys are.
    """
    given = os.environ.get(CPUS_VARIABLE, "")
    if given.isdecimal() and int(given):
        return int(given)
    quotas = [math.ceil(quota) for folder in _cgroups("cpu", root) if (quota := _cpu_quota(folder)) is not None]
    return max(1, min([len(os.sched_getaffinity(0)), *quotas]))


def memory_bytes(root: Path = ROOT) -> int:
    """Memory of the machine, or the smallest limit of the cgroups around this process, in bytes."""
    limits = [
        int(text)
        for folder in _cgroups("memory", root)
        for name in ("memory.max", "memory.limit_in_bytes")
        if (text := _read(folder / name)).isdecimal()
    ]
    return min([os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), *limits])


def num_processes(bytes_each: int = PROCESS_BYTES, root: Path = ROOT) -> int:
    """How many processes to start where the user did not say: one a core, as far as memory has room, at least 1."""
    return max(1, min(num_cpus(root), memory_bytes(root) // bytes_each))


def _cgroups(controller: str, root: Path) -> Iterator[Path]:
    """Folders of the cgroups that limit this process, the innermost first; some may not be there."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / (controller if controllers else "")
        inside = PurePosixPath(path.lstrip("/"))
        if ".." in inside.parts:  # of a cgroup that this process' namespace does not show
            inside = PurePosixPath()
        for folder in (inside, *inside.parents):
            yield mount / folder


def _cpu_quota(folder: Path) -> float | None:
    """Cores that a cgroup may use in the mean; None where it has no limit."""
    quota, _, period = _read(folder / "cpu.max").partition(" ")
    if not quota:
        quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
    if not quota.isdecimal() or not period.isdecimal():  # "max", "-1", or not there
        return None
    return int(quota) / int(period)


def _read(path: Path) -> str:
    """Text of a small file; empty where the kernel does not show it."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""
