"""The service deployed on the stand-in of Modal's cloud, by the real command, and callers of it through TLS."""

import asyncio
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import grpc.aio
import pytest
from flywheel_proto.v1 import generation_pb2_grpc
from flywheel_server.deployment.weights import find
from flywheel_server.engines.embedded import default_model

from tests.modal_cloud import ModalCloud, Tunnel
from tests.serving import Target

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
    """Deploys while the event loop goes on; fails where that fails."""
    done = await asyncio.to_thread(deploy, cloud, app, **variables)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="session")
def prepared(cloud: ModalCloud) -> ModalCloud:
    """The cloud with API keys and the weights of a small model."""
    cloud.create_secret("flywheel-grpc-keys", {"FLYWHEEL_API_KEYS": KEY})
    weights = SMALL.path(cloud.volume_dir(VOLUME))
    weights.parent.mkdir(parents=True)
    # Another quantization than the name says, which makes no difference to who loads it.
    weights.symlink_to(default_model())
    return cloud


@asynccontextmanager
async def through(relay: Tunnel | str, cloud: ModalCloud) -> AsyncIterator[Target]:
    """Gives a channel through the TLS of a tunnel, or of an address."""
    credentials = grpc.ssl_channel_credentials(root_certificates=cloud.ca_certificate)
    address = relay if isinstance(relay, str) else f"{relay.host}:{relay.port}"
    async with grpc.aio.secure_channel(address, credentials) as channel:
        yield Target(address, channel, generation_pb2_grpc.GenerationServiceStub(channel))
