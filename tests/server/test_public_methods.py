"""What callers without a key can do: little, whichever method they call, and nothing that keeps others from being served."""

import asyncio
import gc
import gzip
import tracemalloc
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import psutil
import pytest
from flywheel_proto.v1 import generation_pb2 as pb
from flywheel_server import public_limits
from flywheel_server.engines.scripted import Script, ScriptedEngine
from flywheel_server.public_limits import (
    MAX_CALLS_PER_CONNECTION,
    MAX_CONCURRENT_REQUESTS,
    MAX_REQUEST_BYTES,
    MAX_UNREAD_ANSWERS,
)
from flywheel_server.reflection import ServedFiles
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from tests.server.http2_client import Client, Stream, http2, prefixed
from tests.server.test_command import SCRIPTED, command, ready_line
from tests.server.test_errors import details_of
from tests.serving import Target, connected, drained, serving, until
from tests.thorough import further

KEY = "0123456789abcdef"
OK, DEADLINE_EXCEEDED, RESOURCE_EXHAUSTED, UNIMPLEMENTED, UNAUTHENTICATED = (
    code.value[0]
    for code in (
        grpc.StatusCode.OK,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.UNAUTHENTICATED,
    )
)
CHECK = "/grpc.health.v1.Health/Check"
WATCH = "/grpc.health.v1.Health/Watch"
REFLECTION = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"
UNKNOWN = ["/nobody.Service/Method", "/grpc.health.v1.Health/Nothing", "/flywheel.v1.GenerationService/Nothing", "/x", "/"]
PROTECTED = "flywheel.v1.GenerationService"


async def methods(target: Target) -> dict[str, int]:
    """Returns the methods that the server says it has, and some that it does not have, each with its answer to a stranger.

    The answer is the status of a call that is refused before its request is received; 0 if the method receives the request.
    """
    reflection: Any = reflection_pb2_grpc.ServerReflectionStub(target.channel)
    asked = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
    (answer,) = [answer async for answer in reflection.ServerReflectionInfo(asked)]
    names = [service.name for service in answer.list_services_response.service]
    assert PROTECTED in names
    files = ServedFiles(names)
    found = {
        f"/{name}/{method.name}": UNAUTHENTICATED if name == PROTECTED else OK
        for name in names
        for method in files.FindFileContainingSymbol(name).services_by_name[name.rpartition(".")[2]].methods
    }
    assert list(found.values()).count(OK) >= 4, "health and reflection in both versions"
    return found | dict.fromkeys(UNKNOWN, UNIMPLEMENTED)


@asynccontextmanager
async def locked(**settings: Any) -> AsyncIterator[Target]:
    """Serves only callers with a key."""
    async with serving(ScriptedEngine(Script(text="x")), api_keys=KEY, **settings) as target:
        yield target


async def check(target: Target, within: float = 10.0) -> None:
    """Asks for the health of the server as a prober does, on a connection of its own."""
    async with grpc.aio.insecure_channel(target.address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=within)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


LARGE = b"\x0a" + b"\x80\x80\x40" + b"x" * 2**20
"""A request with a text of 1 MiB in its first field, which is a name in the requests of health."""


@pytest.mark.parametrize(
    ("headers", "message"),
    [
        ((), prefixed(LARGE)),
        ((("grpc-encoding", "gzip"),), prefixed(gzip.compress(LARGE), compressed=True)),
        ((("grpc-encoding", "deflate"),), prefixed(zlib.compress(LARGE), compressed=True)),
        ((), prefixed(b"\x0a\x80\x20" + b"x" * MAX_REQUEST_BYTES)),
    ],
    ids=["plain", "gzip", "deflate", "a little"],
)
async def test_a_large_request_is_refused_by_every_method(headers: Any, message: bytes) -> None:
    async with locked() as target, http2(target.address) as stranger:
        for path, refusal in (await methods(target)).items():
            assert await stranger.call(path, message, *headers) == (refusal or RESOURCE_EXHAUSTED), path
        await check(target)


