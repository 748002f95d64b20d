"""The bound on what a process may allocate while it loads a model."""

import resource
import sys
from pathlib import Path

import pytest
from flywheel_server.engines.llama_cpp import memory_bound
from flywheel_server.engines.llama_cpp.memory_bound import bounded_memory

MIB = 2**20

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such bound")


def test_an_allocation_beyond_the_free_memory_fails_only_within_the_context(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_bound, "free_memory", lambda: 256 * MIB)
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with bounded_memory(threads=1):
        bytearray(128 * MIB)
        with pytest.raises(MemoryError):
            bytearray(512 * MIB)
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
    bytearray(512 * MIB)


@pytest.mark.parametrize("file", ["MEMINFO", "STATUS"])
@pytest.mark.parametrize(
    "lines", ["", "MemTotal: 8 kB\nSwapFree: 0 kB\nVmSize: 8 kB\n", None], ids=["empty", "others", "missing"]
)
def test_a_kernel_that_does_not_tell_bounds_nothing(
    file: str, lines: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if lines is not None:
        (tmp_path / "file").write_text(lines)
    monkeypatch.setattr(memory_bound, file, tmp_path / "file")
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with bounded_memory(threads=1):
        assert resource.getrlimit(resource.RLIMIT_DATA) == before
