"""Several processes on one port: what holds for all of them together, and what happens when one of them dies."""

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from flywheel_proto.v1 import generation_pb2 as pb
from flywheel_server.access.keys_file import KeysFile
from flywheel_server.deployment.gateway import GatewayThread
from flywheel_server.engines.scripted import ScriptedEngine
from flywheel_server.server import serve
from flywheel_server.settings import Settings, parse
from flywheel_server.workers.link import Link
from flywheel_server.workers.port import reserved
from google.rpc.error_details_pb2 import ErrorInfo
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.access.test_quotas import keys_for
from tests.server.test_errors import details_of
from tests.serving import Target, code_of, connected, free_ports, last_of, serving, until
from tests.workers.several import Several, is_running, several

LONG = pb.GenerationRequest(text="x", max_tokens=8000)
SHORT = pb.GenerationRequest(text="x", max_tokens=1)
SCRIPT = ("--script", '{"token_delay": 0.02}')

Keys = Mapping[str, tuple[tuple[str, str]]]


@pytest.fixture(scope="module")
async def running(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[Several, Keys, Path]]:
    """A server with two workers, the keys of its callers, and the file with the keys."""
    file = tmp_path_factory.mktemp("keys") / "keys.json"
    callers: dict[str, Any] = {
        "plain": {},
        "first": {"priority": 5},
        "two": {"max_concurrent": 2},
        "metered": {"tokens_per_minute": 6000},
        "reader": {"tokens_per_minute": 6000},
        "leaving": {},
    }
    with keys_for(file, **callers) as keys:
        limits = ("--max-concurrent", "4", "--max-queued", "2", "--api-keys-file", str(file))
        async with several(*SCRIPT, *limits, metadata=keys["plain"]) as server:
            yield server, keys, file


async def begun(target: Target, metadata: Any, request: pb.GenerationRequest = LONG) -> Any:
    """Returns a call that has received its first message."""
    call = target.stub.GenerateDeltas(request, metadata=metadata)
    assert await call.read() is not grpc.aio.EOF, await call.details()
    return call


async def ended_by(call: Any) -> tuple[grpc.StatusCode, str]:
    """Returns the status and the reason that a call of `GenerateDeltas` ends with."""
    try:
        await last_of(call)
    except grpc.aio.AioRpcError as error:
        details = details_of(error) if error.trailing_metadata() else {}
        return error.code(), details[ErrorInfo].reason if ErrorInfo in details else ""
    return await call.code(), ""


async def counts_of(target: Target, metadata: Any) -> tuple[int, int]:
    stats = await target.stub.GetStats(pb.GetStatsRequest(), metadata=metadata)
    return stats.active, stats.queued


@asynccontextmanager
async def left_empty(targets: Mapping[int, Target], metadata: Any) -> AsyncIterator[list[Any]]:
    """Gives a list for calls. At the end, cancels these calls, and waits until no worker counts a call."""
    calls: list[Any] = []
    try:
        yield calls
    finally:
        for call in calls:
            call.cancel()
        for target in targets.values():

            async def is_empty(target: Target = target) -> bool:
                return await counts_of(target, metadata) == (0, 0)

            await until(is_empty, "no call is left")


