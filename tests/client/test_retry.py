"""Calls that fail before the engine began on them are tried again: the decisions, and both clients over the wire."""

from __future__ import annotations

import asyncio
import time
from math import inf
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from flywheel_client import (
    AsyncClient,
    CallCancelledError,
    DeadlineExceededError,
    FlywheelError,
    InternalError,
    ResourceExhaustedError,
    Retry,
    UnavailableError,
)
from flywheel_client._calls_async import AsyncRetryingChannel
from flywheel_client._calls_sync import RetryingChannel
from flywheel_client._retry import BACKOFF_JITTER, Tries, is_retryable
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo

from tests.client.conftest import WAIT, Caller, serving_fake, unavailable
from tests.serving import until

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.client.conftest import FakeService

QUICK = Retry(initial_backoff=0.01)
UNAVAILABLE = UnavailableError(grpc.StatusCode.UNAVAILABLE, "stopping")


def later(seconds: float) -> UnavailableError:
    return UnavailableError(grpc.StatusCode.UNAVAILABLE, "starting", retry_delay=seconds)


def refuse(fake: FakeService, code: grpc.StatusCode, retry_delay: float | None = None, reason: str = "") -> None:
    """Has the server refuse every generation."""
    fake.refuses = True
    delay = Duration()
    delay.FromNanoseconds(round((retry_delay or 0) * 1e9))
    details = [] if retry_delay is None else [RetryInfo(retry_delay=delay)]
    fake.fail(code, "not now", *details, *([ErrorInfo(reason=reason)] if reason else []))


def test_backoffs_grow_up_to_a_limit_and_are_spread() -> None:
    retry = Retry(max_attempts=6, initial_backoff=1.0, max_backoff=5.0, multiplier=2.0)
    for jitter, factor in ((0.0, 1 - BACKOFF_JITTER), (0.5, 1.0), (1.0, 1 + BACKOFF_JITTER)):
        tries = Tries.begin(retry, None, now=0.0)
        delays = [tries.delay(UNAVAILABLE, 0.0, jitter) for _ in range(6)]
        assert delays == [*(pytest.approx(backoff * factor) for backoff in (1.0, 2.0, 4.0, 5.0, 5.0)), None]


def test_backoffs_may_grow_to_their_limit_at_once() -> None:
    tries = Tries.begin(Retry(initial_backoff=1.0, max_backoff=5.0, multiplier=inf), None, now=0.0)
    assert [tries.delay(UNAVAILABLE, 0.0, 0.5) for _ in range(3)] == [1.0, 5.0, 5.0]


def test_the_delay_that_a_server_asks_for_is_never_cut_short() -> None:
    retry = Retry(max_attempts=4, initial_backoff=1.0, max_backoff=2.0)
    for jitter in (0.0, 0.5, 1.0):
        tries = Tries.begin(retry, None, now=0.0)
        delays = [tries.delay(later(30.0), 0.0, jitter) for _ in range(3)]
        assert delays == [30.0 + jitter, 30.0 + 2 * jitter, 30.0 + 2 * jitter]


def test_a_server_that_asks_for_too_long_a_wait_gets_no_second_attempt() -> None:
    tries = Tries.begin(Retry(max_delay=60.0), None, now=0.0)
    assert tries.delay(later(60.0), 0.0, 0.0) == 60.0
    assert tries.delay(later(60.1), 0.0, 0.0) is None


def test_no_delay_goes_beyond_the_deadline() -> None:
    tries = Tries.begin(Retry(), 10.0, now=100.0)
    assert tries.delay(later(9.0), 101.0, 0.0) is None
    assert tries.attempts == 1
    assert tries.delay(later(8.0), 101.0, 0.0) == 8.0
    assert tries.remaining(109.0) == 1.0


def test_waiting_for_an_endpoint_is_not_an_attempt() -> None:
    for retry in (None, Retry(max_attempts=1)):
        assert Tries.begin(retry, None, 0.0).delay(UNAVAILABLE, 0.0, 0.5, tried=False) is None
        tries = Tries.begin(retry, None, 0.0, wait_for_ready=True)
        assert [tries.delay(UNAVAILABLE, 0.0, 0.5, tried=False) for _ in range(6)] == [0.25, 0.5, 1.0, 2.0, 4.0, 5.0]
        assert tries.delay(UNAVAILABLE, 0.0, 0.5) is None


