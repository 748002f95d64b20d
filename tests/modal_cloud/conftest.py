"""The stand-in of Modal's cloud with the sample app deployed to it."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import modal
import pytest

from tests.modal_cloud import ModalCloud
from tests.serving import free_ports

SAMPLE = Path(__file__).parent / "sample_app.py"


@pytest.fixture(scope="module")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModalCloud]:
    directory = tmp_path_factory.mktemp("cloud")
    with ModalCloud(directory) as cloud:
        arguments = ("deploy", str(SAMPLE))
        variables = {"SAMPLE_VOLUME": str(directory / "mounted"), "SAMPLE_PORT": str(free_ports(1)[0])}
        refused = cloud.cli(*arguments, env=variables)
        assert (refused.returncode, "Secret 'sample-keys' not found" in refused.stderr) == (1, True)
        cloud.create_secret("sample-keys", {"KEY": "value"})
        deployed = cloud.cli(*arguments, env=variables)
        assert deployed.returncode == 0, deployed.stdout + deployed.stderr
        yield cloud
        assert not cloud.unimplemented


@pytest.fixture(scope="module")
async def client(cloud: ModalCloud) -> AsyncIterator[modal.Client]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in cloud.environ.items():
            patch.setenv(name, value)
        client = await modal.Client.from_credentials.aio("ak-stand-in", "as-stand-in")
        yield client
        await client.close.aio()


@pytest.fixture
def model(client: modal.Client) -> Any:
    return modal.Cls.from_name("sample", "Model", client=client)()