@pytest.mark.parametrize("beginning", [b"", prefixed(b"", length=100), prefixed(b"x" * 99, length=100)])
async def test_no_method_waits_for_a_request_that_does_not_arrive(beginning: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    async with locked() as target, http2(target.address) as stranger:
        paths = await methods(target)
        monkeypatch.setattr(public_limits, "SLOT_TIMEOUT", 0.2)
        for path, refusal in paths.items():
            assert await stranger.call(path, beginning, end=False) == (refusal or DEADLINE_EXCEEDED), path


@pytest.mark.thorough
async def test_many_calls_of_any_method_keep_nobody_from_being_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(public_limits, "SLOT_TIMEOUT", 1.0)
    async with locked() as target:
        for path, refusal in (await methods(target)).items():
            async with http2(target.address) as stranger:
                calls = [stranger.begin(path) for _ in range(MAX_CALLS_PER_CONNECTION + 20)]
                await check(target)
                if refusal:
                    assert {await call.status() for call in calls} == {refusal}, path
                    continue
                # The last calls end at once, the others when they have held a slot for too long.
                for call in calls:
                    assert await call.status() in {RESOURCE_EXHAUSTED, DEADLINE_EXCEEDED}, path


async def test_a_refusal_says_why_and_when_to_come_back() -> None:
    async with locked() as target, AsyncExitStack() as stack:
        stub = health_pb2_grpc.HealthStub(target.channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Check(health_pb2.HealthCheckRequest(service="x" * MAX_REQUEST_BYTES))
        assert details_of(caught.value)[ErrorInfo].reason == "REQUEST_TOO_LARGE"
        assert str(MAX_REQUEST_BYTES) in str(caught.value.details())
        watches = [stub.Watch(health_pb2.HealthCheckRequest()) for _ in range(MAX_CALLS_PER_CONNECTION)]
        for watch in watches:
            stack.callback(watch.cancel)
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await drained(stub.Watch(health_pb2.HealthCheckRequest()))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        details = details_of(caught.value)
        assert details[ErrorInfo].reason == "OVERLOADED"
        assert details[RetryInfo].retry_delay.seconds
        await stub.Check(health_pb2.HealthCheckRequest())
        watches[0].cancel()

        async def another() -> bool:
            watch = stub.Watch(health_pb2.HealthCheckRequest())
            stack.callback(watch.cancel)
            try:
                await watch.read()
            except grpc.aio.AioRpcError:
                return False
            return True

        await until(another, "there is room again")


@pytest.mark.parametrize("connections", [1, 2 * MAX_CONCURRENT_REQUESTS])
async def test_unfinished_requests_keep_nobody_waiting(connections: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(public_limits, "SLOT_TIMEOUT", 2.0)
    async with locked() as target, AsyncExitStack() as stack:
        strangers = [await stack.enter_async_context(http2(target.address)) for _ in range(connections)]
        calls = [strangers[number % connections].begin(CHECK) for number in range(4 * MAX_CONCURRENT_REQUESTS)]
        for _ in range(5):
            await check(target, within=1)
        assert OK not in {await call.status() for call in calls}


async def test_strangers_with_many_connections_do_not_come_first_again_with_each_call() -> None:
    connections, period = 4 * MAX_CONCURRENT_REQUESTS, 0.2
    async with locked() as target, AsyncExitStack() as stack:
        strangers = [await stack.enter_async_context(http2(target.address)) for _ in range(connections)]

        async def waste(stranger: Client) -> None:
            while True:
                call = stranger.begin(CHECK)
                await asyncio.sleep(period)
                if not call.ended.is_set():
                    stranger.reset(call)

        wasting = []
        for stranger in strangers:
            wasting.append(asyncio.create_task(waste(stranger)))
            await asyncio.sleep(period / connections)  # at any time, one of them has just begun a call
        try:
            for _ in range(20):
                await check(target, within=1)
                await asyncio.sleep(0.05)
        finally:
            for task in wasting:
                task.cancel()
            await asyncio.gather(*wasting, return_exceptions=True)


async def test_watching_strangers_give_way_to_a_connection_that_watches_less() -> None:
    async with locked(max_connections=10) as target, http2(target.address) as stranger:
        theirs = [stranger.begin(WATCH) for _ in range(10)]
        for stream in theirs:
            await stranger.send(stream, prefixed(b""), end=True)
        await until(lambda: all(stream.data for stream in theirs), "all watch")
        assert await stranger.call(WATCH, prefixed(b"")) == RESOURCE_EXHAUSTED
        watch = health_pb2_grpc.HealthStub(target.channel).Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        assert await theirs[-1].status() == RESOURCE_EXHAUSTED
        assert not any(stream.ended.is_set() for stream in theirs[:-1])
        watch.cancel()


@pytest.mark.parametrize("path", [CHECK, REFLECTION, WATCH])
async def test_a_connection_that_does_not_read_gets_few_answers(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(public_limits, "SLOT_TIMEOUT", 0.5)
    async with locked() as target, http2(target.address, window=0) as stranger:
        request = prefixed(reflection_pb2.ServerReflectionRequest(list_services="").SerializeToString())
        calls = [await begun(stranger, path, request if path == REFLECTION else prefixed(b"")) for _ in range(200)]

        async def refused() -> bool:
            await asyncio.sleep(0.01)
            return sum(call.ended.is_set() for call in calls) >= len(calls) - _may_stay(path)

        await until(refused, "the others are refused")
        assert {await call.status() for call in calls if call.ended.is_set()} == {RESOURCE_EXHAUSTED}
        await check(target)


def _may_stay(path: str) -> int:
    # Calls that hold slots at the same time are answered before the first answer is known to be unread.
    return MAX_CALLS_PER_CONNECTION if path == WATCH else MAX_UNREAD_ANSWERS + MAX_CONCURRENT_REQUESTS


async def begun(client: Client, path: str, data: bytes) -> Stream:
    stream = client.begin(path)
    await client.send(stream, data, end=True)
    return stream


async def test_reflection_answers_many_requests_and_each_has_the_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    request = prefixed(reflection_pb2.ServerReflectionRequest(list_services="").SerializeToString())
    async with locked() as target, http2(target.address) as client:
        large = client.begin(REFLECTION)
        for number in range(1, 4):
            before = len(large.data)
            await client.send(large, request)
            await until(lambda before=before: len(large.data) > before, f"answer {number}")  # type: ignore[misc]
        await client.send(large, prefixed(LARGE))
        assert await large.status() == RESOURCE_EXHAUSTED
        monkeypatch.setattr(public_limits, "SLOT_TIMEOUT", 0.5)
        idle = client.begin(REFLECTION)
        await client.send(idle, request)
        assert await idle.status() == OK, "each request has its answer"
        assert idle.data


@pytest.mark.parametrize("compression", [grpc.Compression.NoCompression, grpc.Compression.Gzip, grpc.Compression.Deflate])
async def test_compressed_requests_are_read_up_to_the_limit(compression: grpc.Compression) -> None:
    limits = {"max_message_bytes": 300_000, "max_text_bytes": 299_000}
    async with serving(ScriptedEngine(Script(context_tokens=2**30)), **limits) as target:
        health = health_pb2_grpc.HealthStub(target.channel)
        await health.Check(health_pb2.HealthCheckRequest(service=PROTECTED), compression=compression)
        text = "What a long text! " * 16_000
        answer = await target.stub.GenerateAll(pb.GenerationRequest(text=text, max_tokens=1), compression=compression)
        assert answer.prompt_tokens == len(text) // 4
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await target.stub.GenerateAll(pb.GenerationRequest(text="x" * 300_000, max_tokens=1), compression=compression)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "300000" in str(caught.value.details())


@pytest.mark.parametrize(
    "data",
    [
        b"\x1f\x8b",
        gzip.compress(b"", mtime=0)[:-1],
        zlib.compress(b"\x0a\x01x")[:-1],
        b"\x78\x9c\xff\xff",
        gzip.compress(b"\x0a\x01x\x10\x01", mtime=0) + b"more",
        gzip.compress(b"\x0a\x01x\x10\x01", mtime=0) + b"\x00" * 2**17,
    ],
)
async def test_bytes_that_only_look_compressed_are_an_invalid_argument(data: bytes) -> None:
    async with serving(ScriptedEngine()) as target:
        call = target.channel.unary_unary(f"/{PROTECTED}/GenerateAll", bytes, bytes)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(data)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("compress", [bytes, gzip.compress, zlib.compress])
async def test_a_message_without_fields_may_be_compressed(compress: Callable[[bytes], bytes]) -> None:
    async with serving(ScriptedEngine()) as target:
        call = target.channel.unary_unary(f"/{PROTECTED}/GetModel", compress, pb.Model.FromString)
        assert (await call(b"")).engine == "scripted"


@pytest.fixture
def no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    tracemalloc.start()
    yield
    tracemalloc.stop()
    gc.enable()


@pytest.mark.parametrize("key", ["", KEY])
@pytest.mark.usefixtures("no_garbage_collection")
async def test_a_request_that_was_refused_is_not_kept_until_a_garbage_collection(key: str) -> None:
    headers = [("authorization", f"Bearer {key}")] if key else []
    too_large = {"max_message_bytes": len(LARGE) + 100, "max_text_bytes": 100}
    async with locked(**too_large) as target, http2(target.address) as client:
        for path in await methods(target):
            await client.call(path, prefixed(LARGE), *headers)
            before, _ = tracemalloc.get_traced_memory()
            for _ in range(10):
                await client.call(path, prefixed(LARGE), *headers)
            after, _ = tracemalloc.get_traced_memory()
            assert after - before < 3 * len(LARGE), path


def resident_mib(pid: int) -> int:
    return psutil.Process(pid).memory_info().rss // 2**20


NEARLY_4_MIB = 4 * 2**20 - 100


async def gzipped_watches(client: Client) -> None:
    request = health_pb2.HealthCheckRequest(service="x" * NEARLY_4_MIB).SerializeToString()
    message = prefixed(gzip.compress(request), compressed=True)
    statuses = Counter([await client.call(WATCH, message, ("grpc-encoding", "gzip")) for _ in range(250)])
    assert statuses == {RESOURCE_EXHAUSTED: 250}


async def unfinished_checks(client: Client) -> None:
    message = prefixed(b"x" * NEARLY_4_MIB, length=NEARLY_4_MIB + 1)
    statuses = await asyncio.gather(*(client.call(CHECK, message, end=False) for _ in range(60)))
    assert set(statuses) <= {RESOURCE_EXHAUSTED, DEADLINE_EXCEEDED}


async def open_reflection_streams(client: Client) -> None:
    request = reflection_pb2.ServerReflectionRequest(file_containing_symbol="x" * NEARLY_4_MIB).SerializeToString()
    statuses = await asyncio.gather(*(client.call(REFLECTION, prefixed(request), end=False) for _ in range(60)))
    assert set(statuses) <= {RESOURCE_EXHAUSTED, DEADLINE_EXCEEDED}


async def large_requests(client: Client) -> None:
    for path in (CHECK, REFLECTION):
        for _ in range(4):
            message = prefixed(b"x" * NEARLY_4_MIB)
            statuses = await asyncio.gather(*(client.call(path, message) for _ in range(20)))
            assert set(statuses) == {RESOURCE_EXHAUSTED}


async def begun_calls(client: Client) -> None:
    statuses = await asyncio.gather(*(client.begin(CHECK).status() for _ in range(900)))
    assert set(statuses) <= {RESOURCE_EXHAUSTED, DEADLINE_EXCEEDED}


@pytest.mark.parametrize(
    "attack", [gzipped_watches, open_reflection_streams, large_requests, *further([unfinished_checks, begun_calls])]
)
async def test_strangers_cost_little_memory(attack: Callable[[Client], Any]) -> None:
    async with command(*SCRIPTED, environment={"FLYWHEEL_API_KEYS": KEY}) as process:
        _, address = await ready_line(process)
        async with connected(address) as target, http2(address) as stranger:
            await check(target)
            before = most = resident_mib(process.pid)
            attacking = asyncio.ensure_future(attack(stranger))
            while not attacking.done():
                await asyncio.wait({attacking}, timeout=0.02)
                most = max(most, resident_mib(process.pid))
            await attacking
            await check(target)
        # Each slot has a message of up to 4 MiB, which is copied on its way from gRPC to Python.
        assert most - before < 3 * MAX_CONCURRENT_REQUESTS * 4