def test_endpoints_share_the_attempts_of_a_call() -> None:
    dead = UnavailableError(grpc.StatusCode.UNAVAILABLE, "failed to connect to all addresses; last error: refused")
    tries = Tries.begin(Retry(max_attempts=3, initial_backoff=1.0), None, 0.0)
    tries.error = dead
    assert [tries.delay(dead, 0.0, 0.5, to_blame=True) for _ in range(9)] == [0.0] * 9
    assert tries.delay(UNAVAILABLE, 0.0, 0.5, to_blame=True) == 0.0
    # No endpoint is left. The round has been counted.
    assert tries.delay(dead, 0.0, 0.5, tried=False) == 1.0
    assert tries.attempts == 1
    tries.error = dead
    assert tries.delay(dead, 0.0, 0.5, tried=False) == 2.0
    assert tries.attempts == 2
    assert tries.delay(UNAVAILABLE, 0.0, 0.5, to_blame=True) is None
    assert Tries.begin(None, None, 0.0).delay(dead, 0.0, 0.5, to_blame=True) is None


@pytest.mark.parametrize("code", grpc.StatusCode, ids=lambda code: code.name)
def test_which_errors_are_retryable(code: grpc.StatusCode) -> None:
    bare, delayed, explained = (FlywheelError(code, "", **fields) for fields in ({}, {"retry_delay": 1.0}, {"reason": "WHY"}))
    expected = {
        grpc.StatusCode.UNAVAILABLE: (True, True, True),
        grpc.StatusCode.RESOURCE_EXHAUSTED: (False, True, False),
        grpc.StatusCode.CANCELLED: (True, True, False),
    }
    assert tuple(map(is_retryable, (bare, delayed, explained))) == expected.get(code, (False, False, False))


@pytest.mark.parametrize(
    "wrong",
    [{"max_attempts": 0}, {"initial_backoff": -1.0}, {"max_backoff": -1.0}, {"max_delay": -1.0}, {"multiplier": 0.5}],
    ids=str,
)
def test_invalid_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        Retry(**wrong)


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_call_is_tried_again_under_its_id_and_deadline(
    caller: Callable[..., Caller], fake: FakeService, streamed: bool
) -> None:
    unavailable(fake)
    fake.recovers_after = 2
    one = caller(fake.address, retry=Retry(initial_backoff=0.15))
    if streamed:
        stream = await one.stream(request_id="same", timeout=5.0)
        assert [await one.next(stream), await one.next(stream), await one.next(stream)] == ["ab", "c", None]
    else:
        assert await one.call(request_id="same", timeout=5.0) == "p"
    assert [metadata["x-request-id"] for metadata in fake.metadata] == ["same"] * 3
    first, _, third = fake.seconds_remaining
    assert first is not None
    assert third is not None
    # On the wire, grpc rounds a deadline by up to three hundredths.
    assert third < first - 0.2


async def test_a_server_sees_at_most_max_attempts(caller: Callable[..., Caller], fake: FakeService) -> None:
    unavailable(fake)
    error = await caller(fake.address, retry=QUICK).expect(UnavailableError, "stopping", request_id="r1")
    assert (error.reason, error.request_id) == ("ENGINE_UNAVAILABLE", "r1")
    assert len(fake.requests) == 2 * QUICK.max_attempts
    await caller(fake.address, retry=None).expect(UnavailableError)
    assert len(fake.requests) == 2 * QUICK.max_attempts + 2


async def test_the_server_says_when_to_try_again(caller: Callable[..., Caller], fake: FakeService) -> None:
    refuse(fake, grpc.StatusCode.RESOURCE_EXHAUSTED, retry_delay=0.2)
    fake.recovers_after = 2
    assert await caller(fake.address, retry=QUICK).call() == "p"
    first, second, third = fake.arrivals
    assert second - first >= 0.2
    assert third - second >= 0.2


@pytest.mark.parametrize(
    ("code", "kind"),
    [(grpc.StatusCode.RESOURCE_EXHAUSTED, ResourceExhaustedError), (grpc.StatusCode.INTERNAL, InternalError)],
    ids=lambda value: getattr(value, "name", None),
)
async def test_what_would_fail_again_is_not_repeated(
    caller: Callable[..., Caller], fake: FakeService, code: grpc.StatusCode, kind: type[FlywheelError]
) -> None:
    refuse(fake, code, reason="ENGINE_FAILED" if code is grpc.StatusCode.INTERNAL else "")
    await caller(fake.address, retry=QUICK).expect(kind)
    assert len(fake.requests) == 2


async def test_a_call_that_a_stopping_server_cancelled_is_tried_again(caller: Callable[..., Caller], fake: FakeService) -> None:
    refuse(fake, grpc.StatusCode.CANCELLED)
    fake.recovers_after = 1
    one = caller(fake.address, retry=QUICK)
    assert await one.call() == "p"
    fake.recovers_after = 3
    assert await one.next(await one.stream()) == "ab"
    assert len(fake.requests) == 4


