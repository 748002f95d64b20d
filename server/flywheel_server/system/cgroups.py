"""Reads the limits of Linux control groups for this process, in versions 1 and 2: see cgroups(7).

Containers are limited by them: `docker --cpus` and `--memory`, limits of Kubernetes, `systemd-run -p CPUQuota=`. The limit
of a group applies to the groups inside it too, so the smallest limit on the way up to the root counts.

Libraries that read these limits read only the root group, or include much else, such as a pool of processes.
"""

import math
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Final

PROC: Final = Path("/proc/self")
"""The directory of this process in procfs. Some systems do not have it."""


def cpu_quota(proc: Path = PROC) -> float:
    """Returns how many cores a process may keep busy; infinity if its groups have no quota."""
    return min(map(_quota, _groups("cpu", proc)), default=math.inf)


def memory_limit(proc: Path = PROC) -> float:
    """Returns how many bytes of memory a process may use; infinity if its groups have no limit."""
    return min(map(_limit, _groups("memory", proc)), default=math.inf)


def free_memory(proc: Path = PROC) -> float:
    """Returns how many more bytes of memory a process may use; infinity if its groups have no limit.

    Cached files do not count as used memory, because the kernel can drop them. Files in a tmpfs count: they are only there.
    """
    return min(map(_free, _groups("memory", proc)), default=math.inf)


def _groups(controller: str, proc: Path) -> Iterator[Path]:
    """Yields the directories of the groups in which a controller limits the process, from its own group up to the root."""
    with suppress(OSError, ValueError):
        paths = dict(_paths(controller, (proc / "cgroup").read_text()))
        for line in (proc / "mountinfo").read_text().splitlines():
            # As in proc_pid_mountinfo(5): `36 35 98:0 ROOT MOUNT-POINT … - TYPE SOURCE OPTIONS`.
            mount, _, file_system = line.partition(" - ")
            root, mount_point = map(_unescaped, mount.split()[3:5])
            kind, _, options = file_system.split(" ", 2)
            if kind not in paths or (kind == "cgroup" and controller not in options.split(",")):
                continue
            path = PurePosixPath(paths[kind])
            # In a container, the path may be the one on the host, but the container sees only its own group.
            within = path.relative_to(root) if path.is_relative_to(root) else PurePosixPath()
            yield from (Path(mount_point, part) for part in (within, *within.parents))


def _paths(controller: str, cgroup: str) -> Iterator[tuple[str, str]]:
    """Yields the file system type and the path of each group that /proc/PID/cgroup lists for a controller."""
    for line in cgroup.splitlines():
        hierarchy, controllers, path = line.split(":", 2)
        if hierarchy == "0":
            yield "cgroup2", path
        elif controller in controllers.split(","):
            yield "cgroup", path


def _unescaped(field: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), field)


def _quota(group: Path) -> float:
    with suppress(OSError, ValueError):
        quota, period = (group / "cpu.max").read_text().split()
        return math.inf if quota == "max" else int(quota) / int(period)
    with suppress(OSError, ValueError):
        quota, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return math.inf if int(quota) < 0 else int(quota) / int(period)
    return math.inf


def _limit(group: Path) -> float:
    for name in ("memory.max", "memory.limit_in_bytes"):
        # Without a limit, version 2 has the word "max", and version 1 a very large number.
        with suppress(OSError, ValueError):
            return int((group / name).read_text())
    return math.inf


def _free(group: Path) -> float:
    for used, cached, in_tmpfs in (
        ("memory.current", "file", "shmem"),
        ("memory.usage_in_bytes", "total_cache", "total_shmem"),
    ):
        with suppress(OSError, ValueError, KeyError):
            statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            reclaimable = int(statistics[cached]) - int(statistics.get(in_tmpfs, "0"))
            return _limit(group) - int((group / used).read_text()) + reclaimable
    return math.inf
