"""Shortages, such as of descriptors or memory: no server ends because of one, or takes its engine for dead."""

import asyncio
import errno
import re
import resource
import signal
import socket
import threading
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from flywheel_proto.v1 import generation_pb2 as pb
from flywheel_server import supervision
from flywheel_server.engines.base import EngineFailedError, EngineUnavailableError
from flywheel_server.engines.scripted import Script
from flywheel_server.system import descriptors
from flywheel_server.system.shortage import is_shortage
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from grpc_health.v1 import health_pb2, health_pb2_grpc
from structlog.testing import capture_logs

from tests.server.test_command import SCRIPTED, command, ready_line
from tests.server.test_errors import METHODS, details_of
from tests.server.test_supervision import NOT_SERVING, SERVING, MortalEngine
from tests.serving import Target, connected, drained, serving, until
from tests.thorough import further

ONE = pb.GenerationRequest(text="x", max_tokens=1)
EMBEDDED = ["--address", "127.0.0.1:0", "--embedded-threads", "1"]


def raised(error: Exception, cause: Exception | None = None) -> Exception:
    try:
        raise error from cause
    except Exception as caught:  # noqa: BLE001 - the error to return
        return caught


def no_thread() -> Exception:
    """Returns what Python raises when the system gives it no thread."""
    stack = threading.stack_size(2**46)
    try:
        threading.Thread(target=str).start()
    except RuntimeError as error:
        return error
    finally:
        threading.stack_size(stack)
    raise AssertionError("the system started the thread")


def while_handling(error: Exception) -> Exception:
    try:
        try:
            raise error
        except Exception:  # noqa: BLE001 - whatever it is
            raise ValueError("what it led to")  # noqa: B904 - as code without `from` does
    except ValueError as caught:
        return caught


SHORTAGES: dict[str, Callable[[], Exception]] = {
    **{
        name: lambda name=name: OSError(getattr(errno, name), "none left")  # type: ignore[misc]
        for name in ("EMFILE", "ENFILE", "ENOMEM", "ENOBUFS", "ENOSPC", "EDQUOT", "EAGAIN")
    },
    "memory": MemoryError,
    "threads": no_thread,
    "engine": lambda: raised(EngineFailedError("no tokens"), OSError(errno.EMFILE, "none left")),
    "deep": lambda: raised(EngineUnavailableError("no Modal"), raised(ConnectionError("no"), MemoryError())),
    "context": lambda: while_handling(OSError(errno.EMFILE, "none left")),
}


@pytest.mark.parametrize("shortage", SHORTAGES.values(), ids=SHORTAGES)
def test_errors_that_are_shortages(shortage: Callable[[], Exception]) -> None:
    assert is_shortage(shortage())


def test_errors_that_are_no_shortages() -> None:
    hidden = raised(ValueError("our own"), None)
    hidden.__context__ = MemoryError()
    circular = EngineFailedError("a")
    circular.__cause__ = raised(EngineFailedError("b"), circular)
    for error in (
        ConnectionRefusedError(errno.ECONNREFUSED, "no"),
        FileNotFoundError(errno.ENOENT, "no"),
        TimeoutError(),
        RuntimeError("a bug"),
        EngineFailedError("llama.cpp"),
        raised(EngineFailedError("llama.cpp"), ValueError()),
        hidden,
        circular,
    ):
        assert not is_shortage(error), repr(error)


class PoorEngine(MortalEngine):
    """Fails calls, checks and statistics with the error `lacks` while there is one."""

    def __init__(self) -> None:
        super().__init__(Script())
        self.lacks: Exception | None = None

    async def events(self, prepared: Any) -> Any:
        async for event in super().events(prepared):
            yield event
            if self.lacks:
                raise self.lacks

    async def check(self) -> None:
        if self.lacks:
            raise self.lacks
        await super().check()

    async def stats(self) -> Any:
        if self.lacks:
            raise self.lacks
        return await super().stats()


