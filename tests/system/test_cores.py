"""How many cores and how much memory a process may use, by its affinity and by control groups of both versions."""

import math
import os
import re
import signal
import sys
from pathlib import Path

import pytest
from flywheel_server.system import cores, memory
from flywheel_server.system.cgroups import cpu_quota, free_memory, memory_limit
from flywheel_server.system.cores import usable_cores
from flywheel_server.system.memory import total_memory

from tests.server.test_command import command, ready_line

V2 = "{root} {point} rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate"
V1_CPU = "{root} {point}/cpu rw,nosuid - cgroup cgroup rw,cpu,cpuacct"
V1_MEMORY = "{root} {point}/memory rw,nosuid - cgroup cgroup rw,memory"
V1_CPUSET = "{root} {point}/cpuset rw,nosuid - cgroup cgroup rw,cpuset"
GIB = 2**30


def process(root: Path, cgroup: str, mounts: list[str], mount_root: str, files: dict[str, str]) -> Path:
    """Returns the directory in procfs of a process whose groups have these files."""
    groups = root / "sys fs"
    for name, text in files.items():
        file = groups / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")
    proc = root / "proc"
    proc.mkdir()
    (proc / "cgroup").write_text(cgroup + "\n")
    point = str(groups).replace(" ", r"\040")
    lines = ["27 1 254:0 / / rw,relatime - ext4 /dev/vda rw"]
    lines += [f"31 23 0:28 {mount.format(root=mount_root, point=point)}" for mount in mounts]
    (proc / "mountinfo").write_text("\n".join(lines) + "\n")
    return proc


