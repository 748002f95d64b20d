"""The stand-in of Modal's cloud does what the real client and real containers expect of it."""

import asyncio
import os
import queue
import signal
import subprocess
import sys
import time
from datetime import datetime
from typing import Any

import modal
import pytest
from grpclib import Status
from modal.exception import AuthError, FunctionTimeoutError, InternalFailure, NotFoundError, RemoteError
from modal.exception import ConnectionError as NoConnection

from tests.modal_cloud import Container, ModalCloud, with_clock
from tests.modal_cloud.conftest import SAMPLE
from tests.serving import until


async def running(cloud: ModalCloud, name: str) -> Container:
    """Returns the container that prints the name."""
    await until(lambda: any(name in container.output() for container in cloud.containers("Model")), f"{name} runs")
    return next(container for container in cloud.containers("Model") if name in container.output())


def test_a_deployment_is_as_it_was_defined(cloud: ModalCloud) -> None:
    assert cloud.function("Gateway").warm_pool_size == 1
    assert cloud.function("GatewayServer").http_config.h2_enabled
    assert set(cloud.functions) == {"Gateway.*", "GatewayServer", "Model.*", "Broken.*", "hello", "web"}
    assert "RUN python -m pip install numpy" in cloud.image_commands("Gateway")
    assert cloud.mounted_files("Gateway") == {"/root/sample_app.py"}


