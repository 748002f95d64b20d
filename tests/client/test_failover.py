"""Clients of several servers, which come and go: over the wire, and in both clients alike."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from flywheel_client import AsyncClient, Client, DeadlineExceededError, InternalError, Retry, UnavailableError, _pool
from flywheel_proto.v1 import generation_pb2
from flywheel_server.engines.scripted import Script, ScriptedEngine
from google.rpc.error_details_pb2 import ErrorInfo

from tests.client.conftest import WAIT, Caller, happened, unavailable
from tests.client.fake_directory import FakeDirectory, directory_of
from tests.serving import serving, through_a_cable, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from tests.client.conftest import FakeService


async def test_calls_one_after_another_go_round(caller: Callable[..., Caller], fakes: list[FakeService]) -> None:
    one = caller(directory_of(fakes))
    for _ in range(6):
        await one.call()
        assert await one.next(await one.stream()) == "ab"
    assert [len(fake.requests) for fake in fakes] == [4, 4, 4]


async def test_a_call_goes_where_the_fewest_are(caller: Callable[..., Caller], fakes: list[FakeService]) -> None:
    one = caller(directory_of(fakes))
    for fake in fakes[:2]:
        fake.hangs = True
    streams = [await one.stream() for _ in range(3)]
    for stream in streams:
        assert await one.next(stream) == "ab"
    await one.rest(streams[2])
    for _ in range(4):
        await one.call()
    assert [len(fake.requests) for fake in fakes] == [1, 1, 5]
    await one.close_stream(streams[0])
    await until(lambda: sorted(member.calls for member in one.pool._members.values()) == [0, 0, 1], "the call is over")


async def test_a_refused_connection_moves_the_call(caller: Callable[..., Caller], fakes: list[FakeService]) -> None:
    one = caller(directory_of(fakes))
    fakes[0].stop()
    fakes[1].stop()
    for _ in range(3):
        assert await one.call() == "p"
        assert await one.next(await one.stream()) == "ab"
    assert len(fakes[2].requests) == 6


async def test_what_a_draining_server_refuses_goes_elsewhere(caller: Callable[..., Caller], fakes: list[FakeService]) -> None:
    one = caller(directory_of(fakes))
    unavailable(fakes[0])
    unavailable(fakes[1])
    assert await one.call(request_id="same") == "p"
    assert await one.next(await one.stream()) == "ab"
    assert [fake.metadata[0]["x-request-id"] for fake in fakes] == ["same"] * 3
    # The two endpoints that refused the calls are the last choice for a while.
    for _ in range(4):
        await one.call()
    assert [len(fake.requests) for fake in fakes] == [1, 1, 6]


async def test_calls_for_many_prompts_and_for_tokens_go_elsewhere_too(
    caller: Callable[..., Caller], fakes: list[FakeService]
) -> None:
    one = caller(directory_of(fakes))
    unavailable(fakes[0])
    unavailable(fakes[1])
    assert (await one.ask(one.client.tokenize, "a b")).prompt_tokens == 2
    results = one.client.generate_many(["0", "1", "2"], concurrency=2, max_tokens=1)
    found = [await (anext(results) if one.is_async else one.ask(next, results)) for _ in range(3)]
    assert {result.position: result.response.prompt for result in found} == {0: "0", 1: "1", 2: "2"}


@asynccontextmanager
async def behind_cables(fakes: list[FakeService]) -> AsyncIterator[list[tuple[str, Callable[[], None]]]]:
    async with AsyncExitStack() as stack:
        cables = [await stack.enter_async_context(through_a_cable(fake.address)) for fake in fakes]
        yield [(cable.address, cable.cut) for cable in cables]


async def test_a_cut_before_the_headers_moves_the_call(caller: Callable[..., Caller], fakes: list[FakeService]) -> None:
    fakes[0].holds = True
    async with behind_cables(fakes[:1]) as cables:
        one = caller(FakeDirectory(cables[0][0]))
        stream = await one.stream()
        waiting = asyncio.create_task(one.next(stream))
        unary = asyncio.create_task(one.call())
        await until(lambda: len(fakes[0].requests) == 2, "both calls have arrived")
        one.client._connection.target.addresses = [fakes[2].address]
        cables[0][1]()
        assert await waiting == "ab"
        assert await unary == "p"
        assert stream.request_id in {metadata["x-request-id"] for metadata in fakes[2].metadata}
        await one.close()


async def test_one_endpoint_alone_is_tried_again_after_a_cut(caller: Callable[..., Caller], fakes: list[FakeService]) -> None:
    fakes[0].holds = True
    async with behind_cables(fakes[:1]) as cables:
        directory = FakeDirectory(cables[0][0])
        one = caller(directory)
        unary = asyncio.create_task(one.call())
        await happened(fakes[0].called)
        fakes[0].holds = False
        cables[0][1]()
        assert await unary == "p"
        assert len(fakes[0].requests) == 2
        assert 2 <= directory.readings <= 3
        await one.close()


async def test_a_call_that_has_delivered_is_not_repeated(caller: Callable[..., Caller], fakes: list[FakeService]) -> None:
    for fake in fakes[:2]:
        fake.hangs = True
    async with behind_cables(fakes[:2]) as cables:
        one = caller(FakeDirectory(*(address for address, _ in cables)))
        stream = await one.stream()
        assert await one.next(stream) == "ab"
        for _, cut in cables:
            cut()
        with pytest.raises(UnavailableError):
            await one.rest(stream)
        assert await one.next(stream) is None
        assert sum(len(fake.requests) for fake in fakes) == 1
        await one.close()


async def test_other_failures_are_not_repeated(caller: Callable[..., Caller], fakes: list[FakeService]) -> None:
    for fake in fakes:
        fake.deltas = []
        fake.fail(grpc.StatusCode.INTERNAL, "the engine failed", ErrorInfo(reason="ENGINE_FAILED", domain="flywheel.v1"))
    one = caller(directory_of(fakes))
    await one.expect(InternalError)
    assert sum(len(fake.requests) for fake in fakes) == 2


async def test_every_endpoint_is_tried_once_and_the_last_error_stands(
    caller: Callable[..., Caller], fakes: list[FakeService]
) -> None:
    for fake in fakes:
        unavailable(fake)
    one = caller(directory_of(fakes), retry=Retry(max_attempts=3))
    error = await one.expect(UnavailableError, "stopping", request_id="r1")
    assert (error.reason, error.request_id) == ("ENGINE_UNAVAILABLE", "r1")
    assert [len(fake.requests) for fake in fakes] == [2, 2, 2]


async def test_all_endpoints_are_tried_again_after_a_while(caller: Callable[..., Caller], fakes: list[FakeService]) -> None:
    for fake in fakes:
        unavailable(fake)
        fake.recovers_after = 2
    one = caller(directory_of(fakes), retry=Retry(max_attempts=7, initial_backoff=0.01))
    assert await one.call(request_id="same") == "p"
    assert sorted(len(fake.requests) for fake in fakes) == [2, 2, 3]
    assert {metadata["x-request-id"] for fake in fakes for metadata in fake.metadata} == {"same"}


async def test_a_call_may_wait_until_there_is_an_endpoint(caller: Callable[..., Caller], fakes: list[FakeService]) -> None:
    directory = FakeDirectory()
    one = caller(directory, retry=Retry(max_attempts=1, initial_backoff=0.01), wait_for_ready=True)
    calls = [asyncio.create_task(one.call()), asyncio.create_task(one.call(timeout=WAIT))]
    await until(lambda: directory.readings > 6, "they wait")
    await one.expect(UnavailableError, "nothing is live", wait_for_ready=False)
    hurried = caller(directory, retry=Retry(initial_backoff=1000.0, max_backoff=1000.0), wait_for_ready=True, timeout=100.0)
    await hurried.expect(UnavailableError, "nothing is live")
    directory.addresses = [fakes[0].address]
    assert await asyncio.gather(*calls) == ["p", "p"]


async def test_one_deadline_holds_for_all_tries(caller: Callable[..., Caller], fakes: list[FakeService]) -> None:
    unavailable(fakes[0])
    fakes[1].hangs = True
    # Which of the two is found first, and gets the first try, is chance.
    while not fakes[0].seconds_remaining:
        fakes[1].cancelled.clear()
        directory = directory_of(fakes[:2])
        directory.answers.clear()
        one = caller(directory, timeout=100.0)
        asyncio.get_running_loop().call_later(0.3, directory.answers.set)
        with pytest.raises(DeadlineExceededError):
            await one.call(timeout=0.6)
        await happened(fakes[1].cancelled)
    first, second = fakes[0].seconds_remaining[0], fakes[1].seconds_remaining[-1]
    assert first is not None
    assert second is not None
    # Not `second < first`: gRPC rounds the deadline that it sends, by more than the time between the two tries.
    assert max(first, second) < 0.35
    fakes[1].deltas = []
    with pytest.raises(DeadlineExceededError):
        await one.next(await one.stream(timeout=0.1))


async def test_streams_begin_before_they_are_iterated_over(caller: Callable[..., Caller], fakes: list[FakeService]) -> None:
    one = caller(directory_of(fakes))
    streams = [await one.stream() for _ in range(3)]
    await until(lambda: [len(fake.requests) for fake in fakes] == [1, 1, 1], "all have begun")
    for stream in streams:
        await one.close_stream(stream)


async def test_the_servers_own_drain_moves_calls_and_lets_the_running_one_finish(caller: Callable[..., Caller]) -> None:
    slow = ScriptedEngine(Script(token_delay=0.02))
    async with AsyncExitStack() as stack:
        other = await stack.enter_async_context(serving(ScriptedEngine()))
        draining = serving(slow, drain_timeout=30)
        target = await draining.__aenter__()
        directory = FakeDirectory(target.address)
        one = caller(directory)
        stream = await one.stream()
        assert await one.next(stream)
        directory.addresses.append(other.address)
        stopping = asyncio.create_task(draining.__aexit__(None, None, None))
        for _ in range(3):
            assert await one.call() == "p"
        await one.rest(stream)
        await stopping
        assert await one.call() == "p"
        await one.close()


async def test_eight_threads_notice_nothing_while_servers_stop_and_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_pool, "REFRESH_AFTER_SECONDS", 0.01)
    engine = ScriptedEngine(Script(text="abc", bytes_per_token=1))
    directory = FakeDirectory()
    texts: Counter[str] = Counter()
    errors: list[BaseException] = []
    stopped = threading.Event()

    def work(client: Client) -> None:
        try:
            while not stopped.is_set():
                with client.generate_deltas("p", max_tokens=3) as deltas:
                    texts["".join(delta.text for delta in deltas)] += 1
                texts[client.generate_all("p", max_tokens=3).responses[0].text] += 1
        except BaseException as error:  # noqa: BLE001 - the test looks at it
            errors.append(error)

    async with serving(engine) as first:
        directory.addresses = [first.address]
        client: Any = Client(directory)
        with client:
            threads = [threading.Thread(target=work, args=(client,)) for _ in range(8)]
            for thread in threads:
                thread.start()
            for _ in range(3):
                async with serving(engine, drain_timeout=30) as other:
                    directory.addresses.append(other.address)

                    def gone_on(enough: int = texts.total() + 50) -> bool:
                        return bool(errors) or texts.total() > enough

                    await until(gone_on, "calls go on")
                directory.addresses.remove(other.address)
            stopped.set()
            await asyncio.gather(*(asyncio.to_thread(thread.join, WAIT) for thread in threads))
            assert not errors
            assert set(texts) == {"abc"}
            await until(
                lambda: all(member.calls == 0 for member in client._channels[False]._pool._members.values()), "all is over"
            )


def test_one_client_in_two_loops(fakes: list[FakeService]) -> None:
    client = AsyncClient(directory_of(fakes))

    async def call() -> str:
        return (await client.generate_all("p", max_tokens=1)).prompt

    results: list[str] = []
    for _ in range(2):
        thread = threading.Thread(target=lambda: results.append(asyncio.run(call())))
        thread.start()
        thread.join(WAIT)
    assert results == ["p", "p"]


def test_a_client_of_one_target_may_try_nothing_again(fakes: list[FakeService]) -> None:
    unavailable(fakes[0])
    with Client(fakes[0].address, retry=None) as client, pytest.raises(UnavailableError):
        client.generate_all("p", max_tokens=1)
    assert fakes[0].requests == [generation_pb2.GenerationRequest(text="p", max_tokens=1)]
