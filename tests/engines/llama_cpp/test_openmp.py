"""How long OpenMP's threads spin while they wait for one another, as the library itself reports it."""

import errno
import os
import re
import subprocess
import sys
import time

import flywheel_server.engines.llama_cpp.llama  # noqa: F401 - loads libgomp
import psutil
import pytest
from flywheel_server.engines.llama_cpp.openmp import SAMPLE_INTERVAL, SPIN_VARIABLES, SpinGuard

from tests.serving import until

# The library prints its own settings. This prints the variables that a child process would inherit.
LOADED = """
import os, flywheel_server.engines.llama_cpp.llama
print({name: os.environ[name] for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY") if name in os.environ})
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="llama.cpp is built with libgomp on Linux")


@pytest.mark.parametrize(
    ("user", "spins"),
    [
        ({}, int(SPIN_VARIABLES["GOMP_SPINCOUNT"])),
        ({"GOMP_SPINCOUNT": ""}, int(SPIN_VARIABLES["GOMP_SPINCOUNT"])),
        ({"GOMP_SPINCOUNT": "123"}, 123),
        ({"GOMP_SPINCOUNT": "0"}, 0),
        ({"OMP_WAIT_POLICY": "passive"}, 0),
        ({"OMP_WAIT_POLICY": "active"}, 30_000_000_000),
    ],
    ids=str,
)
def test_threads_spin_as_told_unless_the_user_has_chosen(user: dict[str, str], spins: int) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("GOMP_", "OMP_"))}
    done = subprocess.run(
        [sys.executable, "-c", LOADED],
        env={**environment, **user, "OMP_DISPLAY_ENV": "verbose"},
        capture_output=True,
        text=True,
        check=True,
    )
    told = re.search(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr)
    assert told
    assert int(told[1]) == spins
    assert done.stdout == f"{user}\n"


def threads() -> int:
    return psutil.Process().num_threads()


async def test_libgomp_has_more_threads_than_cores_while_others_are_busy() -> None:
    busy = 0.0

    failures = iter([OSError(errno.EMFILE, "Too many open files")])

    def used() -> float:
        for failure in failures:
            raise failure
        return busy * time.monotonic()

    looking = threads() + 1
    guard = SpinGuard(max(2, len(os.sched_getaffinity(0))), used)
    # Also before the first measurement.
    await until(lambda: threads() >= looking + 2, "sleeping threads")
    await until(lambda: threads() == looking, "no sleeping threads", within=20 * SAMPLE_INTERVAL)
    busy = 1.0
    await until(lambda: threads() >= looking + 2, "sleeping threads")
    guard.close()
    await until(lambda: threads() == looking - 1, "no thread of the guard")