@pytest.mark.parametrize("shortage", SHORTAGES.values(), ids=SHORTAGES)
async def test_calls_end_with_a_retry_delay_and_the_engine_lives_on(shortage: Callable[[], Exception]) -> None:
    engine = PoorEngine()
    async with serving(engine, health_interval=0.01, engine_timeout=0.05) as target:
        health = health_pb2_grpc.HealthStub(target.channel)
        with capture_logs() as logs:
            engine.lacks = shortage()
            for method in (*METHODS, "GetStats"):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await drained(getattr(target.stub, method)(pb.GetStatsRequest() if method == "GetStats" else ONE))
                assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
                details = details_of(caught.value)
                assert details[ErrorInfo].reason == "OUT_OF_RESOURCES"
                assert details[RetryInfo].retry_delay.ToMilliseconds() == 1000
            await until(lambda: "engine not looked at" in str(logs), "health has looked")
            assert (await health.Check(health_pb2.HealthCheckRequest())).status == SERVING
            engine.lacks = None
            for method in METHODS:
                await drained(getattr(target.stub, method)(ONE))
            await target.stub.GetStats(pb.GetStatsRequest())
        assert "dead" not in str(logs)
        assert "out of reach" not in str(logs)
        refused = [line for line in logs if line["event"] == "call refused"]
        assert len(refused) == len(METHODS) + 1
        assert all(line["cause"] for line in refused), "the log says what is missing"
        assert len([line for line in logs if line["event"] == "engine not looked at"]) == 1
    assert engine.starts == 1


@pytest.mark.parametrize("shortage", SHORTAGES.values(), ids=SHORTAGES)
async def test_an_engine_that_cannot_start_during_a_shortage_is_started_after_it(
    shortage: Callable[[], Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervision, "RESTART_INTERVAL", 0.01)
    monkeypatch.setattr(supervision, "MIN_RESTART_PAUSE", 0.01)
    engine = MortalEngine()
    async with serving(engine) as target:
        health = health_pb2_grpc.HealthStub(target.channel)
        with capture_logs() as logs:
            engine.start_error = shortage()
            engine.dead.set()
            with pytest.raises(grpc.aio.AioRpcError):
                await target.stub.GenerateAll(ONE)
            await until(lambda: str(logs).count("engine is not started") > 1, "it tries again and again")
            assert (await health.Check(health_pb2.HealthCheckRequest())).status == NOT_SERVING
            engine.start_error = None

            async def serves() -> bool:
                return bool((await health.Check(health_pb2.HealthCheckRequest())).status == SERVING)

            await until(serves, "it is started")
        await target.stub.GenerateAll(ONE)
    assert engine.starts == 2


async def test_native_code_that_cannot_start_without_descriptors_is_started_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(supervision, "RESTART_INTERVAL", 0.01)
    monkeypatch.setattr(supervision, "MIN_RESTART_PAUSE", 0.01)
    engine = MortalEngine()
    async with serving(engine) as target:
        with monkeypatch.context() as poor, capture_logs() as logs:
            poor.setattr(descriptors, "free", lambda: 3)
            engine.start_error = EngineUnavailableError("llama.cpp cannot load it, and does not say why")
            engine.dead.set()
            with pytest.raises(grpc.aio.AioRpcError):
                await target.stub.GenerateAll(ONE)
            await until(lambda: str(logs).count("engine is not started") > 1, "it tries again and again")
            engine.start_error = None
            await until(lambda: engine.starts == 2, "it is started")


def connected_anew(address: str) -> AbstractAsyncContextManager[Target]:
    """Gives a channel with a connection of its own: other channels of a process to one address share a connection."""
    return connected(address, ("grpc.use_local_subchannel_pool", 1))


def idle(address: str, number: int, stack: AsyncExitStack) -> list[socket.socket]:
    """Returns connections over which nothing is sent."""
    host, _, port = address.rpartition(":")
    return [stack.enter_context(socket.create_connection((host, int(port)))) for _ in range(number)]


async def ended_well(process: Process) -> str:
    """Ends the server, and returns its log."""
    process.send_signal(signal.SIGTERM)
    _, err = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode == 0, err
    assert b"dead" not in err
    assert b"Traceback" not in err
    return err.decode()


@pytest.mark.parametrize("engine", [SCRIPTED, EMBEDDED], ids=["scripted", "embedded"])
async def test_idle_connections_do_not_take_the_descriptors_that_the_engine_needs(engine: list[str]) -> None:
    async with command(*engine, setup="ulimit -n 256") as process, AsyncExitStack() as stack:
        _, address = await ready_line(process)
        async with connected(address) as target:
            await target.stub.GenerateAll(ONE)
            sockets = idle(address, 300, stack)
            for method in METHODS:
                await drained(getattr(target.stub, method)(ONE, timeout=60))
            for each in sockets:
                each.close()
            async with connected_anew(address) as another:
                await another.stub.GenerateAll(ONE, timeout=60, wait_for_ready=True)
        log = await ended_well(process)
    cut = re.search(r"max_connections is cut from 1000 to (\d+), as the limit of open files is 256: raise it .* to (\d+)", log)
    assert cut, log
    assert int(cut[1]) < 256 - 64
    assert 1000 + 64 < int(cut[2]) < 1000 + 128
    assert "File descriptor limit" not in log


@pytest.mark.parametrize("engine", [SCRIPTED, *further([EMBEDDED])], ids=["scripted", "embedded"])
async def test_a_soft_limit_is_raised_to_the_hard_one(engine: list[str]) -> None:
    descriptors.raise_limit()
    if descriptors.limit() < 1536:
        pytest.skip("the machine does not let one process open so many connections")
    async with command(*engine, setup="ulimit -Sn 256") as process, AsyncExitStack() as stack:
        _, address = await ready_line(process)
        async with connected(address) as target:
            await target.stub.GenerateAll(ONE)
            idle(address, 990, stack)
            await target.stub.GenerateAll(ONE, timeout=60)
            async with connected_anew(address) as another:
                await another.stub.GenerateAll(ONE, timeout=60)
        assert "max_connections" not in await ended_well(process)


async def test_a_limit_that_leaves_hardly_any_connections_is_an_error_that_says_which_would_do() -> None:
    async def outcome(limit: int, *options: str) -> tuple[int | None, str]:
        async with command(*SCRIPTED, *options, setup=f"ulimit -n {limit}") as process:
            assert process.stdout is not None
            if not await process.stdout.readline():
                _, err = await process.communicate()
                return process.returncode, err.decode().strip().splitlines()[-1]
            return None, await ended_well(process)

    code, message = await outcome(64)
    assert code == 1
    assert message.startswith("flywheel-server: the limit of open files, 64, leaves no room for connections")
    least = int(message.rsplit(" ", 1)[1])
    assert await outcome(least - 1) == (1, message.replace("64,", f"{least - 1},"))
    code, log = await outcome(least)
    assert code is None
    assert "is cut from 1000 to 8," in log
    code, log = await outcome(least, "--max-connections", "8")
    assert code is None
    assert "is cut" not in log
    # Fewer connections need fewer descriptors.
    code, log = await outcome(least - 7, "--max-connections", "1")
    assert code is None
    assert "is cut" not in log


@asynccontextmanager
async def without_descriptors(process: Process) -> AsyncIterator[None]:
    """Lets the process open nothing for the length of the context."""
    before = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (3, before[1]))
    try:
        yield
    finally:
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, before)


