"""Two servers with TLS, and the records of a deployment on the stand-in of Modal's cloud."""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc
import modal
import pytest
import trustme
from flywheel_client._records import DEFAULT_APP, dict_name

from tests.client.conftest import serving_fake

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from tests.client.conftest import FakeService
    from tests.modal_cloud import ModalCloud


@pytest.fixture(autouse=True)
def connected(cloud: ModalCloud) -> None:
    """Makes the Modal library of this process use the stand-in of the cloud."""


@pytest.fixture
async def records() -> AsyncIterator[modal.Dict]:
    """The Dict that endpoints are published in, empty."""
    records = modal.Dict.from_name(dict_name(DEFAULT_APP), create_if_missing=True)
    await records.clear.aio()
    yield records
    await records.clear.aio()


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> tuple[trustme.CA, Path]:
    """The authority that signs the certificates of the servers, and the file with its own certificate."""
    authority = trustme.CA()
    path = tmp_path_factory.mktemp("authority") / "ca.pem"
    authority.cert_pem.write_to_path(str(path))
    return authority, path


@pytest.fixture
def secured(authority: tuple[trustme.CA, Path]) -> Iterator[list[FakeService]]:
    """Two servers that speak TLS, as tunnels do."""
    certificate = authority[0].issue_cert("localhost")
    chain = b"".join(blob.bytes() for blob in certificate.cert_chain_pems)
    credentials = grpc.ssl_server_credentials([(certificate.private_key_pem.bytes(), chain)])
    with (
        serving_fake(credentials=credentials, host="localhost") as first,
        serving_fake(credentials=credentials, host="localhost") as second,
    ):
        yield [first, second]


@pytest.fixture
def credentials(authority: tuple[trustme.CA, Path]) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(authority[0].cert_pem.bytes())
