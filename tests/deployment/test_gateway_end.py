"""How a gateway's container ends: in time when Modal ends it, however slow Modal is, and by itself if its server has ended."""

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import grpc.aio
import pytest
from flywheel_proto.v1 import generation_pb2 as pb
from flywheel_server import stopping
from flywheel_server.deployment import gateway
from flywheel_server.deployment.settings import MAX_STOP_SECONDS
from flywheel_server.engines.modal import engine as modal_engine
from flywheel_server.engines.scripted import Script

from tests.deployment.conftest import AUTHORIZATION, current, deployed, published, records, through
from tests.modal_cloud import Container, ModalCloud, scripted
from tests.serving import drained, until
from tests.thorough import further

DRAIN = 1.0
AFTER_THE_DRAIN = gateway.MODAL_GRACE_SECONDS - MAX_STOP_SECONDS
"""Seconds that a container has left after the longest drain that the settings allow."""
ENDLESS = pb.GenerationRequest(text="hello", max_tokens=8000)


def test_what_a_container_does_at_its_end_fits_into_what_modal_grants() -> None:
    assert (
        MAX_STOP_SECONDS + modal_engine.STOP_GRACE + stopping.STATUS_GRACE + gateway.FLUSH_SECONDS
        <= gateway.STOP_TIMEOUT
        < gateway.MODAL_GRACE_SECONDS
    )


@pytest.fixture(scope="module")
def endless(prepared: ModalCloud) -> ModalCloud:
    """A class that generates a token each 10 ms, so that an endless call lasts longer than any test."""
    scripted.deploy(prepared, "endless", Script(token_delay=0.01))
    return prepared


def code_of(end: object) -> grpc.StatusCode | None:
    return end.code() if isinstance(end, grpc.aio.AioRpcError) else None


def unfinished(cloud: ModalCloud) -> list[str]:
    return [call.id for call in cloud.calls if call.target.app.description == "endless" and not call.finished]


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["tunnel", "server"])
async def test_a_slow_control_plane_leaves_neither_an_address_nor_a_call(
    endless: ModalCloud, kind: str, unused_tcp_port: int
) -> None:
    app, name = f"slow-{kind}", {"tunnel": "Gateway", "server": "GatewayServer"}[kind]
    await deployed(
        endless,
        app,
        FLYWHEEL_DEPLOY_EXPOSE=kind,
        FLYWHEEL_DEPLOY_ADDRESS=f"127.0.0.1:{unused_tcp_port}",
        FLYWHEEL_MODAL_APP="endless",
        FLYWHEEL_DRAIN_TIMEOUT=f"{DRAIN}",
    )
    await until(lambda: any(one.ready for one in current(endless, f"{app}/{name}")), "the gateway is up")
    (container,) = current(endless, f"{app}/{name}")
    relay = (await published(endless, app))[0] if kind == "tunnel" else endless.address(f"{app}/{name}")
    endless.replaces_containers = False
    try:
        async with through(relay, endless) as target:
            streams = [target.stub.GenerateDeltas(ENDLESS, metadata=AUTHORIZATION) for _ in range(4)]
            whole = [target.stub.GenerateAll(ENDLESS, metadata=AUTHORIZATION) for _ in range(4)]
            await asyncio.gather(*(anext(aiter(stream)) for stream in streams))
            await until(lambda: len(unfinished(endless)) == 8, "all calls are on Modal")
            endless.disturb(delay=5.0, side="both")
            began = time.monotonic()
            container.interrupt()

            async def refused() -> bool:
                # Not a generation, which would be on its way to Modal for longer than this drain.
                code = await target.stub.GetModel(pb.GetModelRequest(), metadata=AUTHORIZATION).code()
                return bool(code is grpc.StatusCode.UNAVAILABLE)

            if kind == "tunnel":  # the relay of a server lets calls wait for another container
                await until(refused, "new calls are not taken, whatever happens to the address", within=DRAIN + 2)
            ends = await asyncio.gather(*(drained(call) for call in (*streams, *whole)), return_exceptions=True)
            assert {code_of(end) for end in ends} == {grpc.StatusCode.UNAVAILABLE}
        # Modal kills the container, as long after this drain as after the longest drain.
        await asyncio.sleep(began + DRAIN + AFTER_THE_DRAIN - time.monotonic())
        container.kill()
        await asyncio.to_thread(container.wait)
        assert unfinished(endless) == []
    finally:
        endless.calm()
        endless.replaces_containers = True
    assert await records(app) == {}


