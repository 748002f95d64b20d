"""The deployed service: what arrives at Modal, and a real client through TLS into the real container."""

import asyncio
import json
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import modal
import pytest
from flywheel_client import AsyncClient
from flywheel_proto.v1 import generation_pb2 as pb
from flywheel_server.deployment.weights import find
from flywheel_server.engines.modal.remote_fields import TRACE_ARGUMENT
from flywheel_server.engines.scripted import Script
from flywheel_server.health import RUNNERS
from flywheel_server.messages import CONSTRAINT_FIELDS, SERVER_FIELDS, GenerationRequest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from modal_proto import api_pb2

from tests.deployment.conftest import AUTHORIZATION, KEY, ROOT, VOLUME, current, deploy, deployed, published, records, through
from tests.modal_cloud import Container, ModalCloud, Tunnel, scripted
from tests.serving import until

NOT_TAKEN = {*SERVER_FIELDS, *CONSTRAINT_FIELDS}
"""Fields that a Model on a GPU does not take."""
REQUEST = pb.GenerationRequest(text="What is a llama?", max_tokens=12, num_samples=3)
SHORT = pb.GenerationRequest(text="hello", max_tokens=1)


def package_files() -> list[Path]:
    """Returns the files that the packages need in a container, relative to the folders that they are imported from."""
    return [
        file.relative_to(ROOT / folder)
        for folder in ("proto", "server", "client")
        for file in (ROOT / folder).glob("flywheel_*/**/*.*")
        if file.suffix not in {".pyc", ".pyi", ".typed"}
    ]


async def health(target: Any, service: str = "") -> int:
    stub = health_pb2_grpc.HealthStub(target.channel)
    return int((await stub.Check(health_pb2.HealthCheckRequest(service=service))).status)


def test_without_a_key_nothing_is_deployed(cloud: ModalCloud) -> None:
    refused = deploy(cloud, "keyless")
    assert refused.returncode == 1
    for expected in ('no modal.Secret "flywheel-grpc-keys"', "modal secret create flywheel-grpc-keys FLYWHEEL_API_KEYS="):
        assert expected in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not [tag for tag in cloud.functions if tag.startswith("keyless/")]


def test_what_does_not_fit_is_not_deployed(prepared: ModalCloud) -> None:
    refused = deploy(prepared, "large", FLYWHEEL_DEPLOY_WEIGHTS="mixtral-8x7b-instruct-q4_k_m")
    assert refused.returncode == 1
    assert "does not fit A10G" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_what_arrives_at_modal(prepared: ModalCloud) -> None:
    """All defaults, except that the stand-in mounts volumes in its own directory, and that no gateway starts here."""
    done = deploy(
        prepared,
        "defaults",
        FLYWHEEL_DEPLOY_WEIGHTS="mixtral-8x7b-instruct-q3_k_s",
        FLYWHEEL_DEPLOY_GATEWAY_MIN_CONTAINERS="0",
        FLYWHEEL_DEPLOY_EXPOSE="both",
        FLYWHEEL_DEPLOY_ADDRESS="127.0.0.1:50051",
    )
    assert done.returncode == 0, done.stderr
    gateway, server, model = (prepared.function(f"defaults/{name}") for name in ("Gateway", "GatewayServer", "Model"))
    assert model.resources.gpu_config.gpu_type == "A10G"
    assert model.resources.gpu_config.count == 1
    assert model.timeout_secs == 600
    assert model.max_concurrent_inputs == 16
    assert model.concurrency_limit == 1, "each GPU bills"
    assert (model.resources.milli_cpu, model.resources.memory_mb) == (2000, 4096)
    assert [mount.mount_path for mount in model.volume_mounts] == [str(prepared.directory / "weights")]
    for method, before in (("generate", []), ("generate_deltas", ["queue", "partition", "call"]), ("tokenize", [])):
        told = [argument.name for argument in model.method_definitions[method].function_schema.arguments]
        assert told == [*before, *(name for name in GenerationRequest.model_fields if name not in NOT_TAKEN), TRACE_ARGUMENT]
    assert not model.secret_ids or prepared.function("defaults/Model").secret_ids != gateway.secret_ids
    for function in (gateway, server):
        assert not function.resources.gpu_config.gpu_type
        assert not function.volume_mounts
        assert len(function.secret_ids) == 2  # the keys, and the environment
        assert (function.resources.milli_cpu, function.resources.memory_mb) == (500, 512)
    assert gateway.method_definitions
    assert (server.http_config.port, server.http_config.h2_enabled) == (50051, True)

    built = "\n".join(prepared.image_commands("defaults/Gateway"))
    assert "--require-hashes" in built
    for heavy in ("cuda", "xllamacpp", "nvidia", "huggingface"):
        assert heavy not in built.lower()
    built = "\n".join(prepared.image_commands("defaults/Model"))
    for expected in (
        *("nvidia/cuda", "CUDA_ARCHITECTURES=86", "--require-hashes", "--no-binary xllamacpp"),
        "-DLLAMA_USE_PREBUILT_UI=OFF",  # the build would fetch it in some version
        "--no-build-isolation",  # pip would fetch the build tools in some version
    ):
        assert expected in built
    assert built.index("--only-binary :all:") < built.index("--no-build-isolation"), "the build tools are installed first"
    assert "huggingface" not in built.lower()
    needed = {f"/root/{file}" for file in package_files()}
    assert {"/root/flywheel_server/server.py", "/root/flywheel_proto/v1/generation_grpc_service_config.json"} <= needed
    for each in ("Gateway", "GatewayServer", "Model", "endpoints"):
        assert {"/root/modal_deploy.py", *needed} <= prepared.mounted_files(f"defaults/{each}"), each


