"""Timeouts: what is a number of seconds, what is no deadline, and what is refused, wherever a caller may give one."""

from __future__ import annotations

import math
import sys
from datetime import timedelta
from decimal import Decimal
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import pytest
from flywheel_client import AsyncClient, Client, Retry
from flywheel_client._timeouts import MAX_DEADLINE_SECONDS

from tests.client.command import flywheel
from tests.client.conftest import Caller
from tests.client.fake_directory import FakeDirectory
from tests.thorough import further

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.client.conftest import FakeService

GENERATIONS = ("generate", "generate_deltas", "generate_all")
METHODS = (*GENERATIONS, "model", "stats", "health")
NO_DEADLINE = (
    None,
    math.inf,
    MAX_DEADLINE_SECONDS + 1,
    1e10,
    1e300,
    sys.maxsize,
    10**400,
    Decimal("1e30"),
    Decimal("Infinity"),
)
NEGATIVE = (math.nan, -1, -0.001, -math.inf, -(10**400), Decimal("NaN"), Decimal("sNaN"))
NO_NUMBERS = (True, "5", "inf", b"5", 1j, [5], timedelta(seconds=5), object())
TARGETS: dict[str, Callable[[str], Any]] = {
    "an address": lambda address: address,
    "a list": lambda address: f"ipv4:{address}",
    "a directory": FakeDirectory,
}


class Seconds(float):
    """A float of a type of its own, as NumPy has."""


async def finish(one: Caller, method: str, **arguments: Any) -> None:
    """Makes a call and reads its answer to the end."""
    if method not in GENERATIONS:
        await one.ask(getattr(one.client, method), **arguments)
    elif method == "generate_all":
        await one.ask(one.client.generate_all, "p", max_tokens=1, **arguments)
    elif one.is_async:
        assert [result async for result in getattr(one.client, method)("p", max_tokens=1, **arguments)]
    else:
        assert await one.ask(lambda: list(getattr(one.client, method)("p", max_tokens=1, **arguments)))


@pytest.mark.parametrize("retry", [None, Retry()], ids=["once", "again"])
@pytest.mark.parametrize("target", ["an address", *further(["a list", "a directory"])])
async def test_a_timeout_longer_than_grpc_can_count_is_no_deadline(
    caller: Callable[..., Caller], fake: FakeService, target: str, retry: Retry | None
) -> None:
    one = caller(TARGETS[target](fake.address), retry=retry, timeout=1e-9)
    for timeout in NO_DEADLINE:
        for method in METHODS:
            await finish(one, method, timeout=timeout)
        # The timeout of a client is the timeout of its calls.
        other = caller(TARGETS[target](fake.address), retry=retry, timeout=timeout)
        await finish(other, "generate_all")
        await other.close()
    # Without a deadline, the remaining time of the test's server is None, or the largest number that it has.
    assert all(seconds is None or seconds > MAX_DEADLINE_SECONDS * 1000 for seconds in fake.seconds_remaining)
    assert len(fake.seconds_remaining) == len(NO_DEADLINE) * 4


@pytest.mark.parametrize(
    "number", [50, 50.0, Seconds(50), Decimal(50), Fraction(50), MAX_DEADLINE_SECONDS, 365 * 86400], ids=repr
)
async def test_any_number_of_seconds_is_a_deadline(caller: Callable[..., Caller], fake: FakeService, number: Any) -> None:
    await finish(caller(fake.address), "generate_all", timeout=number)
    await finish(caller(fake.address, timeout=number), "generate_all")
    for seconds in fake.seconds_remaining:
        assert seconds is not None
        assert float(number) - 20 < seconds <= float(number) * 1.01


@pytest.mark.parametrize("retry", [None, Retry()], ids=["once", "again"])
@pytest.mark.parametrize("kind", [Client, AsyncClient])
@pytest.mark.parametrize("target", TARGETS)
async def test_what_is_no_number_of_seconds_is_refused(kind: Any, fake: FakeService, target: str, retry: Retry | None) -> None:
    one = Caller(kind, TARGETS[target](fake.address), retry=retry)
    for timeout, error in (*((value, ValueError) for value in NEGATIVE), *((value, TypeError) for value in NO_NUMBERS)):
        with pytest.raises(error, match="timeout must be "):
            kind(TARGETS[target](fake.address), retry=retry, timeout=timeout)
        for method in METHODS:
            with pytest.raises(error, match="timeout must be "):
                await finish(one, method, timeout=timeout)
    assert not fake.requests
    await one.close()


@pytest.mark.parametrize("name", ["initial_backoff", "max_backoff", "max_delay"])
def test_the_seconds_of_retries_are_read_like_timeouts(name: str) -> None:
    def retry(seconds: Any) -> Retry:
        return Retry(**{name: seconds})

    for number in (Seconds(5), Decimal(5), 5):
        assert getattr(retry(number), name) == 5.0
    for negative in NEGATIVE:
        with pytest.raises(ValueError, match=f"{name}=-?(nan|inf|[0-9])"):
            retry(negative)
    for wrong in (*NO_NUMBERS, None):
        with pytest.raises(TypeError, match=f"{name} must be "):
            retry(wrong)


@pytest.mark.parametrize("name", ["max_attempts", "multiplier"])
@pytest.mark.parametrize("wrong", [None, "5", True, 0, math.nan, 1j])
def test_the_numbers_of_retries(name: str, wrong: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=name):
        Retry(**{name: wrong})


@pytest.mark.parametrize("text", ["inf", "1e10", *further(["1e300", "9223372036854775807"])])
def test_the_command_takes_any_timeout(fake: FakeService, text: str) -> None:
    assert flywheel(fake, "stats", "--timeout", text).returncode == 0


@pytest.mark.parametrize("arguments", [("generate", "p"), *further([("stats",), ("model",), ("health",)])], ids=str)
@pytest.mark.parametrize("text", ["nan", *further(["-inf", "-1", "0", "5s", ""])])
def test_the_command_refuses_what_is_no_timeout(fake: FakeService, arguments: tuple[str, ...], text: str) -> None:
    process = flywheel(fake, *arguments, "--timeout", text)
    assert process.returncode == 2
    assert b"timeout" in process.stderr
    assert b"Traceback" not in process.stderr
    assert not fake.requests
