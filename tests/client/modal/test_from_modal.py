"""Finding a deployment on Modal: the real client library of Modal, against the stand-in of its cloud."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import modal
import pytest
from flywheel_client import (
    AsyncClient,
    Client,
    FailedPreconditionError,
    FlywheelError,
    UnauthenticatedError,
    UnavailableError,
    published_endpoints,
)
from grpclib import Status

from tests.client.conftest import serving_fake
from tests.client.modal.records import WAIT, record
from tests.serving import until

if TYPE_CHECKING:
    import trustme

    from tests.client.conftest import FakeService
    from tests.modal_cloud import ModalCloud


async def test_both_clients_balance_over_what_is_published(
    records: modal.Dict, secured: list[FakeService], credentials: grpc.ChannelCredentials
) -> None:
    await records.put.aio("ta-1", record(secured[0].address))
    await records.put.aio("ta-2", record(secured[1].address))
    await records.put.aio("ta-3", record("localhost:1"))
    await records.put.aio("ta-4", record(secured[0].address, app="another"))

    def in_threads() -> str:
        with Client.from_modal(credentials=credentials, api_key="key-1", timeout=WAIT) as client:
            for _ in range(3):
                client.generate_all("p", max_tokens=1)
            return "".join(delta.text for delta in client.generate_deltas("p", max_tokens=1))

    assert await asyncio.to_thread(in_threads) == "abc"
    assert [len(fake.requests) for fake in secured] == [2, 2]
    async with AsyncClient.from_modal(credentials=credentials, api_key="key-1", timeout=WAIT) as client:
        for _ in range(3):
            await client.generate_all("p", max_tokens=1)
        assert [delta.text async for delta in client.generate_deltas("p", max_tokens=1)] == ["ab", "c"]
    assert [len(fake.requests) for fake in secured] == [4, 4]
    assert {metadata["authorization"] for fake in secured for metadata in fake.metadata} == {"Bearer key-1"}


async def test_a_container_that_is_replaced(
    records: modal.Dict, secured: list[FakeService], credentials: grpc.ChannelCredentials
) -> None:
    await records.put.aio("ta-1", record(secured[0].address))
    async with AsyncClient.from_modal(credentials=credentials, timeout=WAIT) as client:
        await client.generate_all("p", max_tokens=1)
        await records.put.aio("ta-2", record(secured[1].address))
        await asyncio.to_thread(secured[0].stop)
        # Its record is still there, like the record of a container that was killed.
        for _ in range(3):
            await client.generate_all("p", max_tokens=1)
    assert [len(fake.requests) for fake in secured] == [1, 3]


async def test_a_synchronous_client_within_a_running_loop(
    records: modal.Dict, secured: list[FakeService], credentials: grpc.ChannelCredentials
) -> None:
    await records.put.aio("ta-1", record(secured[0].address))
    with Client.from_modal(credentials=credentials, timeout=WAIT) as client:
        assert client.generate_all("p", max_tokens=1).prompt == "p"


async def test_the_event_loop_goes_on_while_modal_is_asked(records: modal.Dict) -> None:
    program = (
        "import asyncio, sys, time\n"
        "from flywheel_client import published_endpoints\n"
        "async def main():\n"
        "    asked = asyncio.create_task(published_endpoints())\n"
        "    longest = 0.0\n"
        "    while not asked.done():\n"
        "        begun = time.perf_counter()\n"
        "        await asyncio.sleep(0)\n"
        "        longest = max(longest, time.perf_counter() - begun)\n"
        "    print(len(await asked), 'modal' in sys.modules)\n"
        "import warnings; warnings.simplefilter('error'); asyncio.run(main())\n"
    )
    await records.put.aio("ta-1", record("localhost:1"))
    process = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", program], capture_output=True, text=True, timeout=WAIT, check=False
    )
    assert (process.stdout, process.stderr) == ("1 True\n", "")


@pytest.mark.parametrize("kind", ["Client", "AsyncClient"])
@pytest.mark.parametrize("closes", [False, True])
async def test_a_process_that_ends_while_the_addresses_are_read_again(
    records: modal.Dict, secured: list[FakeService], authority: tuple[trustme.CA, Path], kind: str, closes: bool
) -> None:
    program = (
        "import asyncio, pathlib, sys, warnings; warnings.simplefilter('error')\n"
        "import flywheel_client, grpc\n"
        "flywheel_client._pool.REFRESH_AFTER_SECONDS = 0.0\n"
        "async def main():\n"
        "    credentials = grpc.ssl_channel_credentials(pathlib.Path(sys.argv[1]).read_bytes())\n"
        "    client = flywheel_client.{kind}.from_modal(credentials=credentials)\n"
        "    for _ in range(2):\n"
        "        {wait} client.generate_all('p', max_tokens=1)\n"
        "    {ending}\n"
        "asyncio.run(main())\n"
    )
    wait = "await" if kind == "AsyncClient" else ""
    program = program.format(kind=kind, wait=wait, ending=f"{wait} client.close()".strip() if closes else "")
    await records.put.aio("ta-1", record(secured[0].address))
    process = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", program, str(authority[1])], capture_output=True, text=True, check=False
    )
    # If a request is cancelled just as it fails, Modal's client leaves a future behind, and asyncio reports this future.
    assert process.stderr == "" or process.stderr.startswith("Future exception was never retrieved\n")
    assert not [complaint for complaint in ("Warning", "Task ", "Fatal", "Exception ignored") if complaint in process.stderr]
    assert process.returncode == 0
    assert len(secured[0].requests) == 2


async def test_no_endpoint(records: modal.Dict) -> None:
    async with AsyncClient.from_modal("absent", environment="dev", timeout=WAIT) as client:
        with pytest.raises(
            UnavailableError, match=r"'absent' in the environment 'dev' has no live .* modal deploy modal_deploy.py"
        ):
            await client.generate_all("p", max_tokens=1)
    await records.put.aio("ta-1", record("localhost:1"))
    async with AsyncClient.from_modal(timeout=WAIT) as client:
        with pytest.raises(UnavailableError, match="failed to connect"):
            assert [delta async for delta in client.generate_deltas("p", max_tokens=1)]


@pytest.mark.parametrize(
    ("status", "error", "message"),
    [
        (Status.UNAUTHENTICATED, UnauthenticatedError, "modal token new"),
        (Status.PERMISSION_DENIED, FailedPreconditionError, "no entry"),
        (Status.INVALID_ARGUMENT, FailedPreconditionError, "no entry"),
        (Status.INTERNAL, UnavailableError, "no entry"),
    ],
)
async def test_what_modal_refuses(cloud: ModalCloud, status: Status, error: type[FlywheelError], message: str) -> None:
    cloud.disturb(status=status, message="no entry")
    try:
        with pytest.raises(error, match=message) as caught:
            await published_endpoints()
    finally:
        cloud.calm()
    assert not isinstance(caught.value, modal.exception.Error)
    assert "'flywheel-grpc'" in caught.value.message


async def test_modal_is_down(cloud: ModalCloud, records: modal.Dict) -> None:
    cloud.down()
    try:
        with pytest.raises(UnavailableError, match="Modal cannot be asked"):
            await published_endpoints()
    finally:
        cloud.up()

    async def succeeds() -> bool:
        try:
            return not await published_endpoints()
        except UnavailableError:
            return False

    await until(succeeds, "Modal is back")


def test_without_the_modal_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "modal", None)
    for kind in (Client, AsyncClient):
        with pytest.raises(ModuleNotFoundError, match=r"pip install 'flywheel-grpc\[modal\]'"):
            kind.from_modal()
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'flywheel-grpc\[modal\]'"):
        asyncio.run(published_endpoints())


def test_modal_is_imported_only_when_it_is_asked() -> None:
    program = "import sys, flywheel_client; flywheel_client.Client.from_modal(); print('modal' in sys.modules)"
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert process.stdout == "False\n"


async def test_the_stable_address_of_a_server(cloud: ModalCloud) -> None:
    with serving_fake() as fake:
        records = modal.Dict.from_name("with-server-endpoints", create_if_missing=True)
        await records.put.aio("ta-1", record("localhost:1", app="with-server"))
        app = Path(__file__).with_name("modal_app.py")
        deployed = await asyncio.to_thread(cloud.cli, "deploy", str(app), env={"PORT": fake.address.rpartition(":")[2]})
        assert deployed.returncode == 0, deployed.stderr
        found = await published_endpoints("with-server")
        assert [endpoint.kind for endpoint in found] == ["server", "tunnel"]
        credentials = grpc.ssl_channel_credentials(cloud.ca_certificate)
        async with AsyncClient.from_modal("with-server", credentials=credentials, timeout=WAIT) as client:
            for _ in range(3):
                assert (await client.generate_all("p", max_tokens=1)).prompt == "p"
        assert len(fake.requests) == 3