async def test_a_real_client_gets_samples_and_deltas_through_the_tunnel(prepared: ModalCloud) -> None:
    await deployed(prepared, "service", FLYWHEEL_DEPLOY_MODEL_MIN_CONTAINERS="1")
    (tunnel,) = await published(prepared, "service")
    assert tunnel.type == api_pb2.TUNNEL_TYPE_H2
    assert prepared.function("service/Gateway").autoscaler_settings.min_containers == 1
    async with through(tunnel, prepared) as target:

        async def is_serving() -> bool:
            return bool(await health(target) == health_pb2.HealthCheckResponse.SERVING)

        await until(is_serving, "it is serving")
        assert await health(target, RUNNERS) == health_pb2.HealthCheckResponse.NOT_SERVING
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await target.stub.GenerateAll(REQUEST)
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        samples = [sample async for sample in target.stub.Generate(REQUEST, metadata=AUTHORIZATION)]
        assert sorted(sample.index for sample in samples) == [0, 1, 2]
        assert all(sample.text and sample.prompt_tokens > 4 for sample in samples)
        deltas = [delta async for delta in target.stub.GenerateDeltas(REQUEST, metadata=AUTHORIZATION)]
        assert len([delta for delta in deltas if delta.text]) > 3
        assert sorted(delta.index for delta in deltas if delta.finished) == [0, 1, 2]
        assert await health(target, RUNNERS) == health_pb2.HealthCheckResponse.SERVING
        stats = await target.stub.GetStats(pb.GetStatsRequest(), metadata=AUTHORIZATION)
        assert stats.num_total_runners == 1
        model = await target.stub.GetModel(pb.GetModelRequest(), metadata=AUTHORIZATION)
        assert (model.engine, model.context_tokens) == ("flywheel", 8192)
        assert {*model.supported_fields} == {*GenerationRequest.model_fields} - {*CONSTRAINT_FIELDS}
    (only,) = prepared.containers("service/Model")  # the one that the deployment keeps warm is the one that is called
    assert only.definition.resources.gpu_config.gpu_type == "A10G"
    assert not await maps_weights(only)

    (record,) = (await records("service")).values()
    status, headers, body = await asyncio.to_thread(prepared.web_get, "service/endpoints", "/")
    assert (status, headers["content-type"]) == (200, "application/json")
    (endpoint,) = json.loads(body)["endpoints"]
    assert endpoint["address"] == record["address"] == f"{tunnel.host}:{tunnel.port}"
    assert abs(record["refreshed"] - time.time()) < 60


