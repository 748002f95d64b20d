"""How OpenMP's threads wait for one another, as the library itself tells that it was told."""

import os
import re
import subprocess
import sys

import pytest
from flywheel_server.engines.openmp import SPINS

# What the library was told, then what a child of the process would be told.
LOADED = """
import os, flywheel_server.engines.llama
print({name: os.environ[name] for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY") if name in os.environ})
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="llama.cpp is built with libgomp on Linux")


@pytest.mark.parametrize(
    ("user", "spins"),
    [
        ({}, SPINS),
        ({"GOMP_SPINCOUNT": ""}, SPINS),
        ({"GOMP_SPINCOUNT": "123"}, 123),
        ({"GOMP_SPINCOUNT": "0"}, 0),
        ({"OMP_WAIT_POLICY": "passive"}, 0),
        ({"OMP_WAIT_POLICY": "active"}, 30_000_000_000),
    ],
    ids=str,
)
def test_threads_spin_for_a_moment_unless_the_user_has_chosen(user: dict[str, str], spins: int) -> None:
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
