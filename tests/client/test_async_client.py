"""The client for asyncio, over the wire."""

from __future__ import annotations

import asyncio
import gc
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

import pytest
import pytest_asyncio
from flywheel_client import AsyncClient, AsyncStream, CallCancelledError, DeadlineExceededError, Delta, FlywheelError, Stats

if TYPE_CHECKING:
    import threading
    from collections.abc import AsyncIterator, Coroutine

    from tests.client.conftest import FakeService

WAIT = 20.0
T = TypeVar("T")


@pytest_asyncio.fixture
async def client(fake: FakeService) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(fake.address) as client:
        yield client


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Runs a coroutine with `asyncio.run`, in another thread: in this one, it would take away the event loop of the tests."""
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(asyncio.run, coroutine).result()


async def happened(event: threading.Event) -> bool:
    return await asyncio.to_thread(event.wait, WAIT)


async def test_generate_streams_samples(client: AsyncClient) -> None:
    assert [sample.text async for sample in client.generate("p", max_tokens=2)] == ["abc"]


async def test_generate_deltas_streams_text(client: AsyncClient) -> None:
    async with client.generate_deltas("p", max_tokens=2) as deltas:
        assert [delta async for delta in deltas] == [
            Delta(0, "ab", 1, 0.0, "", 0, ""),
            Delta(0, "c", 2, 1700000000.5, "stop", 5, ""),
        ]
        assert [delta async for delta in deltas] == []


async def test_unary_calls(client: AsyncClient) -> None:
    response = await client.generate_all("p", max_tokens=2)
    assert [sample.text for sample in response.responses] == ["abc"]
    assert (await client.model()).name == "SmolLM2-135M"
    assert await client.stats() == Stats(backlog=3, num_total_runners=1, active=2, queued=1)
    assert await client.health() == "SERVING"


async def test_zero_is_not_unset(fake: FakeService, client: AsyncClient) -> None:
    await client.generate_all("p", max_tokens=1)
    await client.generate_all("p", max_tokens=1, temperature=0.0)
    assert [request.HasField("temperature") for request in fake.requests] == [False, True]


async def test_values_that_no_message_can_hold_name_their_field(client: AsyncClient) -> None:
    with pytest.raises(ValueError, match="max_tokens"):
        client.generate("p", max_tokens=2**40)


async def test_request_id(fake: FakeService, client: AsyncClient) -> None:
    fake.request_id = "theirs"
    stream = client.generate("p", max_tokens=1, request_id="mine")
    assert stream.request_id == "mine"
    assert [sample async for sample in stream]
    assert stream.request_id == "theirs"
    assert fake.metadata[0]["x-request-id"] == "mine"


async def test_timeout_of_the_client_and_of_the_call(fake: FakeService) -> None:
    fake.hangs = True
    async with AsyncClient(fake.address, timeout=0.2) as client:
        with pytest.raises(DeadlineExceededError):
            await client.generate_all("p", max_tokens=1)
        with pytest.raises(DeadlineExceededError):
            assert [delta async for delta in client.generate_deltas("p", max_tokens=1, timeout=0.3)]
    assert await happened(fake.cancelled)


async def test_leaving_an_async_with_block_cancels(fake: FakeService, client: AsyncClient) -> None:
    fake.hangs = True
    async with client.generate_deltas("p", max_tokens=1) as deltas:
        async for _ in deltas:
            break
    assert await happened(fake.cancelled)
    assert [delta async for delta in deltas] == []


async def test_an_exception_cancels(fake: FakeService, client: AsyncClient) -> None:
    fake.hangs = True

    async def fail() -> None:
        async with client.generate_deltas("p", max_tokens=1) as deltas:
            await anext(deltas)
            raise LookupError

    with pytest.raises(LookupError):
        await fail()
    assert await happened(fake.cancelled)


async def test_dropping_the_stream_cancels(fake: FakeService, client: AsyncClient) -> None:
    fake.hangs = True
    async for _ in client.generate_deltas("p", max_tokens=1):
        break
    gc.collect()
    assert await happened(fake.cancelled)


async def test_dropping_the_stream_in_another_thread_cancels(fake: FakeService, client: AsyncClient) -> None:
    fake.hangs = True
    held: list[Any] = [client.generate_deltas("p", max_tokens=1)]
    await anext(held[0])
    await asyncio.to_thread(held.clear)
    assert await happened(fake.cancelled)


@pytest.mark.parametrize("received", [0, 1, 2])
async def test_cancelling_the_task_cancels_the_call(fake: FakeService, client: AsyncClient, received: int) -> None:
    fake.hangs = True
    waiting = asyncio.Event()

    async def read() -> None:
        stream = client.generate_deltas("p", max_tokens=1)
        for _ in range(received):
            await anext(stream)
        waiting.set()
        async for _ in stream:
            pass

    task = asyncio.create_task(read())
    await waiting.wait()
    assert await happened(fake.called)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await happened(fake.cancelled)


async def test_cancelling_the_task_cancels_a_unary_call(fake: FakeService, client: AsyncClient) -> None:
    fake.hangs = True
    task = asyncio.create_task(client.generate_all("p", max_tokens=1))
    assert await happened(fake.called)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await happened(fake.cancelled)


async def test_asyncio_timeout_works_around_a_stream(fake: FakeService, client: AsyncClient) -> None:
    fake.hangs = True

    async def read() -> None:
        async with asyncio.timeout(None) as timeout, client.generate_deltas("p", max_tokens=1) as deltas:
            async for _ in deltas:
                timeout.reschedule(asyncio.get_running_loop().time() + 0.1)

    with pytest.raises(TimeoutError):
        await read()
    assert await happened(fake.cancelled)


async def test_cancel_tells_who_iterates(fake: FakeService, client: AsyncClient) -> None:
    fake.hangs = True
    deltas = client.generate_deltas("p", max_tokens=1)
    await anext(deltas)
    await anext(deltas)
    asyncio.get_running_loop().call_soon(deltas.cancel)
    with pytest.raises(CallCancelledError) as caught:
        await anext(deltas)
    assert caught.value.request_id == deltas.request_id
    assert await happened(fake.cancelled)


async def test_closing_the_client_cancels_and_is_final(fake: FakeService) -> None:
    fake.hangs = True
    client = AsyncClient(fake.address)
    unary = asyncio.create_task(client.generate_all("p", max_tokens=1))
    assert await happened(fake.called)
    stream = client.generate_deltas("p", max_tokens=1)
    assert [(await anext(stream)).text, (await anext(stream)).text] == ["ab", "c"]

    async def read() -> None:
        await anext(stream)

    streamed = asyncio.create_task(read())
    await client.close()
    with pytest.raises(CallCancelledError):
        await unary
    with pytest.raises(CallCancelledError):
        await streamed
    assert await happened(fake.cancelled)
    with pytest.raises(RuntimeError, match="closed"):
        await client.stats()


def test_one_client_in_two_loops(fake: FakeService) -> None:
    client = AsyncClient(fake.address)

    async def texts() -> list[str]:
        return [sample.text async for sample in client.generate("p", max_tokens=2)]

    assert run(texts()) == ["abc"]
    assert run(texts()) == ["abc"]
    assert len(client._channels) == 1
    run(client.close())


def test_a_stream_left_behind_by_its_loop_does_no_harm(fake: FakeService) -> None:
    fake.hangs = True
    client = AsyncClient(fake.address)
    left = []

    async def leave() -> None:
        left.append(client.generate_deltas("p", max_tokens=1))
        await anext(left[0])

    run(leave())
    left.clear()
    assert run(client.stats())
    assert fake.cancelled.wait(WAIT)
    run(client.close())


def test_a_stream_left_behind_by_its_loop_does_not_pass_for_complete(fake: FakeService) -> None:
    fake.hangs = True
    client = AsyncClient(fake.address)

    async def leave() -> AsyncStream[Delta]:
        stream = client.generate_deltas("p", max_tokens=5)
        await anext(stream)
        return stream

    async def go_on(stream: AsyncStream[Delta]) -> None:
        with pytest.raises(RuntimeError, match="another event loop"):
            await anext(stream)
        await stream.aclose()

    run(go_on(run(leave())))


def test_nothing_of_grpc_exists_before_the_first_call() -> None:
    assert not AsyncClient("localhost:1")._channels


async def test_an_unreachable_server(client: AsyncClient) -> None:
    del client
    async with AsyncClient("127.0.0.1:1", retry=None) as unreachable:
        with pytest.raises(FlywheelError) as caught:
            await unreachable.stats()
    assert caught.value.request_id


async def swallow_a_cancellation() -> None:
    """Leaves the running task with a cancellation that it has caught, without calling `uncancel`."""
    task = asyncio.current_task()
    assert task is not None
    task.cancel()
    with suppress(asyncio.CancelledError):
        await asyncio.sleep(WAIT)
    assert task.cancelling()


async def ended_by(cause: str, fake: FakeService, client: AsyncClient, *, swallows: bool, unary: bool) -> BaseException:
    """Returns the exception of a task that waits for an answer when the cause happens."""
    fake.hangs = True
    fake.deltas = []
    streams: list[AsyncStream[Delta]] = []

    async def call() -> None:
        if swallows:
            await swallow_a_cancellation()
        if unary:
            await client.generate_all("p", max_tokens=1)
        else:
            streams.append(client.generate_deltas("p", max_tokens=1))
            await anext(streams[0])

    task = asyncio.create_task(call())
    await happened(fake.called)
    if cause == "cancel":
        streams[0].cancel()
    elif cause == "close":
        await client.close()
    else:
        task.cancel()
        if cause == "both":
            await client.close()
    await asyncio.wait({task}, timeout=WAIT)
    if task.cancelled():
        return asyncio.CancelledError()
    error = task.exception()
    assert error is not None
    return error


@pytest.mark.parametrize("swallows", [False, True], ids=["fresh", "swallowed"])
@pytest.mark.parametrize(
    ("cause", "unary", "kind"),
    [
        ("cancel", False, CallCancelledError),
        ("close", False, CallCancelledError),
        ("close", True, CallCancelledError),
        ("task", False, asyncio.CancelledError),
        ("task", True, asyncio.CancelledError),
        ("both", False, asyncio.CancelledError),
        ("both", True, asyncio.CancelledError),
    ],
)
async def test_the_end_of_a_call_is_not_the_end_of_its_task(
    fake: FakeService, cause: str, unary: bool, kind: type[BaseException], swallows: bool
) -> None:
    async with AsyncClient(fake.address) as client:
        assert type(await ended_by(cause, fake, client, swallows=swallows, unary=unary)) is kind


async def test_a_cancelled_stream_says_so_at_once(fake: FakeService) -> None:
    async with AsyncClient(fake.address) as client:
        stream = client.generate_deltas("p", max_tokens=1)
        assert (await anext(stream)).text == "ab"
        stream.cancel()
        with pytest.raises(CallCancelledError):
            await anext(stream)