@pytest.fixture(scope="module")
def slow(prepared: ModalCloud) -> ModalCloud:
    """A gateway to a class that generates a token each 10 ms, in another app: one setting points there."""
    scripted.deploy(prepared, "unhurried", Script(token_delay=0.01))
    done = deploy(prepared, "slow-service", FLYWHEEL_MODAL_APP="unhurried")
    assert done.returncode == 0, done.stdout + done.stderr
    return prepared


def container(cloud: ModalCloud, app: str) -> Container:
    (only,) = current(cloud, f"{app}/Gateway")
    return only


async def test_preemption_withdraws_the_address_and_lets_calls_finish(slow: ModalCloud) -> None:
    (tunnel,) = await published(slow, "slow-service")
    gateway = container(slow, "slow-service")
    assert not slow.function("slow-service/Gateway").resources.gpu_config.gpu_type
    assert "slow-service/Model" not in slow.functions
    async with through(tunnel, slow) as target:
        request = pb.GenerationRequest(text="hello", max_tokens=600)
        messages = aiter(target.stub.GenerateDeltas(request, metadata=AUTHORIZATION))
        text = (await anext(messages)).text
        gateway.interrupt()

        async def withdrawn() -> bool:
            return gateway.task_id not in await records("slow-service")

        await until(withdrawn, "the address is withdrawn", within=15)
        text += (await anext(messages)).text
        assert gateway.alive

        async def closed() -> bool:
            # gRPC may end a call with CANCELLED if it arrives at the moment of the stop (grpc#41785).
            code = await target.stub.GenerateAll(SHORT, metadata=AUTHORIZATION).code()
            assert code in {grpc.StatusCode.OK, grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE}
            return bool(code is grpc.StatusCode.UNAVAILABLE)

        await until(closed, "new calls are not taken", within=15)
        assert gateway.alive
        finish_reason = ""
        async for message in messages:
            text += message.text
            finish_reason = message.finish_reason
        assert finish_reason == "length"
        assert text == Script().text * 40  # 15 tokens each
    assert await asyncio.to_thread(gateway.wait, 20) == 0
    # Modal replaces the gateway, and callers find the new one.
    (replacement,) = await published(slow, "slow-service")
    async with through(replacement, slow) as target:
        assert (await target.stub.GenerateAll(REQUEST, metadata=AUTHORIZATION)).num_samples == 3


async def test_a_stable_address_instead_of_a_tunnel(prepared: ModalCloud, unused_tcp_port: int) -> None:
    await asyncio.to_thread(scripted.deploy, prepared, "unhurried", Script(token_delay=0.01))
    await deployed(
        prepared,
        "stable",
        FLYWHEEL_DEPLOY_EXPOSE="server",
        FLYWHEEL_MODAL_APP="unhurried",
        FLYWHEEL_DEPLOY_ADDRESS=f"127.0.0.1:{unused_tcp_port}",
    )
    url = await modal.Server.from_name("stable", "GatewayServer").get_url.aio()
    assert url is not None
    async with through(url.removeprefix("https://"), prepared) as target:
        response = await target.stub.GenerateAll(REQUEST, metadata=AUTHORIZATION, wait_for_ready=True, timeout=30)
        assert response.num_samples == 3
    assert await records("stable") == {}
    with pytest.raises(KeyError):
        prepared.function("stable/Gateway")


async def test_a_redeployment_replaces_the_gateway_and_loses_no_call(slow: ModalCloud) -> None:
    (tunnel,) = await published(slow, "slow-service")
    async with through(tunnel, slow) as target:
        request = pb.GenerationRequest(text="hello", max_tokens=300)
        messages = aiter(target.stub.GenerateDeltas(request, metadata=AUTHORIZATION))
        await anext(messages)
        await deployed(slow, "slow-service", FLYWHEEL_MODAL_APP="unhurried")
        last = [message async for message in messages][-1]
        assert last.finish_reason == "length"
    (other,) = await published(slow, "slow-service")
    assert other.port != tunnel.port