async def reason(call: Any) -> str | None:
    """Returns why the call failed, or None."""
    try:
        await drained(call)
    except grpc.aio.AioRpcError as error:
        return str(details_of(error)[ErrorInfo].reason)
    return None


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="only Linux can take descriptors from another process")
async def test_a_server_without_descriptors_goes_on_and_recovers(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    file.write_text('{"keys": []}')
    keys = "0123456789abcdef"
    metadata = (("authorization", f"Bearer {keys}"),)
    settings = ("--api-keys-file", str(file), "--health-interval", "0.1", "--engine-timeout", "2")
    async with command(*EMBEDDED, *settings, environment={"FLYWHEEL_API_KEYS": keys}) as process:
        _, address = await ready_line(process)
        async with connected(address) as target:
            await target.stub.GenerateAll(ONE, metadata=metadata)
            async with without_descriptors(process):
                file.write_text('{"keys": [] }')
                for method in METHODS * 2:
                    assert await reason(getattr(target.stub, method)(ONE, metadata=metadata, timeout=30)) in {
                        None,
                        "OUT_OF_RESOURCES",
                    }
                async with connected_anew(address) as another:
                    with pytest.raises(grpc.aio.AioRpcError):
                        await another.stub.GetStats(pb.GetStatsRequest(), metadata=metadata, timeout=0.5)
                # Longer than the second between two checks of the file.
                await asyncio.sleep(1.2)
                health = health_pb2_grpc.HealthStub(target.channel)
                assert (await health.Check(health_pb2.HealthCheckRequest())).status == SERVING
            await target.stub.GenerateAll(ONE, metadata=metadata)
            async with connected_anew(address) as another:
                await another.stub.GenerateAll(ONE, metadata=metadata, wait_for_ready=True, timeout=30)
            await asyncio.sleep(1.2)
        log = await ended_well(process)
    assert "API keys not reloaded" in log
    assert "API keys reloaded" in log
