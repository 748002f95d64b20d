"""A dead engine in a container on Modal is started again, or the container is replaced."""

import asyncio
import random
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import modal
import psutil
import pytest
from flywheel_client import AsyncClient, InternalError
from flywheel_proto.v1 import generation_pb2 as pb
from flywheel_server.deployment import supervised
from flywheel_server.deployment.supervised import SupervisedEngine
from flywheel_server.engines.base import EngineFailedError, EngineUnavailableError, Event
from flywheel_server.messages import GenerationRequest
from google.rpc.error_details_pb2 import RetryInfo

from tests.deployment.conftest import AUTHORIZATION, deployed, through
from tests.deployment.mortal_app import FOREIGN, MortalEngine
from tests.modal_cloud import Container, ModalCloud, scripted
from tests.pulled import pulled
from tests.server.test_errors import details_of
from tests.serving import Target, drained, serving, until
from tests.thorough import further

APP = Path(__file__).with_name("mortal_app.py")
SOME = ("OSError", "UnpicklableError")
METHODS = ["GenerateDeltas", *further(["Generate", "GenerateAll"])]
UNAVAILABLE, INTERNAL = grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL


@pytest.fixture(scope="module")
def mortal(cloud: ModalCloud) -> ModalCloud:
    done = cloud.cli("deploy", str(APP))
    assert done.returncode == 0, done.stdout + done.stderr
    return cloud


@pytest.fixture
async def target(mortal: ModalCloud) -> AsyncIterator[Target]:
    async with serving(scripted.engine("mortal")) as target:
        yield target


def request(text: str, max_tokens: int = 10) -> pb.GenerationRequest:
    return pb.GenerationRequest(text=text, max_tokens=max_tokens)