async def test_weights_that_were_not_fetched_are_named(prepared: ModalCloud) -> None:
    await deployed(prepared, "empty", FLYWHEEL_DEPLOY_WEIGHTS="mistral-7b-instruct-q8_0")
    (tunnel,) = await published(prepared, "empty")
    async with through(tunnel, prepared) as target:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await target.stub.GenerateAll(REQUEST, metadata=AUTHORIZATION)
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        fetch = "FLYWHEEL_MODAL_GPU=A10G modal run -e main modal_deploy.py::fetch_weights"
        assert f"FLYWHEEL_DEPLOY_WEIGHTS=mistral-7b-instruct-q8_0 {fetch}" in str(caught.value.details())


async def maps_weights(container: Container) -> bool:
    """Returns whether the container has the file of the weights mapped into its memory, instead of read."""
    return ".gguf" in await asyncio.to_thread(Path(f"/proc/{container.process.pid}/maps").read_text)


@pytest.mark.thorough
async def test_weights_are_mapped_without_a_gpu(prepared: ModalCloud) -> None:
    await deployed(
        prepared,
        "mapped",
        FLYWHEEL_MODAL_GPU="none",
        FLYWHEEL_DEPLOY_GATEWAY_MIN_CONTAINERS="0",
        FLYWHEEL_DEPLOY_MODEL_CPU="1",
    )
    generate = modal.Cls.from_name("mapped", "Model")().generate
    answer = await generate.remote.aio(text="What is a llama?", max_tokens=3)
    assert answer["responses"][0]["generated_tokens"] == 3
    (only,) = prepared.containers("mapped/Model")
    assert await maps_weights(only)