async def test_containers_have_their_own_surroundings(cloud: ModalCloud, model: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("FLYWHEEL_ADDRESS", "of the parent")
    environ, file = await model.surroundings.remote.aio()
    (container,) = cloud.containers("Model")
    assert (environ["FROM_IMAGE"], environ["KEY"], environ["MODAL_TASK_ID"]) == ("an image", "value", container.task_id)
    assert "FLYWHEEL_ADDRESS" not in environ
    assert file == str(container.root / "root" / "sample_app.py")
    await model.write.remote.aio("name", "text")
    assert (cloud.volume_dir("sample-volume") / "name").read_text() == "text"


async def test_values_large_and_streamed_come_back(model: Any) -> None:
    large = "x" * 2**20
    assert await (await model.echo.spawn.aio(large)).get.aio() == large
    assert [number async for number in model.count.remote_gen.aio(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="as asked"):
        await model.fail.remote.aio()


async def test_many_calls_at_once_answer_through_queues(model: Any, client: modal.Client) -> None:
    async with modal.Queue.ephemeral(client=client) as answers:

        async def call(number: int) -> Any:
            spawned = await model.send.spawn.aio(answers, f"p{number}", [number, -number])
            received: list[int] = []
            while len(received) < 2:
                received += await answers.get_many.aio(2, timeout=60, partition=f"p{number}")
            await spawned.get.aio()
            return received

        assert await asyncio.gather(*(call(number) for number in range(64))) == [[number, -number] for number in range(64)]
        assert await answers.len.aio(total=True) == 0
        await answers.put_many.aio([1, 2, 3])
        await answers.clear.aio()
        with pytest.raises(queue.Empty):
            await answers.get_many.aio(1, timeout=0.01)


async def test_dicts_are_shared_by_name(client: modal.Client) -> None:
    shared = modal.Dict.from_name("shared", create_if_missing=True, client=client)
    await shared.put.aio("key", {"value": 1})
    found = modal.Dict.from_name("shared", client=client)
    assert [item async for item in found.items.aio()] == [("key", {"value": 1})]
    assert await found.pop.aio("key") == {"value": 1}
    assert await found.get.aio("key") is None
    with pytest.raises(NotFoundError, match="Dict 'other' not found"):
        await modal.Dict.from_name("other", client=client).len.aio()


@pytest.mark.parametrize("kind", [modal.Queue, modal.Dict])
async def test_what_is_ephemeral_expires_without_heartbeats(cloud: ModalCloud, client: modal.Client, kind: Any) -> None:
    usual, cloud.ephemeral_lifetime = cloud.ephemeral_lifetime, 0.5
    async with kind.ephemeral(client=client, _heartbeat_sleep=0.1) as kept, kind.ephemeral(client=client) as left:
        await asyncio.sleep(0.8)
        assert await kept.len.aio() == 0
        with pytest.raises(NotFoundError, match=f"{left.object_id} not found"):
            await left.len.aio()
        cloud.ephemeral_lifetime = usual
        named = kind.from_name("not-ephemeral", create_if_missing=True, client=client)
        assert await named.len.aio() == 0
        await asyncio.to_thread(cloud.expire_ephemeral)
        with pytest.raises(NotFoundError):
            await kept.len.aio()
        assert await named.len.aio() == 0


async def test_a_caller_that_waits_at_a_queue_hears_that_the_queue_is_gone(cloud: ModalCloud, client: modal.Client) -> None:
    async with modal.Queue.ephemeral(client=client) as answers:
        arrived = cloud.rpcs["QueueGet"]
        waiting = asyncio.create_task(answers.get.aio())
        await until(lambda: cloud.rpcs["QueueGet"] > arrived, "it waits")
        await asyncio.to_thread(cloud.expire_ephemeral)
        with pytest.raises(NotFoundError):
            await waiting


async def test_a_partition_is_cleared_some_time_after_its_last_put(client: modal.Client) -> None:
    async with modal.Queue.ephemeral(client=client) as answers:
        await answers.put.aio("old", partition="short", partition_ttl=1)
        await answers.put.aio("kept", partition="long")
        await asyncio.sleep(1.1)
        assert await answers.get_many.aio(1, block=False, partition="short") == []
        assert await answers.get.aio(partition="long") == "kept"


async def test_values_of_a_queue_may_be_read_and_left_there(client: modal.Client) -> None:
    named = modal.Queue.from_name("read", create_if_missing=True, client=client)
    await named.put_many.aio([1, 2, 3])
    assert [value async for value in named.iterate.aio()] == [1, 2, 3]
    assert await named.len.aio() == 3


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["secret", "dict", "queue", "volume"])
def test_the_command_makes_lists_and_deletes(cloud: ModalCloud, kind: str) -> None:
    def modal_command(*arguments: str) -> str:
        done = cloud.cli(kind, *arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    modal_command("create", "to-delete", *(["KEY=value"] if kind == "secret" else []))
    assert "to-delete" in modal_command("list")
    modal_command("delete", "--yes", "to-delete")
    assert "to-delete" not in modal_command("list")
    missing = cloud.cli(kind, "delete", "--yes", "to-delete")
    assert (missing.returncode, "not found" in missing.stderr) == (1, True), missing.stderr


async def test_a_deleted_dict_is_gone_for_clients_that_have_a_handle(cloud: ModalCloud, client: modal.Client) -> None:
    held = modal.Dict.from_name("held", create_if_missing=True, client=client)
    await held.put.aio("key", 1)
    assert (await asyncio.to_thread(cloud.cli, "dict", "delete", "--yes", "held")).returncode == 0
    for use in (held.put.aio("key", 2), held.get.aio("key"), held.len.aio()):
        with pytest.raises(NotFoundError):
            await use
    made_again = modal.Dict.from_name("held", create_if_missing=True, client=client)
    assert await made_again.len.aio() == 0


async def test_what_is_not_deployed_is_not_found(client: modal.Client) -> None:
    for lookup in (modal.Cls.from_name, modal.Function.from_name):
        for app, name in (("sample", "Other"), ("other", "Model")):
            with pytest.raises(NotFoundError):
                await lookup(app, name, client=client).hydrate.aio()
    with pytest.raises(NotFoundError):
        await modal.Server.from_name("sample", "Other", client=client).get_url.aio()


async def test_cancelled_calls_end_in_the_container_together(cloud: ModalCloud, model: Any) -> None:
    calls = [await model.sleep.spawn.aio(f"c{number}") for number in range(8)]
    container = await running(cloud, "sleeping c7")
    await until(lambda: all(f"sleeping c{number}" in container.output() for number in range(8)), "all are running")
    await asyncio.gather(*(call.cancel.aio() for call in calls))
    await until(lambda: all(f"awake c{number}" in container.output() for number in range(8)), "all have ended", within=3)
    with pytest.raises(RemoteError):
        await calls[0].get.aio()
    assert {call.state for call in cloud.calls if call.id in {call.object_id for call in calls}} == {"cancelled"}
    assert {call.object_id for call in calls} <= set(cloud.cancelled)


@pytest.mark.thorough
async def test_options_make_a_variant_with_containers_of_its_own(cloud: ModalCloud, client: modal.Client) -> None:
    variant = modal.Cls.from_name("sample", "Model", client=client).with_options(gpu="A10G", timeout=1)()
    with pytest.raises(FunctionTimeoutError):
        await variant.sleep.remote.aio("briefly")
    container = await running(cloud, "sleeping briefly")
    assert (container.definition.timeout_secs, container.definition.resources.gpu_config.gpu_type) == (1, "A10G")
    await until(lambda: "awake briefly" in container.output(), "it was cancelled in the container")
    await until(lambda: not container.inputs, "the container is idle")
    await asyncio.to_thread(cloud.scale_to_zero, "Model")
    assert (cloud.containers("Model"), container.wait()) == ([], 0)


async def test_stats_tell_backlog_and_runners(cloud: ModalCloud, model: Any) -> None:
    await model.echo.remote.aio(1)
    assert (await model.echo.get_current_stats.aio()).num_total_runners == 1
    cloud.set_stats(7, 0)
    stats = await model.echo.get_current_stats.aio()
    cloud.set_stats(None)
    assert (stats.backlog, stats.num_total_runners) == (7, 0)


async def test_inputs_of_a_lost_container_run_again_or_fail(cloud: ModalCloud, model: Any) -> None:
    call = await model.sleep.spawn.aio("lost")
    for lose, code in ((Container.interrupt, 0), (Container.kill, -signal.SIGKILL)):
        container = await running(cloud, "sleeping lost")
        lose(container)
        assert await asyncio.to_thread(container.wait) == code
    cloud.reschedules_inputs = False
    (await running(cloud, "sleeping lost")).kill()
    with pytest.raises(InternalFailure):
        await call.get.aio()
    cloud.reschedules_inputs = True


async def test_a_container_that_cannot_start_fails_its_inputs(client: modal.Client) -> None:
    with pytest.raises(RuntimeError, match="no such weights"):
        await modal.Cls.from_name("sample", "Broken", client=client)().answer.remote.aio()


@pytest.mark.thorough
async def test_the_clocks_of_containers_may_be_wrong(cloud: ModalCloud, client: modal.Client) -> None:
    for name, offset, within in (("sample", -600, 5), ("sample/Model", 100, 5), ("sample/Model", 0, 5)):
        cloud.set_clock(name, offset)
        await asyncio.to_thread(cloud.scale_to_zero, "Model")
        readings, monotonic, now = await modal.Cls.from_name("sample", "Model", client=client)().clocks.remote.aio()
        assert [round(reading - time.time() - offset) for reading in readings] == pytest.approx([0] * 5, abs=within)
        assert abs(monotonic - time.monotonic()) < within
        assert type(now) is datetime
    cloud.set_clock("sample", 0)


CALL_BY_A_WRONG_CLOCK = """
import asyncio, time, grpc.aio

async def remaining(request, context):
    return str(context.time_remaining()).encode()

async def call():
    server = grpc.aio.server()
    handler = grpc.unary_unary_rpc_method_handler(remaining)
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("s", {"m": handler})])
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    with grpc.insecure_channel(address) as channel:
        answer = await asyncio.to_thread(channel.unary_unary("/s/m"), b"", timeout=30)
    async with grpc.aio.insecure_channel(address) as channel:
        print(time.time(), answer.decode(), (await channel.unary_unary("/s/m")(b"", timeout=30)).decode())

asyncio.run(call())
"""


@pytest.mark.parametrize("offset", [-3600, 3600])
def test_the_clock_of_a_client_may_be_wrong_and_its_deadlines_are_right(offset: int) -> None:
    environ = with_clock(os.environ, offset)
    told = subprocess.check_output([sys.executable, "-c", CALL_BY_A_WRONG_CLOCK], env=environ, timeout=60)
    wrong, *remaining = (float(each) for each in told.split())
    assert abs(wrong - offset - time.time()) < 5
    assert len(remaining) == 2
    assert all(10 < each < 31 for each in remaining), remaining


async def test_an_app_has_tags(client: modal.Client) -> None:
    app = await modal.App.lookup.aio("sample", client=client)
    assert await app.get_tags.aio(client=client) == {"made": "at-deployment"}
    await app.set_tags.aio({"made": "later"}, client=client)
    assert await app.get_tags.aio(client=client) == {"made": "later"}
    with pytest.raises(NotFoundError, match="App 'other' not found"):
        await modal.App.lookup.aio("other", client=client)
    assert await (await modal.App.lookup.aio("new", client=client, create_if_missing=True)).get_tags.aio(client=client) == {}


@pytest.mark.thorough
def test_the_command_lists_apps_and_containers(cloud: ModalCloud) -> None:
    (gateway,) = cloud.containers("Gateway")
    for command, expected in (("app", "sample"), ("container", gateway.task_id)):
        listed = cloud.cli(command, "list")
        assert (listed.returncode, expected in listed.stdout) == (0, True), listed.stdout + listed.stderr


@pytest.mark.thorough
def test_a_function_runs_from_the_command_line(cloud: ModalCloud) -> None:
    ran = cloud.cli(
        "run", f"{SAMPLE}::hello", "--name", "world", env={"SAMPLE_VOLUME": cloud.function("Model").volume_mounts[0].mount_path}
    )
    assert (ran.returncode, "hello world" in ran.stdout) == (0, True), ran.stdout + ran.stderr


async def test_clients_may_be_refused_or_cut_off(cloud: ModalCloud, model: Any) -> None:
    await model.echo.remote.aio(1)
    cloud.disturb("FunctionMap", status=Status.UNAUTHENTICATED, message="no such token")
    with pytest.raises(AuthError, match="no such token"):
        await model.echo.remote.aio(1)
    cloud.calm()
    call = await model.sleep.spawn.aio("through it")
    container = await running(cloud, "sleeping through it")
    cloud.down()
    with pytest.raises(NoConnection):
        await call.get.aio(timeout=1)
    cloud.up()
    await call.cancel.aio()
    await until(lambda: "awake through it" in container.output(), "the container heard of it")


async def test_rpcs_may_be_limited_slow_or_fail_now_and_then(
    cloud: ModalCloud, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MODAL_MAX_THROTTLE_WAIT", raising=False)  # a gateway sets it for its process
    fault = cloud.disturb("FunctionMap", status=Status.ABORTED, times=1)
    with pytest.raises(modal.exception.ConflictError):
        await model.echo.remote.aio(1)
    assert await model.echo.remote.aio(1) == 1
    assert fault.befallen == 1

    limit = cloud.limit("FunctionMap", per_second=1, retry_after=0.1)
    assert [await model.echo.remote.aio(number) for number in range(3)] == [0, 1, 2], "the client repeats what is limited"
    assert limit.befallen
    cloud.calm()

    cloud.disturb("FunctionMap", delay=0.3)
    started = asyncio.get_running_loop().time()
    await model.echo.remote.aio(1)
    assert asyncio.get_running_loop().time() - started >= 0.3
    cloud.calm()


@pytest.mark.thorough
async def test_a_deleted_volume_leaves_no_files_and_starts_no_containers(cloud: ModalCloud, model: Any) -> None:
    await model.write.remote.aio("left", "text")
    await asyncio.to_thread(cloud.scale_to_zero, "Model")
    assert (await asyncio.to_thread(cloud.cli, "volume", "delete", "--yes", "sample-volume")).returncode == 0
    with pytest.raises(RemoteError, match=r"Volume .* not found"):
        await model.echo.remote.aio(1)
    mount = cloud.function("Model").volume_mounts[0].mount_path
    deployed = await asyncio.to_thread(cloud.cli, "deploy", str(SAMPLE), env={"SAMPLE_VOLUME": mount})
    assert deployed.returncode == 0
    assert list(cloud.volume_dir("sample-volume").iterdir()) == []
    await until(lambda: len(cloud.containers("Gateway")) == 1, "the container of the old version has ended")


@pytest.mark.thorough
async def test_a_redeployment_replaces_containers(cloud: ModalCloud, client: modal.Client) -> None:
    (old,) = cloud.containers("Gateway")
    mount = cloud.function("Model").volume_mounts[0].mount_path
    deployed = await asyncio.to_thread(cloud.cli, "deploy", str(SAMPLE), env={"SAMPLE_VOLUME": mount})
    assert deployed.returncode == 0
    assert await asyncio.to_thread(old.wait) == 0
    (new,) = cloud.containers("Gateway")
    assert new.task_id != old.task_id
    assert cloud.cli("app", "stop", "sample", "--yes").returncode == 0
    await until(lambda: not cloud.containers("Gateway"), "all have ended")
    with pytest.raises(NotFoundError):
        await modal.Cls.from_name("sample", "Model", client=client).hydrate.aio()