@pytest.mark.parametrize(
    ("groups", "quota"),
    [
        pytest.param(("0::/", [V2], "/", {"cpu.max": "150000 100000"}), 1.5, id="container of v2"),
        pytest.param(("0::/", [V2], "/", {"cpu.max": "max 100000"}), math.inf, id="no quota"),
        pytest.param(("0::/", [V2], "/", {"cgroup.procs": "1"}), math.inf, id="root of the host"),
        pytest.param(("0::/a/b", [V2], "/", {"a/b/cpu.max": "50000 100000", "a/cpu.max": "max 100000"}), 0.5, id="own group"),
        pytest.param(
            ("0::/a/b", [V2], "/", {"a/b/cpu.max": "max 100000", "a/cpu.max": "200000 100000"}), 2.0, id="group above"
        ),
        pytest.param(
            ("0::/a/b", [V2], "/", {"a/b/cpu.max": "3000 1000", "a/cpu.max": "2000 1000"}), 2.0, id="lesser one above"
        ),
        pytest.param(
            ("0::/a/b", [V2], "/", {"a/b/cpu.max": "2000 1000", "a/cpu.max": "3000 1000"}), 2.0, id="lesser one below"
        ),
        pytest.param(("0::/a", [V2], "/", {"a/cpu.max": "2000 1000", "b/cpu.max": "1000 1000"}), 2.0, id="another group"),
        pytest.param(("0::/pods/x", [V2], "/pods/x", {"cpu.max": "4000 1000"}), 4.0, id="path of the host"),
        pytest.param(("0::/pods/x/y", [V2], "/pods/x", {"y/cpu.max": "4000 1000"}), 4.0, id="below a path of the host"),
        pytest.param(("0::/../other", [V2], "/", {"cpu.max": "4000 1000"}), 4.0, id="beyond the namespace"),
        pytest.param(("0::/a:b", [V2], "/", {"a:b/cpu.max": "1000 1000"}), 1.0, id="colon"),
        pytest.param(
            (
                "5:cpuset:/s\n4:cpu,cpuacct:/a/b\n0::/",
                [V1_CPUSET, V1_CPU, V2],
                "/",
                {
                    "cpu/a/b/cpu.cfs_quota_us": "-1",
                    "cpu/a/b/cpu.cfs_period_us": "100000",
                    "cpu/a/cpu.cfs_quota_us": "250000",
                    "cpu/a/cpu.cfs_period_us": "100000",
                },
            ),
            2.5,
            id="v1 beside v2",
        ),
        pytest.param(
            (
                "4:cpu,cpuacct:/docker/x",
                [V1_CPU],
                "/docker/x",
                {"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "50000"},
            ),
            2.0,
            id="container of v1",
        ),
        pytest.param(("4:cpu:/", [V1_CPU], "/", {"cpu/cpu.cfs_quota_us": "-1"}), math.inf, id="no quota of v1"),
        pytest.param(("1:name=systemd:/", ["/ /x rw - cgroup cgroup rw,name=systemd"], "/", {}), math.inf, id="no controller"),
        pytest.param(("0::/", [V2], "/", {"cpu.max": ""}), math.inf, id="empty"),
        pytest.param(("nonsense", [V2], "/", {"cpu.max": "1000 1000"}), math.inf, id="nonsense"),
    ],
)
def test_the_least_quota_of_all_groups_counts(
    tmp_path: Path, groups: tuple[str, list[str], str, dict[str, str]], quota: float
) -> None:
    assert cpu_quota(process(tmp_path, *groups)) == quota


def test_without_procfs_there_is_no_limit(tmp_path: Path) -> None:
    assert all(read(tmp_path / "none") == math.inf for read in (cpu_quota, free_memory, memory_limit))


@pytest.mark.parametrize(
    ("cgroup", "mounts", "files", "expected"),
    [
        pytest.param(
            "0::/a/b",
            [V2],
            {
                "a/memory.max": str(4 * GIB),
                "a/memory.current": str(3 * GIB),
                "a/memory.stat": f"anon {GIB // 2}\nfile {2 * GIB + GIB // 2}\nshmem {GIB // 2}",
                "a/b/memory.max": "max",
                "a/b/memory.current": str(GIB),
                "a/b/memory.stat": f"anon {GIB}\nfile 0",
            },
            (4 * GIB, 3 * GIB),
            id="v2",
        ),
        pytest.param(
            "7:memory:/a",
            [V1_MEMORY],
            {
                "memory/a/memory.limit_in_bytes": str(2 * GIB),
                "memory/a/memory.usage_in_bytes": str(GIB),
                "memory/a/memory.stat": "cache 0\ntotal_cache 4096",
            },
            (2 * GIB, GIB + 4096),
            id="v1",
        ),
        pytest.param("0::/", [V2], {"memory.stat": "file 1"}, (math.inf, math.inf), id="root of the host"),
    ],
)
def test_cached_files_count_as_free_memory(
    tmp_path: Path, cgroup: str, mounts: list[str], files: dict[str, str], expected: tuple[float, float]
) -> None:
    proc = process(tmp_path, cgroup, mounts, "/", files)
    assert (memory_limit(proc), free_memory(proc)) == expected


def test_the_limit_of_the_groups_counts_if_the_machine_has_more_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = total_memory()
    assert GIB // 2 < machine < math.inf
    monkeypatch.setattr(memory, "memory_limit", lambda: 4096)
    assert total_memory() == 4096


@pytest.mark.parametrize(("quota", "usable"), [(0.2, 1), (1.0, 1), (1.5, 1), (2.0, 2), (3.9, 3), (8.0, 4), (math.inf, 4)])
def test_whole_cores_of_the_quota_count_within_the_mask(monkeypatch: pytest.MonkeyPatch, quota: float, usable: int) -> None:
    monkeypatch.setattr(cores, "_affinity", lambda: 4)
    monkeypatch.setattr(cores, "cpu_quota", lambda: quota)
    assert usable_cores() == usable


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no affinity mask")
async def test_a_server_on_one_core_computes_with_one_thread() -> None:
    async with command(
        "--address=127.0.0.1:0", "--embedded-context=256", setup=f"taskset -pc {min(os.sched_getaffinity(0))} $$ >&2"
    ) as process:
        await ready_line(process)
        process.send_signal(signal.SIGTERM)
        _, stderr = await process.communicate()
    assert re.search(rb"model loaded.* threads=1\b", stderr)
