"""The service deployed on the stand-in of Modal's cloud, by the real command, and callers of it through TLS."""

import asyncio
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import modal
import pytest
from flywheel_proto.v1 import generation_pb2_grpc
from flywheel_server.deployment.weights import find
from flywheel_server.engines.llama_cpp.default_model import default_model

from tests.modal_cloud import Container, ModalCloud, Tunnel
from tests.serving import Target, until

ROOT = Path(__file__).parent.parent.parent
KEY = "0123456789abcdef"
AUTHORIZATION = (("authorization", f"Bearer {KEY}"),)
SMALL = find("smollm2-135m-instruct-q8_0")
VOLUME = "flywheel-grpc-weights"


def deploy(cloud: ModalCloud, app: str, **variables: str | None) -> subprocess.CompletedProcess[str]:
    """Runs `modal deploy modal_deploy.py`, with a small model unless the variables say otherwise; None leaves one unset."""
    settings = {
        "FLYWHEEL_DEPLOY_APP": app,
        "FLYWHEEL_DEPLOY_WEIGHTS": SMALL.name,
        "FLYWHEEL_DEPLOY_WEIGHTS_PATH": str(cloud.directory / "weights"),
        "FLYWHEEL_DEPLOY_ADDRESS": "127.0.0.1:0",
        "FLYWHEEL_HEALTH_INTERVAL": "0.1",
        "FLYWHEEL_WITHDRAW_WINDOW": "0",
    }
    env = {name: value for name, value in (settings | variables).items() if value is not None}
    return cloud.cli("deploy", "modal_deploy.py", env=env, cwd=ROOT)


async def deployed(cloud: ModalCloud, app: str, **variables: str) -> None:
    """Deploys while the event loop goes on; fails if the deployment fails."""
    done = await asyncio.to_thread(deploy, cloud, app, **variables)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="session")
def prepared(cloud: ModalCloud) -> ModalCloud:
    """The cloud with API keys and the weights of a small model."""
    cloud.create_secret("flywheel-grpc-keys", {"FLYWHEEL_API_KEYS": KEY})
    weights = SMALL.path(cloud.volume_dir(VOLUME))
    weights.parent.mkdir(parents=True)
    # The file has another quantization than its name says, and is loaded in the same way.
    weights.symlink_to(default_model())
    return cloud


@asynccontextmanager
async def through(relay: Tunnel | str, cloud: ModalCloud) -> AsyncIterator[Target]:
    """Gives a channel through the TLS of a tunnel, or of an address."""
    credentials = grpc.ssl_channel_credentials(root_certificates=cloud.ca_certificate)
    address = relay if isinstance(relay, str) else f"{relay.host}:{relay.port}"
    async with grpc.aio.secure_channel(address, credentials) as channel:
        yield Target(address, channel, generation_pb2_grpc.GenerationServiceStub(channel))


def current(cloud: ModalCloud, name: str) -> list[Container]:
    """Returns the containers of the version that was deployed last, without those that are ending."""
    return [one for one in cloud.containers(name) if one.version == one.function.app.version and not one.ending]


async def records(app: str) -> dict[str, dict[str, Any]]:
    """Returns what the gateways of the app have published, by their containers' ids."""
    directory = modal.Dict.from_name(f"{app}-endpoints", create_if_missing=True)
    return {task: record async for task, record in directory.items.aio()}


async def published(cloud: ModalCloud, app: str) -> list[Tunnel]:
    """Returns the tunnels of the app's current gateways, once they are published and earlier tunnels withdrawn."""
    found: list[Tunnel] = []

    async def all_published() -> bool:
        addresses = {task: record["address"] for task, record in (await records(app)).items()}
        found[:] = [tunnel for tunnel in cloud.tunnels if addresses.get(tunnel.task_id) == f"{tunnel.host}:{tunnel.port}"]
        return bool(addresses) and set(addresses) == {one.task_id for one in current(cloud, f"{app}/Gateway")}

    await until(all_published, "the addresses are published")
    return found
