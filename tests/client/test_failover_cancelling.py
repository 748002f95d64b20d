"""Cancelling calls of clients of several servers: wherever the call is, it ends, and its endpoint is free."""

from __future__ import annotations

import asyncio
import gc
from typing import TYPE_CHECKING

import pytest
from flywheel_client import AsyncClient, CallCancelledError

from tests.client.conftest import Caller, happened, unavailable
from tests.client.fake_directory import directory_of
from tests.serving import until

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.client.conftest import FakeService


@pytest.mark.parametrize("how", ["cancel", "close the stream", "close the client"])
async def test_cancelling_between_two_tries(caller: Callable[..., Caller], fakes: list[FakeService], how: str) -> None:
    directory = directory_of(fakes[:1])
    one = caller(directory)
    await one.call()
    unavailable(fakes[0])
    directory.answers.clear()
    stream = await one.stream()
    waiting = asyncio.create_task(one.next(stream))
    await until(lambda: directory.readings == 2, "the call waits for the directory")
    if how == "cancel":
        stream.cancel()
    elif how == "close the stream":
        await one.close_stream(stream)
    else:
        await one.close()
    with pytest.raises(CallCancelledError):
        await waiting
    directory.answers.set()
    assert len(fakes[0].requests) == 2


async def test_cancelling_after_a_try_failed_and_before_the_next(
    caller: Callable[..., Caller], fakes: list[FakeService]
) -> None:
    one = caller(directory_of(fakes))
    await one.call()
    for fake in fakes:
        unavailable(fake)
    stream = await one.stream()
    await until(lambda: sum(len(fake.requests) for fake in fakes) == 2, "the call has arrived")
    await until(lambda: all(member.calls == 0 for member in one.pool._members.values()), "the call has failed")
    stream.cancel()
    with pytest.raises(CallCancelledError):
        await one.next(stream)
    assert sum(len(fake.requests) for fake in fakes) == 2


@pytest.mark.parametrize("streamed", [False, True])
async def test_cancelling_a_task_between_two_tries(fakes: list[FakeService], streamed: bool) -> None:
    directory = directory_of(fakes[:1])
    one = Caller(AsyncClient, directory)
    await one.call()
    unavailable(fakes[0])
    directory.answers.clear()
    task = asyncio.create_task(one.next(await one.stream()) if streamed else one.call())
    await until(lambda: directory.readings == 2, "the call waits for the directory")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(fakes[0].requests) == 2
    directory.answers.set()
    await one.close()


async def test_closing_the_client_cancels_the_calls(caller: Callable[..., Caller], fakes: list[FakeService]) -> None:
    for fake in fakes:
        fake.hangs = True
    one = caller(directory_of(fakes))
    stream = await one.stream()
    assert [await one.next(stream), await one.next(stream)] == ["ab", "c"]
    calls = [asyncio.create_task(one.next(stream)), asyncio.create_task(one.call())]
    await until(lambda: sum(len(fake.requests) for fake in fakes) == 2, "both calls have arrived")
    await one.close()
    for call in calls:
        with pytest.raises(CallCancelledError):
            await call
    with pytest.raises(RuntimeError, match="closed"):
        await one.call()


async def test_dropping_a_stream_frees_its_endpoint(caller: Callable[..., Caller], fakes: list[FakeService]) -> None:
    fakes[0].hangs = True
    one = caller(directory_of(fakes[:1]))
    stream = await one.stream()
    assert await one.next(stream) == "ab"
    del stream
    gc.collect()
    await happened(fakes[0].cancelled)
    await until(lambda: all(member.calls == 0 for member in one.pool._members.values()), "the call is over")