def xet(environment: dict[str, str]) -> dict[str, int]:
    """Returns the numbers with which the installed version of Xet downloads in this environment."""
    program = (
        "import hf_xet, json\nprint(json.dumps({name: value for name, value in hf_xet.XetConfig() if isinstance(value, int)}))"
    )
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def test_the_weights_are_fetched_into_the_volume(prepared: ModalCloud) -> None:
    done = prepared.cli(
        "run",
        "modal_deploy.py::fetch_weights",
        env={
            "FLYWHEEL_DEPLOY_WEIGHTS": "smollm2-135m-instruct-q8_0",
            "FLYWHEEL_DEPLOY_WEIGHTS_PATH": str(prepared.directory / "weights"),
        },
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "smollm2-135m-instruct-q8_0: is there" in done.stdout
    built = "\n".join(prepared.image_commands("flywheel-grpc-weights/fetch_weights"))
    assert "--require-hashes" in built
    for heavy in ("cuda", "xllamacpp", "nvidia"):
        assert heavy not in built.lower(), "it does not wait for the image with CUDA"
    fast, by_itself = xet(dict(re.findall(r"(HF_XET_\w+)=(\w+)", built))), xet({})
    assert fast["client.ac_max_download_concurrency"] > by_itself["client.ac_max_download_concurrency"]
    memory = prepared.function("flywheel-grpc-weights/fetch_weights").resources.memory_mb * 2**20
    assert max(fast["reconstruction.download_buffer_limit"], fast["reconstruction.download_buffer_size"]) < memory
    assert find("smollm2-135m-instruct-q8_0").path(prepared.volume_dir(VOLUME)).exists()


def resident_kib(container: Container) -> int:
    """Returns how much memory the container's process has."""
    status = Path(f"/proc/{container.process.pid}/status").read_text()
    (found,) = [line for line in status.splitlines() if line.startswith("VmRSS:")]
    return int(found.split()[1])


@pytest.mark.thorough
async def test_512_calls_at_a_time_none_lost_none_mixed_up_and_memory_flat(tmp_path: Path) -> None:
    # As many streams as HTTP/2 has by default: Modal does not say how many it allows.
    with ModalCloud(tmp_path, max_streams=100) as cloud:
        cloud.create_secret("flywheel-grpc-keys", {"FLYWHEEL_API_KEYS": KEY})
        await asyncio.to_thread(scripted.deploy, cloud, "quick")
        await deployed(cloud, "busy-service", FLYWHEEL_MODAL_APP="quick", FLYWHEEL_MAX_CONCURRENT="1536")
        await until(lambda: bool(cloud.tunnels), "the gateway can be reached")
        await _512_calls_at_a_time(cloud.tunnels[0], cloud, container(cloud, "busy-service"))


async def _512_calls_at_a_time(tunnel: Tunnel, cloud: ModalCloud, gateway: Container) -> None:
    chance = random.Random(5)

    async with through(tunnel, cloud) as target:

        async def one(number: int) -> None:
            prompt_tokens, samples = chance.randrange(1, 200), chance.choice([1, 2, 3])
            fields = pb.GenerationRequest(text="x" * 4 * prompt_tokens, max_tokens=1 + number % 12, num_samples=samples)
            if number % 3 == 0:
                response = await target.stub.GenerateAll(fields, metadata=AUTHORIZATION)
                found = list(response.responses)
            else:
                method = target.stub.Generate if number % 3 == 1 else target.stub.GenerateDeltas
                found = [message async for message in method(fields, metadata=AUTHORIZATION) if message.finished]
            assert sorted((sample.index, sample.generated_tokens, sample.prompt_tokens) for sample in found) == [
                (index, fields.max_tokens, prompt_tokens) for index in range(samples)
            ]

        sizes = []
        for _ in range(3):
            await asyncio.gather(*(one(number) for number in range(512)))
            sizes.append(resident_kib(gateway))
        stats = await target.stub.GetStats(pb.GetStatsRequest(), metadata=AUTHORIZATION)
        assert (stats.active, stats.queued) == (0, 0)
    # The first round sets up buffers and connections for so many calls; after that, memory varies by some percent.
    assert sizes[2] < sizes[0] * 1.15, sizes


@pytest.mark.thorough
async def test_a_gateway_that_was_killed_holds_up_nobody(prepared: ModalCloud, tmp_path: Path) -> None:
    """Its record stays for some minutes, and Modal starts another gateway in its place."""
    await asyncio.to_thread(scripted.deploy, prepared, "unhurried", Script(token_delay=0.01))
    await deployed(prepared, "killed", FLYWHEEL_MODAL_APP="unhurried", FLYWHEEL_DEPLOY_GATEWAY_MIN_CONTAINERS="2")

    async def two_published() -> bool:
        return len(await records("killed")) == 2

    await until(two_published, "both gateways are published")
    credentials = grpc.ssl_channel_credentials(root_certificates=prepared.ca_certificate)
    options: dict[str, Any] = {"credentials": credentials, "api_key": KEY, "timeout": 10.0}
    async with AsyncClient.from_modal("killed", **options) as running:
        for _ in range(4):
            await running.generate_all("hello", max_tokens=1)
        killed = prepared.containers("killed/Gateway")[0]
        await asyncio.to_thread(killed.kill)
        dead = (await records("killed"))[killed.task_id]["address"]
        for _ in range(8):
            await running.generate_all("hello", max_tokens=1)

        async def replaced() -> bool:
            return len(await records("killed")) == 3

        await until(replaced, "another gateway is published beside the record of the dead one")
        async with AsyncClient.from_modal("killed", **options) as new:
            begun = time.monotonic()
            for client in (running, new) * 4:
                await client.generate_all("hello", max_tokens=1)
            assert time.monotonic() - begun < 5
    authority = tmp_path / "ca.pem"
    authority.write_bytes(prepared.ca_certificate)
    shown = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-m", "flywheel_client", "endpoints", "--app", "killed", "--cacert", str(authority), "--json"],
        env=os.environ | prepared.environ,
        capture_output=True,
        text=True,
        check=True,
    )
    addresses = {each["address"] for each in json.loads(shown.stdout)}
    assert addresses == {record["address"] for record in (await records("killed")).values()} - {dead}
    assert shown.stderr == f"no answer within 6 s from {dead}\n"