FULL = (grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED")
OVER_QUOTA = (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUOTA_EXCEEDED")


async def test_all_workers_share_admission_and_stats(running: tuple[Several, Keys, Path]) -> None:
    server, keys, _ = running
    plain = keys["plain"]
    async with server.connections() as targets, left_empty(targets, plain) as calls:
        one, two = targets.values()
        calls.extend([await begun(target, plain) for target in (one, one, one, two)])
        waiting = [target.stub.GenerateDeltas(LONG, metadata=plain) for target in (one, two)]
        calls.extend(waiting)
        for target in (one, two):

            async def all_are_here(target: Target = target) -> bool:
                return await counts_of(target, plain) == (4, 2)

            await until(all_are_here, "both workers count the calls of both")
            assert await ended_by(target.stub.GenerateDeltas(LONG, metadata=plain)) == FULL
        first = one.stub.GenerateDeltas(LONG, metadata=keys["first"])
        calls.append(first)
        # It is unknown which of the two waiting calls came last.
        ends = [asyncio.ensure_future(ended_by(call)) for call in waiting]
        done, others = await asyncio.wait(ends, timeout=20, return_when=asyncio.FIRST_COMPLETED)
        assert [end.result() for end in done] == [FULL], "the call of the higher priority takes a place"
        calls[3].cancel()
        async with asyncio.timeout(20):
            assert await first.read() is not grpc.aio.EOF, "room on one worker is room for a call on the other"
        for end in others:
            end.cancel()


async def test_quotas_hold_for_the_calls_of_all_workers(running: tuple[Several, Keys, Path]) -> None:
    server, keys, _ = running
    async with server.connections() as targets, left_empty(targets, keys["plain"]) as calls:
        calls.extend([await begun(target, keys["two"]) for target in targets.values()])
        for target in targets.values():
            assert await ended_by(target.stub.GenerateDeltas(SHORT, metadata=keys["two"])) == OVER_QUOTA
        calls.pop().cancel()
        one, two = targets.values()

        async def may_call() -> bool:
            return await code_of(one.stub.GenerateAll(SHORT, metadata=keys["two"])) is grpc.StatusCode.OK

        await until(may_call, "a call on one worker gets the quota that a call on the other released")
        big = pb.GenerationRequest(text="x", max_tokens=4000)
        calls.append(await begun(one, keys["metered"], big))
        assert await ended_by(two.stub.GenerateDeltas(big, metadata=keys["metered"])) == OVER_QUOTA


async def test_tokens_of_prompts_count_on_all_workers(running: tuple[Several, Keys, Path]) -> None:
    server, keys, _ = running
    prompt = pb.TokenizeRequest(text="llam" * 4000)
    async with server.connections() as targets, left_empty(targets, keys["plain"]):
        one, two = targets.values()
        for target in (one, two):
            assert (await target.stub.Tokenize(prompt, metadata=keys["reader"])).prompt_tokens == 4000
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await one.stub.Tokenize(prompt, metadata=keys["reader"])
        assert (caught.value.code(), details_of(caught.value)[ErrorInfo].reason) == OVER_QUOTA


async def test_a_key_is_revoked_in_all_workers(running: tuple[Several, Keys, Path]) -> None:
    server, keys, file = running
    async with server.connections() as targets, left_empty(targets, keys["plain"]):
        calls = [await begun(target, keys["leaving"]) for target in targets.values()]
        held = KeysFile.read(file)
        KeysFile(keys=tuple(key for key in held.keys if key.name != "leaving")).write(file)
        async with asyncio.timeout(5):
            for call in calls:
                assert await ended_by(call) == (grpc.StatusCode.UNAUTHENTICATED, "API_KEY_REVOKED")
        for target in targets.values():
            refused = target.stub.GenerateAll(SHORT, metadata=keys["leaving"])
            assert await code_of(refused) is grpc.StatusCode.UNAUTHENTICATED


async def test_a_worker_that_dies_is_replaced_and_its_calls_end_and_release_what_they_held(
    running: tuple[Several, Keys, Path],
) -> None:
    server, keys, _ = running
    async with server.connections() as targets, left_empty(targets, keys["plain"]) as calls:
        (doomed, dying), (_, living) = targets.items()
        watched = health_pb2_grpc.HealthStub(living.channel).Watch(health_pb2.HealthCheckRequest())
        calls.append(watched)
        assert (await watched.read()).status == health_pb2.HealthCheckResponse.SERVING
        watched_more = asyncio.ensure_future(watched.read())
        lost = await begun(dying, keys["two"])
        waiting = [await begun(dying, keys["plain"]), await begun(dying, keys["plain"])]
        kept = await begun(living, keys["two"])
        calls.append(kept)
        assert await ended_by(living.stub.GenerateDeltas(SHORT, metadata=keys["two"])) == OVER_QUOTA
        pid = server.pids()[doomed]
        os.kill(pid, signal.SIGKILL)
        for call in (lost, *waiting):
            assert (await ended_by(call))[0] is grpc.StatusCode.UNAVAILABLE
        targets.pop(doomed)

        async def may_call() -> bool:
            return await code_of(living.stub.GenerateAll(SHORT, metadata=keys["two"])) is grpc.StatusCode.OK

        await until(may_call, "the quota of the lost call is free")
        assert await counts_of(living, keys["plain"]) == (1, 0)
        assert await kept.read() is not grpc.aio.EOF, "the calls of the other worker go on"
        await until(lambda: server.pids()[doomed] != pid, "another worker is started")
        (death,) = [line for line in server.events("worker died") if line["pid"] == pid]
        assert (death["number"], death["exit_code"]) == (doomed, -signal.SIGKILL)
        async with server.connections() as replaced:
            assert await begun(replaced[doomed], keys["two"])
            assert not watched_more.done(), "the health has not changed meanwhile"


async def test_all_workers_drain_together_and_a_watcher_of_each_hears_it() -> None:
    async with several(*SCRIPT, "--drain-timeout", "30") as server, server.connections() as targets:
        assert server.address.rpartition(":")[2] != "0"
        watches = []
        for target in targets.values():
            watch = health_pb2_grpc.HealthStub(target.channel).Watch(health_pb2.HealthCheckRequest())
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
            watches.append(watch)
        calls = [await begun(target, (), pb.GenerationRequest(text="x", max_tokens=50)) for target in targets.values()]
        # To all of them, as a terminal or a process supervisor sends it.
        for pid in (*server.pids().values(), server.process.pid):
            os.kill(pid, signal.SIGTERM)
        for watch in watches:
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert [await ended_by(call) for call in calls] == [(grpc.StatusCode.OK, "")] * 2
        assert await server.closed() == 0
        assert not any(is_running(pid) for pid in server.pids().values())
        assert [line["running_calls"] for line in server.events("stopping")] == [1, 1]


async def test_a_reserved_port_is_for_workers_only() -> None:
    with reserved("127.0.0.1", 0) as port:
        with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{port}"), reserved("127.0.0.1", port):
            pass
        with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{port}"):
            async with serve(ScriptedEngine(), Settings(address=f"127.0.0.1:{port}")):
                pass
        with socket.socket() as worker, socket.socket() as other:
            for each in (worker, other):
                each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                each.bind(("127.0.0.1", port))
                each.listen()
    async with serving(ScriptedEngine()) as target:
        port = int(target.address.rpartition(":")[2])
        with pytest.raises(OSError, match=target.address), reserved("127.0.0.1", port):
            pass


class WakingEngine(ScriptedEngine):
    """An engine that does not answer before it is awake."""

    def __init__(self) -> None:
        super().__init__()
        self.is_asked = False
        self.awake = asyncio.Event()

    async def check(self) -> None:
        self.is_asked = True
        await self.awake.wait()


async def test_a_worker_gets_no_connection_that_another_one_could_serve() -> None:
    address = f"127.0.0.1:{free_ports(1)[0]}"
    engine, end = WakingEngine(), asyncio.Event()

    async def work() -> None:
        async with serve(engine, Settings(engine="scripted", address=address, withdraw_window=0), Link()):
            await end.wait()

    working = asyncio.create_task(work())
    await until(lambda: engine.is_asked, "the engine starts")
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection(*address.split(":"))
    engine.awake.set()
    async with connected(address) as target, asyncio.timeout(20):
        assert await target.stub.GetModel(pb.GetModelRequest(), wait_for_ready=True)
    end.set()
    await working


def test_a_gateway_on_modal_is_one_process() -> None:
    settings = Settings(engine="scripted", workers=2, api_keys="a-key-of-somebody")
    with pytest.raises(ValueError, match="leave out FLYWHEEL_WORKERS"):
        GatewayThread(settings, None, 0)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--workers", "2"], "must be 1 with the embedded engine"),
        (["--workers", "2", "--engine", "embedded"], "must be 1 with the embedded engine"),
        (["--workers", "0", "--engine", "scripted"], "a whole number from 1"),
        (["--workers", "many", "--engine", "scripted"], "a whole number from 1"),
    ],
)
def test_workers_that_cannot_be_are_refused_by_name(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(arguments)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert "--workers (FLYWHEEL_WORKERS)" in error
    assert expected in error