@pytest.mark.thorough
@pytest.mark.parametrize("starting", [True, False])
async def test_a_slow_withdrawal_is_waited_for_without_calls_too(endless: ModalCloud, starting: bool) -> None:
    app = "starting" if starting else "idle"
    endless.replaces_containers = False
    try:
        if starting:
            publications = endless.rpcs["DictUpdate"]
            endless.disturb("DictUpdate", delay=2.0, side="containers")
            deploying = asyncio.create_task(deployed(endless, app, FLYWHEEL_MODAL_APP="endless"))
            await until(lambda: endless.rpcs["DictUpdate"] > publications, "the gateway publishes its address")
        else:
            await deployed(endless, app, FLYWHEEL_MODAL_APP="endless")
            await until(lambda: any(one.ready for one in current(endless, f"{app}/Gateway")), "the gateway is up")
            await published(endless, app)
        (container,) = current(endless, f"{app}/Gateway")
        assert container.ready != starting
        endless.disturb(delay=5.0, side="containers")
        container.interrupt()
        await asyncio.to_thread(container.wait)
        if starting:
            await deploying
    finally:
        endless.calm()
        endless.replaces_containers = True
    assert await records(app) == {}


@pytest.mark.thorough
async def test_the_last_bytes_of_a_server_have_time_to_get_through(endless: ModalCloud, unused_tcp_port: int) -> None:
    await deployed(
        endless,
        "last-bytes",
        FLYWHEEL_DEPLOY_EXPOSE="server",
        FLYWHEEL_DEPLOY_ADDRESS=f"127.0.0.1:{unused_tcp_port}",
        FLYWHEEL_MODAL_APP="endless",
    )
    async with through(endless.address("last-bytes/GatewayServer"), endless) as target:
        call = target.stub.GenerateAll(
            pb.GenerationRequest(text="hello", max_tokens=200), metadata=AUTHORIZATION, wait_for_ready=True
        )
        await until(lambda: len(unfinished(endless)) == 1, "the call is on Modal")
        (container,) = current(endless, "last-bytes/GatewayServer")
        container.stop()
        assert (await call).num_samples == 1
        ended = time.monotonic()
    assert await asyncio.to_thread(container.wait) == 0
    assert time.monotonic() - ended > gateway.FLUSH_SECONDS


@pytest.fixture(scope="module")
def breaking(cloud: ModalCloud, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Deploys gateways that break, and gives the directory that tells them how."""
    told = tmp_path_factory.mktemp("break")
    environment = {
        "BREAK": str(told),
        "FLYWHEEL_ADDRESS": "127.0.0.1:0",
        "FLYWHEEL_API_KEYS": "0123456789abcdef",
        "FLYWHEEL_ENGINE": "scripted",
        "FLYWHEEL_WITHDRAW_WINDOW": "0",
    }
    done = cloud.cli("deploy", str(Path(__file__).parent / "breaking_gateway.py"), env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    yield told
    cloud.cli("app", "stop", "breaking", "--yes")


async def only(cloud: ModalCloud, name: str) -> Container:
    await until(lambda: [one.ready for one in cloud.containers(name)] == [True], "one container is up")
    return cloud.containers(name)[0]


@pytest.mark.parametrize("manner", ["the engine is dead", *further(["a bug", "cancelled", "it exits", "its event loop stops"])])
@pytest.mark.parametrize("name", ["Gateway", *further(["GatewayServer"])])
async def test_a_gateway_that_ends_by_itself_ends_its_container(
    cloud: ModalCloud, breaking: Path, name: str, manner: str
) -> None:
    container = await only(cloud, f"breaking/{name}")
    (breaking / container.task_id).write_text(manner)
    assert await asyncio.to_thread(container.wait, 20) == 0
    assert "ended by itself" in container.output()
    assert "the exit hook has run" in container.output()
    replacement = await only(cloud, f"breaking/{name}")
    assert replacement.task_id != container.task_id

    async def published_anew() -> bool:
        return set(await records("breaking")) == {one.task_id for one in cloud.containers("breaking/Gateway")}

    await until(published_anew, "the address of the container that ended is withdrawn, and that of its replacement published")
