"""When clients read their directory, and how they follow what it lists."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import grpc
from flywheel_client import DeadlineExceededError, InternalError, UnavailableError, _pool

from tests.client.conftest import Caller, unavailable
from tests.client.fake_directory import FakeDirectory, directory_of
from tests.serving import until

if TYPE_CHECKING:
    from collections.abc import Callable

    import pytest

    from tests.client.conftest import FakeService


async def test_an_endpoint_that_a_new_reading_finds_is_tried(caller: Callable[..., Caller], fakes: list[FakeService]) -> None:
    directory = directory_of(fakes[:1])
    one = caller(directory)
    await one.call()
    unavailable(fakes[0])
    directory.addresses = [fake.address for fake in fakes[:2]]
    assert await one.call() == "p"
    assert [len(fake.requests) for fake in fakes] == [2, 1, 0]
    assert directory.readings == 2


async def test_the_deadline_covers_the_reading(caller: Callable[..., Caller], fakes: list[FakeService]) -> None:
    directory = directory_of(fakes)
    directory.answers.clear()
    one = caller(directory)
    error = await one.expect(DeadlineExceededError, timeout=0.1, request_id="r1")
    assert (error.message, error.request_id) == ("The deadline passed before the client found an endpoint for the call.", "r1")
    assert directory.readings == 1
    directory.answers.set()
    assert await one.call() == "p"


async def test_channels_of_endpoints_that_are_gone_are_closed(
    caller: Callable[..., Caller], fakes: list[FakeService], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_pool, "REFRESH_AFTER_SECONDS", 0.0)
    monkeypatch.setattr(_pool, "MIN_READ_INTERVAL_SECONDS", 0.0)
    fakes[0].hangs = True
    directory = directory_of(fakes)
    one = caller(directory)
    stream = await one.stream()
    assert await one.next(stream) == "ab"
    closed = []
    for member in one.pool._members.values():
        close = member.channel.close
        if one.is_async:

            async def note(close: Any = close, address: str = member.address) -> None:
                closed.append(address)
                await close()
        else:

            def note(close: Any = close, address: str = member.address) -> None:  # type: ignore[misc]
                closed.append(address)
                close()

        member.channel.close = note
    directory.addresses = [fakes[2].address]

    async def is_listed_no_more() -> bool:
        await one.call()
        return closed == [fakes[1].address]

    await until(is_listed_no_more, "the idle channel is closed")
    assert await one.next(stream) == "c"
    await one.close_stream(stream)
    await until(lambda: closed == [fakes[1].address, fakes[0].address], "the other is closed after its call")
    assert list(one.pool._members) == [fakes[2].address]
    assert not one.pool._dropped
    assert len(one.pool.channels()) == 1


async def test_an_old_reading_is_renewed_while_calls_go_on(
    caller: Callable[..., Caller], fakes: list[FakeService], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = directory_of(fakes[:1])
    one = caller(directory)
    await one.call()
    await one.call()
    assert directory.readings == 1
    monkeypatch.setattr(_pool, "REFRESH_AFTER_SECONDS", 0.0)
    monkeypatch.setattr(_pool, "MIN_READ_INTERVAL_SECONDS", 0.0)
    directory.addresses = [fakes[1].address]
    directory.answers.clear()
    # The directory does not answer, and no call waits for it.
    await one.call()
    await one.call()
    assert (len(fakes[0].requests), directory.readings) == (4, 2)
    directory.answers.set()

    async def moved() -> bool:
        await one.call()
        return bool(fakes[1].requests)

    await until(moved, "calls go to the new endpoint")


async def test_a_call_after_a_long_pause_waits_for_a_reading(
    caller: Callable[..., Caller], fakes: list[FakeService], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = directory_of(fakes[:1])
    one = caller(directory)
    await one.call()
    directory.addresses = [fakes[1].address]
    monkeypatch.setattr(_pool, "MAX_AGE_SECONDS", -1.0)
    await one.call()
    assert [len(fake.requests) for fake in fakes] == [1, 1, 0]


async def test_known_endpoints_serve_while_the_directory_cannot_be_read(
    caller: Callable[..., Caller], fakes: list[FakeService], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = directory_of(fakes)
    one = caller(directory)
    await one.call()
    directory.error = UnavailableError(grpc.StatusCode.UNAVAILABLE, "the directory is down")
    monkeypatch.setattr(_pool, "MAX_AGE_SECONDS", -1.0)
    assert await one.call() == "p"
    fakes[1].stop()
    fakes[2].stop()
    for _ in range(3):
        assert await one.call() == "p"


async def test_no_endpoint(caller: Callable[..., Caller], fakes: list[FakeService]) -> None:
    directory = FakeDirectory()
    one = caller(directory)
    error = await one.expect(UnavailableError, "nothing is live")
    assert error.request_id == ""
    assert directory.readings == 2
    directory.addresses = [fakes[0].address]
    assert await one.call() == "p"


async def test_the_error_of_the_directory(caller: Callable[..., Caller]) -> None:
    directory = FakeDirectory()
    directory.error = InternalError(grpc.StatusCode.INTERNAL, "the directory is down")
    await caller(directory).expect(InternalError, "the directory is down")


async def test_many_calls_share_one_reading(caller: Callable[..., Caller], fakes: list[FakeService]) -> None:
    directory = directory_of(fakes)
    directory.answers.clear()
    one = caller(directory)
    calls = [asyncio.create_task(one.call()) for _ in range(8)]
    await until(lambda: directory.readings == 1, "it is read")
    directory.answers.set()
    assert await asyncio.gather(*calls) == ["p"] * 8
    assert directory.readings == 1
