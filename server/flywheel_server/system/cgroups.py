"""What the control groups of Linux leave this process of the machine, in versions 1 and 2: see cgroups(7).

Containers are bounded so: `docker --cpus` and `--memory`, limits of Kubernetes, `systemd-run -p CPUQuota=`. A limit of a group
bounds the groups in it too, so the least one on the way up to the root counts.

Libraries that know these limits read those of the root group only, or bring a pool of processes along.
"""

import math
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Final

PROC: Final = Path("/proc/self")


def cpu_quota(proc: Path = PROC) -> float:
    """Return how many cores a process may keep busy; infinity if its groups have no quota.

    Arguments:
        proc: The directory of the process in procfs; there may be none.
    """
    return min(map(_quota, _groups("cpu", proc)), default=math.inf)


def memory_limit(proc: Path = PROC) -> float:
    """Return how many bytes of memory a process may take; infinity if its groups have no limit.

    Arguments:
        proc: The directory of the process in procfs; there may be none.
    """
    return min(map(_limit, _groups("memory", proc)), default=math.inf)


def free_memory(proc: Path = PROC) -> float:
    """Return how many bytes of memory a process may take in addition; infinity if its groups have no limit.

    Files that the kernel has cached make room, so they do not count as taken, but those in a tmpfs do: they are nowhere else.

    Arguments:
        proc: The directory of the process in procfs; there may be none.
    """
    return min(map(_free, _groups("memory", proc)), default=math.inf)


def _groups(controller: str, proc: Path) -> Iterator[Path]:
    """Yield the directories of the groups in which a controller bounds the process, from its own up to the root."""
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
            # In a container, the path may be that on the host, of which the container sees nothing but its own group.
            within = path.relative_to(root) if path.is_relative_to(root) else PurePosixPath()
            yield from (Path(mount_point, part) for part in (within, *within.parents))


def _paths(controller: str, cgroup: str) -> Iterator[tuple[str, str]]:
    """Yield the type of file system and the path of each group that /proc/PID/cgroup has for a controller."""
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
        # Without a limit, version 2 says "max", which is no number; version 1 has an unreachable one.
        with suppress(OSError, ValueError):
            return int((group / name).read_text())
    return math.inf


def _free(group: Path) -> float:
    for taken, cached, in_tmpfs in (
        ("memory.current", "file", "shmem"),
        ("memory.usage_in_bytes", "total_cache", "total_shmem"),
    ):
        with suppress(OSError, ValueError, KeyError):
            statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            makes_room = int(statistics[cached]) - int(statistics.get(in_tmpfs, "0"))
            return _limit(group) - int((group / taken).read_text()) + makes_room
    return math.inf