async def failure_of(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await drained(call)
    return caught.value


async def counts() -> tuple[int, int, int, int]:
    """Returns the process id of the container, how often its engine was started and called, and how many calls it works on."""
    instance = modal.Cls.from_name("mortal", "Model").with_options(gpu=scripted.GPU, timeout=scripted.TIMEOUT)()
    found: tuple[int, int, int, int] = await instance.counts.remote.aio()
    return found


async def begun(calls: int) -> bool:
    return (await counts())[3] == calls


async def again(target: Target) -> None:
    """Returns when a call succeeds; each call that fails before that says that it may be repeated."""

    async def succeeds() -> bool:
        call = target.stub.GenerateAll(request("hello"))
        if await call.code() is grpc.StatusCode.OK:
            return True
        error = await failure_of(call)
        assert error.code() is UNAVAILABLE
        assert RetryInfo in details_of(error)
        return False

    await until(succeeds, "a call succeeds", within=20)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("where", ["decode", *further(["prepare", "queue"])])
@pytest.mark.parametrize("how", ["at once", *further(["silently"])])
async def test_a_dead_engine_is_started_again_in_its_container(target: Target, method: str, where: str, how: str) -> None:
    await again(target)
    process, starts, *_ = await counts()
    running = asyncio.ensure_future(failure_of(getattr(target.stub, method)(request("hello", 2000))))
    await until(lambda: begun(1), "it runs")
    error = await failure_of(getattr(target.stub, method)(request(f"{where} {how}")))
    assert error.code() in ({UNAVAILABLE, INTERNAL} if where == "decode" else {UNAVAILABLE})
    assert (await running).code() in {UNAVAILABLE, INTERNAL}
    await again(target)
    assert (await counts())[:2] == (process, starts + 1)


@pytest.mark.parametrize("where", ["decode", pytest.param("prepare", marks=pytest.mark.thorough)])
async def test_the_calls_of_a_dead_engine_are_told_before_it_starts_again(target: Target, where: str) -> None:
    """The start can take minutes, during which Python stands still in the container."""
    await again(target)
    running = [asyncio.ensure_future(failure_of(target.stub.GenerateDeltas(request("hello", 2000)))) for _ in range(3)]
    await until(lambda: begun(3), "they run")
    asked = time.monotonic()
    error = await failure_of(target.stub.GenerateDeltas(request(f"{where} slowly started")))
    assert {error.code(), *[(await each).code() for each in running]} <= {UNAVAILABLE, INTERNAL}
    assert time.monotonic() - asked < 4
    await again(target)


@pytest.mark.parametrize("how", ["silently", *further(["at once"])])
async def test_calls_that_find_the_engine_dead_are_repeated_and_succeed(target: Target, how: str) -> None:
    await again(target)
    _, starts, *_ = await counts()
    await target.stub.GenerateAll(request(f"afterwards {how}"))
    async with AsyncClient(target.address) as client:
        for answer in await asyncio.gather(*(client.generate_all("hello", max_tokens=3) for _ in range(9))):
            assert len(answer.responses) == 1
    assert (await counts())[1] == starts + 1


@pytest.mark.parametrize("how", ["for good", "undead"])
async def test_a_container_whose_engine_does_not_start_again_is_replaced(mortal: ModalCloud, target: Target, how: str) -> None:
    await again(target)
    process, *_ = await counts()
    (container,) = [one for one in mortal.containers("mortal/Model") if one.process.pid == process]
    before = len(mortal.calls)
    running = asyncio.ensure_future(failure_of(target.stub.GenerateDeltas(request("hello", 2000))))
    await until(lambda: begun(1), "it runs")
    assert (await failure_of(target.stub.GenerateDeltas(request(f"decode {how}")))).code() in {UNAVAILABLE, INTERNAL}
    assert (await running).code() in {UNAVAILABLE, INTERNAL}
    await again(target)
    other, starts, *_ = await counts()
    assert (other == process, starts) == (False, 1)
    assert await asyncio.to_thread(container.wait, 40) == 0
    assert [call.attempt for call in mortal.calls[before:]] == [0] * len(mortal.calls[before:]), "none runs twice"
    assert mortal.containers("mortal/Model")


@pytest.mark.parametrize("kind", [*SOME, *further(kind for kind in FOREIGN if kind not in SOME)])
@pytest.mark.parametrize("when", ["raise", "raise-early"])
async def test_what_an_engine_raises_fails_the_call_once(mortal: ModalCloud, target: Target, when: str, kind: str) -> None:
    await again(target)
    process, starts, calls, _ = await counts()
    async with AsyncClient(target.address) as client:
        with pytest.raises(InternalError) as caught:
            await client.generate_all(f"{when} {kind}", max_tokens=30)
    assert "SECRET" not in str(caught.value)
    instance = modal.Cls.from_name("mortal", "Model").with_options(gpu=scripted.GPU, timeout=scripted.TIMEOUT)()
    with pytest.raises(EngineFailedError, match=f"the engine raised {kind.rpartition('.')[2]}|cancelled itself") as failed:
        await instance.generate.remote.aio(text=f"{when} {kind}", max_tokens=30)
    assert "SECRET" not in str(failed.value)
    assert (await counts())[:3] == (process, starts, calls + 2)
    (container,) = [one for one in mortal.containers("mortal/Model") if one.process.pid == process]
    assert container.output().count("SECRET") >= 2, "its log says more"


async def test_wrong_fields_are_a_value_error_for_whoever_calls_the_class(mortal: ModalCloud) -> None:
    instance = modal.Cls.from_name("mortal", "Model").with_options(gpu=scripted.GPU, timeout=scripted.TIMEOUT)()
    with pytest.raises(ValueError, match=r"max_tokens: .*; scratch: ") as caught:
        await instance.generate.remote.aio(text="SECRET", max_tokens=0, scratch=1)
    assert type(caught.value) is ValueError
    assert "SECRET" not in str(caught.value)


def sockets_of(container: Container) -> list[Path]:
    """Returns the Unix sockets of llama.cpp in the container's process."""
    sockets = psutil.Process(container.process.pid).net_connections("unix")
    return [path for socket in sockets if (path := Path(str(socket.laddr))).name == "llama.sock"]


@pytest.mark.thorough
async def test_llama_cpp_that_no_longer_answers_is_started_again(prepared: ModalCloud) -> None:
    await deployed(prepared, "llama", FLYWHEEL_DEPLOY_GATEWAY_MIN_CONTAINERS="1")
    await until(lambda: bool(prepared.containers("llama/Gateway")), "there is a gateway")
    (gateway,) = prepared.containers("llama/Gateway")
    await until(lambda: any(tunnel.task_id == gateway.task_id for tunnel in prepared.tunnels), "it can be reached")
    (tunnel,) = [tunnel for tunnel in prepared.tunnels if tunnel.task_id == gateway.task_id]
    async with through(tunnel, prepared) as target:
        await target.stub.GenerateAll(request("hello"), metadata=AUTHORIZATION)
        (container,) = prepared.containers("llama/Model")
        (socket,) = sockets_of(container)
        socket.unlink()

        async def succeeds() -> bool:
            code = await target.stub.GenerateAll(request("hello"), metadata=AUTHORIZATION).code()
            assert code in {grpc.StatusCode.OK, UNAVAILABLE}
            return bool(code is grpc.StatusCode.OK)

        assert not await succeeds()
        await until(succeeds, "a call succeeds", within=30)
        assert prepared.containers("llama/Model") == [container]
        assert sockets_of(container) != [socket]


async def events_of(engine: SupervisedEngine, text: str) -> list[Event]:
    prepared = await engine.prepare(GenerationRequest(text=text, max_tokens=10))
    return [event async for event in pulled(engine.generate, prepared)]


async def test_an_engine_that_is_not_to_be_started_again_is_given_up() -> None:
    given_up = asyncio.Event()

    async def give_up() -> None:
        given_up.set()

    mortal = MortalEngine()
    async with SupervisedEngine(mortal, give_up, timeout=1.0, restarts=False) as engine:
        assert await events_of(engine, "hello")
        with pytest.raises(EngineUnavailableError):
            await events_of(engine, "queue at once")
        await given_up.wait()
        for _ in range(3):
            with pytest.raises(EngineUnavailableError):
                await events_of(engine, "hello")
    assert mortal.starts == 1


async def test_an_engine_that_does_not_start_says_why() -> None:
    mortal = MortalEngine()
    mortal.may_start = False
    with pytest.raises(EngineFailedError, match="it is broken"):
        await SupervisedEngine(mortal, asyncio.Event().wait).__aenter__()


async def test_a_call_that_is_cancelled_leaves_nothing_in_the_engine() -> None:
    chance = random.Random(7)
    mortal = MortalEngine()
    async with SupervisedEngine(mortal, asyncio.Event().wait) as engine:
        for _ in range(100):
            call = asyncio.create_task(events_of(engine, "hello"))
            await asyncio.sleep(chance.random() * 0.03)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            assert mortal.running == 0


async def test_a_call_that_fails_by_itself_is_told_so_although_a_check_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervised, "LIVENESS_TIMEOUT", 0.05)

    class BusyEngine(MortalEngine):
        async def check(self) -> None:
            if self.calls:
                await asyncio.Event().wait()

    async with SupervisedEngine(BusyEngine(), asyncio.Event().wait) as engine:
        with pytest.raises(OSError, match="SECRET"):
            await events_of(engine, "raise-early OSError")
