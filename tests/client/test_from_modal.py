"""Finding a deployment on Modal: the real client library of Modal, against the stand-in of its cloud."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import modal
import pytest
import trustme
from flywheel_client import (
    AsyncClient,
    Client,
    Endpoint,
    FailedPreconditionError,
    FlywheelError,
    UnauthenticatedError,
    UnavailableError,
    published_endpoints,
)
from flywheel_client._records import (
    DEFAULT_APP,
    STALE_AFTER_SECONDS,
    Reading,
    RecordTracker,
    dict_name,
    is_address,
    record_from,
)
from grpclib import Status

from tests.client.conftest import serving_fake
from tests.serving import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from tests.client.conftest import FakeService
    from tests.modal_cloud import ModalCloud

WAIT = 60.0
NOW = 1_800_000_000.0


@pytest.fixture(autouse=True)
def connected(cloud: ModalCloud) -> None:
    """Has the Modal client library of this process use the cloud."""


@pytest.fixture
async def records() -> AsyncIterator[modal.Dict]:
    """The Dict that endpoints are published in, empty."""
    records = modal.Dict.from_name(dict_name(DEFAULT_APP), create_if_missing=True)
    await records.clear.aio()
    yield records
    await records.clear.aio()


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> tuple[trustme.CA, Path]:
    """Who signs the certificates of the servers, and the file that says so."""
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


def record(address: str, age: float = 5.0, **more: Any) -> dict[str, Any]:
    now = time.time()
    return {"app": DEFAULT_APP, "address": address, "started": now - 3600.0, "refreshed": now - age, **more}


def flywheel(cloud: ModalCloud, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MODAL_", "FLYWHEEL_"))}
    return subprocess.run(
        [sys.executable, "-m", "flywheel_client", *arguments],
        env=environment | cloud.environ | {"COLUMNS": "80"} | variables,
        capture_output=True,
        text=True,
        timeout=WAIT,
        check=False,
    )


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
        # Its record is still there, as that of a container that was lost.
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
    # Modal's client leaves a future behind if a request is cancelled just as it fails, of which asyncio says this.
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


@pytest.mark.parametrize(
    "address",
    ["r1.modal.host:443", "localhost:1", "127.0.0.1:65535", "[::1]:50051", "a_b.c-d:8", "h:1"],
)
def test_addresses(address: str) -> None:
    assert is_address(address)


NO_ADDRESSES = (
    *("", "host", "host:", ":443", "host:0", "host:65536", "host:-1", "host:4x3", "host:443 ", " host:443", "host:443\n"),
    *("unix:/etc/passwd", "dns:///host:443", "ipv4:1.2.3.4:80,5.6.7.8:90", "https://host:443", "a,b:443", "user@host:443"),
    *("-host:443", "ho st:443", "hö.st:443", "host:٤٤٣", "host/path:443", "[host]:443", "::1:443", "h" * 300 + ":443"),
)


@pytest.mark.parametrize("address", NO_ADDRESSES)
def test_no_addresses(address: str) -> None:
    assert not is_address(address)


LIVE = {"app": DEFAULT_APP, "address": "a:1", "started": NOW - 100, "refreshed": NOW - 50, "refreshes": 3}
GARBAGE: dict[str, object] = {
    "nothing": None,
    "text": "a:1",
    "a number": 7,
    "a list": ["app", DEFAULT_APP],
    "an empty record": {},
    "other keys": {7: 7},
    "half a record": {"app": DEFAULT_APP, "address": "a:1"},
    "nobody's": {"address": "a:1", "started": NOW - 100, "refreshed": NOW - 50},
    "another app's": {**LIVE, "app": "other"},
    "an app of another type": {**LIVE, "app": 7},
    "an address of another type": {**LIVE, "address": ["a", 1]},
    "a time in words": {**LIVE, "refreshed": "yesterday"},
    "no time": {**LIVE, "started": None},
    "a time that is true": {**LIVE, "refreshed": True},
    "a time that is no number": {**LIVE, "refreshed": float("nan")},
    "an endless time": {**LIVE, "started": float("inf")},
    "a negative time": {**LIVE, "refreshed": -1.0},
    "a time beyond all": {**LIVE, "refreshed": 10**400},
    **{f"the address {address[:30]!r}": {**LIVE, "address": address} for address in NO_ADDRESSES},
}


@pytest.mark.parametrize("kind", GARBAGE)
def test_no_records(kind: str) -> None:
    assert record_from("ta-1", GARBAGE[kind], DEFAULT_APP) is None


@pytest.mark.parametrize("container", [7, None, b"ta-1", ("ta", 1), "t" * 1000])
def test_no_containers(container: object) -> None:
    assert record_from(container, LIVE, DEFAULT_APP) is None


@pytest.mark.parametrize("refreshes", [..., 0, 3, 10**30, "many", None])
def test_records_of_older_and_newer_gateways(refreshes: object) -> None:
    value = {**LIVE, "refreshes": refreshes, "of a later version": [1]}
    if refreshes is ...:
        del value["refreshes"]
    found = record_from("ta-1", value, DEFAULT_APP)
    assert found is not None
    assert found.endpoint == Endpoint("a:1", "tunnel", "ta-1", NOW - 100, NOW - 50)


def addresses(tracker: RecordTracker, now: float) -> list[str]:
    return [endpoint.address for endpoint in tracker.endpoints(now)]


@pytest.mark.parametrize("offset", [-3600.0, -600.0, -100.0, 0.0, 100.0, 600.0, 3600.0])
@pytest.mark.parametrize("counts", [True, False])
def test_a_record_counts_for_as_long_as_it_changes(offset: float, counts: bool) -> None:
    """By whatever clock it was written, one that counts its refreshes or an older one."""

    def written(address: str, moment: float, clock: float) -> dict[str, object]:
        value = {**LIVE, "address": address, "refreshed": NOW + moment + clock, "refreshes": int(moment)}
        if not counts:
            del value["refreshes"]
        return value

    tracker = RecordTracker()
    for moment in range(0, 3600, 20):
        items = [("ta-1", written("living:1", moment, offset)), ("ta-2", written("killed:1", min(moment, 100), -offset))]
        tracker.update(Reading(items), DEFAULT_APP, moment)
        expected = {"living:1"} if moment - 100 > STALE_AFTER_SECONDS else {"living:1", "killed:1"}
        assert set(addresses(tracker, moment)) == expected


def test_if_no_record_changes_all_count() -> None:
    tracker = RecordTracker()
    items = [("ta-1", LIVE), ("ta-2", {**LIVE, "address": "b:2"})]
    for moment in (0.0, 10.0, 10_000.0):
        tracker.update(Reading(items), DEFAULT_APP, moment)
        assert set(addresses(tracker, moment)) == {"a:1", "b:2"}


@pytest.mark.parametrize("kind", GARBAGE)
def test_what_cannot_be_understood_stands_for_what_it_was(kind: str) -> None:
    tracker = RecordTracker()
    tracker.update(Reading([("ta-1", LIVE), ("ta-2", {**LIVE, "address": "b:2"})]), DEFAULT_APP, 0.0)
    tracker.update(Reading([("ta-1", GARBAGE[kind]), ("ta-2", {**LIVE, "address": "b:2"})]), DEFAULT_APP, 10.0)
    assert set(addresses(tracker, 10.0)) == {"a:1", "b:2"}


def test_the_same_address_twice() -> None:
    tracker = RecordTracker()
    tracker.update(
        Reading([("ta-1", LIVE), ("ta-2", {**LIVE, "refreshed": NOW}), ("ta-3", {**LIVE, "refreshed": NOW - 99})]),
        DEFAULT_APP,
        0.0,
    )
    assert [(it.address, it.container) for it in tracker.endpoints(0.0)] == [("a:1", "ta-2")]


async def test_the_command_lists_endpoints(
    cloud: ModalCloud, records: modal.Dict, secured: list[FakeService], authority: tuple[trustme.CA, Path]
) -> None:
    addresses = [fake.address for fake in secured]
    await records.put.aio("ta-1", record(addresses[0], age=10.2))
    await records.put.aio("ta-22", record(addresses[1], age=3.2))
    # Killed, and so far ahead that it is listed first.
    await records.put.aio("ta-3", record("localhost:1", age=-600.0))
    trust = ["--cacert", str(authority[1])]
    process = await asyncio.to_thread(flywheel, cloud, "endpoints", *trust)
    lines = [line.split() for line in process.stdout.splitlines()]
    assert lines[0] == ["ADDRESS", "KIND", "AGE", "REFRESHED", "CONTAINER"]
    assert [(line[0], line[1], line[2], line[4]) for line in lines[1:]] == [
        (addresses[1], "tunnel", "60m", "ta-22"),
        (addresses[0], "tunnel", "60m", "ta-1"),
    ]
    assert (process.returncode, process.stderr) == (0, "no answer within 6 s from localhost:1\n")
    process = await asyncio.to_thread(flywheel, cloud, "endpoints", "--json", *trust)
    assert [(each["address"], each["kind"], each["container"]) for each in json.loads(process.stdout)] == [
        (addresses[1], "tunnel", "ta-22"),
        (addresses[0], "tunnel", "ta-1"),
    ]
    process = await asyncio.to_thread(flywheel, cloud, "endpoints", "--first", *trust)
    assert (process.returncode, process.stdout, process.stderr) == (0, f"{addresses[1]}\n", "")


async def test_the_command_lists_all_if_none_answers(cloud: ModalCloud, records: modal.Dict) -> None:
    await records.put.aio("ta-1", record("localhost:1"))
    await records.put.aio("ta-2", record("localhost:2", age=3.0))
    process = await asyncio.to_thread(flywheel, cloud, "endpoints")
    assert [line.split()[0] for line in process.stdout.splitlines()] == ["ADDRESS", "localhost:2", "localhost:1"]
    assert (process.returncode, process.stderr) == (0, "no answer within 6 s from any of these\n")
    process = await asyncio.to_thread(flywheel, cloud, "endpoints", "--first")
    assert (process.returncode, process.stdout) == (0, "localhost:2\n")
    assert process.stderr == "no answer within 6 s from any of these\n"


async def test_the_command_says_that_there_is_none(cloud: ModalCloud, records: modal.Dict) -> None:
    for arguments in ([], ["--first"], ["--json"]):
        process = await asyncio.to_thread(flywheel, cloud, "endpoints", "--app", "absent", "--environment", "dev", *arguments)
        assert (process.returncode, process.stdout) == (1, "")
        assert process.stderr.startswith("flywheel: UNAVAILABLE: the Modal app 'absent' in the environment 'dev' has no live")


async def test_the_command_without_a_token(cloud: ModalCloud) -> None:
    process = await asyncio.to_thread(
        flywheel, cloud, "stats", "--modal-app", DEFAULT_APP, MODAL_TOKEN_ID="", MODAL_TOKEN_SECRET=""
    )
    assert (process.returncode, process.stdout) == (1, "")
    assert process.stderr.startswith("flywheel: UNAUTHENTICATED: Modal cannot be asked")
    assert "modal token new" in process.stderr


async def test_the_command_calls_a_deployment(
    cloud: ModalCloud, records: modal.Dict, secured: list[FakeService], authority: tuple[trustme.CA, Path]
) -> None:
    await records.put.aio("ta-1", record(secured[0].address))
    options = ["--modal-app", DEFAULT_APP, "--cacert", str(authority[1])]
    # The address of the variable is not one that was asked for.
    variables = {"FLYWHEEL_ADDRESS": "localhost:1", "FLYWHEEL_API_KEY": "key-2"}
    process = await asyncio.to_thread(flywheel, cloud, "generate", "p", *options, **variables)
    assert (process.returncode, process.stdout) == (0, "abc")
    assert secured[0].metadata[0]["authorization"] == "Bearer key-2"
    process = await asyncio.to_thread(flywheel, cloud, "model", *options, **variables)
    assert process.stdout.startswith("name")
    secured[0].stop()
    process = await asyncio.to_thread(flywheel, cloud, "stats", *options, **variables)
    assert process.returncode == 1
    assert "To see what is live: flywheel endpoints --app flywheel-grpc\n" in process.stderr


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
