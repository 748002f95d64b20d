"""What interrupts the client for threads may use it: a signal handler, or a finalizer that a garbage collection runs."""

import subprocess
import sys
from itertools import product

import pytest

from tests.client.conftest import FakeService

# A finalizer must make no calls, because it may run in grpc's own thread, which would wait for itself.
CASES = [*product(("signal", "finalizer"), ("close", "cancel_stream", "close_stream", "close_results")), ("signal", "call")]
FEW = [("signal", "close"), ("signal", "call"), ("finalizer", "close_stream"), ("signal", "close_results")]
OTHERS = [case for case in CASES if case not in FEW]


def interrupted(fake: FakeService, how: str, what: str, times: int) -> None:
    command = [sys.executable, "-m", "tests.client.interrupted", fake.address, how, what, str(times)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Exception" not in done.stderr, done.stderr


@pytest.mark.parametrize(("how", "what"), [*FEW, *(pytest.param(*case, marks=pytest.mark.thorough) for case in OTHERS)])
def test_what_interrupts_a_call_may_use_its_client(fake: FakeService, how: str, what: str) -> None:
    interrupted(fake, how, what, times=30 if how == "signal" else 15)


@pytest.mark.parametrize(("how", "what"), [pytest.param(*case, marks=pytest.mark.thorough) for case in CASES])
def test_what_interrupts_a_call_at_any_moment_may_use_its_client(fake: FakeService, how: str, what: str) -> None:
    # Garbage collections are rarer, and closing in grpc's own thread, which may run a finalizer, takes a second.
    interrupted(fake, how, what, times=400 if how == "signal" else 40)