async def test_a_stream_is_never_repeated_after_its_first_message(caller: Callable[..., Caller], fake: FakeService) -> None:
    fake.fail(grpc.StatusCode.UNAVAILABLE, "gone", RetryInfo())
    one = caller(fake.address, retry=QUICK)
    stream = await one.stream()
    assert [await one.next(stream), await one.next(stream)] == ["ab", "c"]
    with pytest.raises(UnavailableError, match="gone"):
        await one.next(stream)
    assert await one.next(stream) is None
    assert len(fake.requests) == 1


async def test_a_call_fails_at_once_if_the_next_attempt_would_be_after_its_deadline(
    caller: Callable[..., Caller], fake: FakeService
) -> None:
    refuse(fake, grpc.StatusCode.UNAVAILABLE, retry_delay=30.0)
    begun = time.monotonic()
    error = await caller(fake.address).expect(UnavailableError, timeout=25.0)
    assert error.retry_delay == 30.0
    assert time.monotonic() - begun < 10
    assert len(fake.requests) == 2


async def test_one_deadline_ends_the_last_attempt(caller: Callable[..., Caller], fake: FakeService) -> None:
    refuse(fake, grpc.StatusCode.UNAVAILABLE, retry_delay=0.3)
    fake.recovers_after = 1
    fake.hangs = True
    begun = time.monotonic()
    with pytest.raises(DeadlineExceededError):
        await caller(fake.address).call(timeout=0.6)
    assert 0.5 < time.monotonic() - begun < 5
    assert len(fake.requests) == 2


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds of each wait between two attempts, added when the wait begins."""
    begun: list[float] = []
    for kind in (RetryingChannel, AsyncRetryingChannel):

        def pause(self: Any, call: Any, seconds: float, pause: Any = kind.pause) -> Any:
            if seconds:
                begun.append(seconds)
            return pause(self, call, seconds)

        monkeypatch.setattr(kind, "pause", pause)
    return begun


@pytest.mark.parametrize("how", ["cancel", "close the stream", "close the client"])
async def test_a_wait_ends_when_the_call_is_cancelled(
    caller: Callable[..., Caller], fake: FakeService, pauses: list[float], how: str
) -> None:
    refuse(fake, grpc.StatusCode.UNAVAILABLE, retry_delay=1e11)
    one = caller(fake.address, retry=Retry(max_delay=1e12))
    stream = await one.stream()
    waiting = asyncio.create_task(one.next(stream))
    await until(lambda: len(pauses) == 1, "the call waits")
    if how == "cancel":
        stream.cancel()
    elif how == "close the stream":
        await one.close_stream(stream)
    else:
        await one.close()
    with pytest.raises(CallCancelledError) as caught:
        await asyncio.wait_for(waiting, WAIT)
    assert caught.value.request_id == stream.request_id
    assert len(fake.requests) == 1


async def test_closing_the_client_ends_the_wait_of_a_unary_call(
    caller: Callable[..., Caller], fake: FakeService, pauses: list[float]
) -> None:
    refuse(fake, grpc.StatusCode.UNAVAILABLE, retry_delay=1e11)
    one = caller(fake.address, retry=Retry(max_delay=1e12))
    waiting = asyncio.create_task(one.call())
    await until(lambda: len(pauses) == 1, "the call waits")
    await one.close()
    with pytest.raises(CallCancelledError):
        await asyncio.wait_for(waiting, WAIT)
    assert len(fake.requests) == 1


@pytest.mark.parametrize("streamed", [False, True])
async def test_cancelling_a_task_ends_its_wait(fake: FakeService, pauses: list[float], streamed: bool) -> None:
    refuse(fake, grpc.StatusCode.UNAVAILABLE, retry_delay=0.3)
    one = Caller(AsyncClient, fake.address)
    before = asyncio.all_tasks()
    task = asyncio.create_task(one.next(await one.stream()) if streamed else one.call())
    await until(lambda: len(pauses) == 1, "the call waits")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: len(asyncio.all_tasks() - before) <= 1, "nothing but grpc's own task is left")
    assert len(fake.requests) == 1
    await one.close()


async def test_a_server_that_restarts_on_its_port_is_found_again(
    caller: Callable[..., Caller], pauses: list[float], free_port: int
) -> None:
    with serving_fake(port=free_port) as first:
        one = caller(first.address)
        assert await one.call() == "p"
    calls = [asyncio.create_task(one.call()), asyncio.create_task(one.next(await one.stream()))]
    await until(lambda: len(pauses) >= 2, "both calls wait")
    assert not any(call.done() for call in calls)
    begun = time.monotonic()
    with serving_fake(port=free_port) as second:
        assert await asyncio.gather(*calls) == ["p", "ab"]
        assert time.monotonic() - begun < 5
        assert len(second.requests) == 2
        await one.close()
