"""TLS: which clients are accepted, and how certificates are replaced while the server runs."""

import asyncio
import os
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import trustme
from cryptography.hazmat.primitives import serialization
from flywheel_proto.v1 import generation_pb2 as pb
from flywheel_proto.v1 import generation_pb2_grpc
from flywheel_server.access.callers import Caller, caller
from flywheel_server.access.keys_file import KeyEntry, KeysFile, hash_of
from flywheel_server.certificates import server_credentials
from flywheel_server.engines.base import EngineStats, PreparedRequest, TextDelta
from flywheel_server.engines.scripted import ScriptedEngine
from google.rpc.error_details_pb2 import ErrorInfo
from structlog.testing import capture_logs

from tests.pulled import PulledEngine
from tests.server import certificates as made
from tests.server.test_errors import details_of
from tests.serving import serving

KEY = "0123456789abcdef"
PKCS8 = (made.PEM, serialization.PrivateFormat.PKCS8)


class Engine(PulledEngine):
    """Waits in the middle of a generation until the test lets it go on, and keeps the caller of `stats`."""

    def __init__(self) -> None:
        super().__init__()
        self.go_on = asyncio.Event()

    async def events(self, prepared: PreparedRequest) -> Any:
        async for event in super().events(prepared):
            yield event
            if isinstance(event, TextDelta) and prepared.request.text == "wait":
                await self.go_on.wait()

    async def stats(self) -> EngineStats:
        self.caller = caller.get()
        return await super().stats()


class Files:
    """The TLS files of a server, and the authority that issues its certificates."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.authority = trustme.CA()
        self.issue()

    @property
    def settings(self) -> dict[str, str]:
        return {"tls_cert": str(self.folder / "tls.crt"), "tls_key": str(self.folder / "tls.key")}

    def mutual(self, authority: trustme.CA) -> dict[str, str]:
        self.write("ca.crt", authority.cert_pem.bytes())
        return {**self.settings, "tls_client_ca": str(self.folder / "ca.crt")}

    def write(self, name: str, content: bytes) -> None:
        temporary = self.folder / f"{name}.new"
        temporary.write_bytes(content)
        temporary.replace(self.folder / name)

    def issue(self) -> bytes:
        """Writes a new certificate and its key, and returns the certificate as the handshake shows it."""
        issued = self.authority.issue_cert("127.0.0.1")
        self.write("tls.key", issued.private_key_pem.bytes())
        self.write("tls.crt", chain_of(issued))
        return ssl.PEM_cert_to_DER_cert(issued.cert_chain_pems[0].bytes().decode())

    async def served_at(self, address: str) -> bytes:
        """Returns the certificate that a new connection is shown."""
        context = ssl.create_default_context(cadata=self.authority.cert_pem.bytes().decode())
        context.set_alpn_protocols(["h2"])
        host, _, port = address.rpartition(":")
        _, writer = await asyncio.open_connection(host, int(port), ssl=context)
        tls = writer.get_extra_info("ssl_object")
        assert tls.selected_alpn_protocol() == "h2"
        certificate = tls.getpeercert(binary_form=True)
        writer.transport.abort()
        assert isinstance(certificate, bytes)
        return certificate


def chain_of(issued: trustme.LeafCert) -> bytes:
    return b"".join(pem.bytes() for pem in issued.cert_chain_pems)


def with_uri(authority: trustme.CA, uri: str) -> trustme.LeafCert:
    """Returns a certificate as a mesh issues them: its only name is a URI."""
    return made.issue(authority, made.name(), made.alternative_names(made.uri(uri)))


@asynccontextmanager
async def client(address: str, server: trustme.CA, own: trustme.LeafCert | None = None) -> AsyncIterator[Any]:
    """Gives a stub over a connection of its own."""
    pair = (own.private_key_pem.bytes(), chain_of(own)) if own else (None, None)
    credentials = grpc.ssl_channel_credentials(server.cert_pem.bytes(), *pair)
    options = [("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.secure_channel(address, credentials, options) as channel:
        yield generation_pb2_grpc.GenerationServiceStub(channel)


async def refused(stub: Any, metadata: Any = ()) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.GetModel(pb.GetModelRequest(), metadata=metadata)
    return caught.value


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


async def test_a_client_that_does_not_speak_tls_is_refused_and_others_are_served(files: Files) -> None:
    async with serving(ScriptedEngine(), **files.settings) as target:
        assert (await refused(target.stub)).code() is grpc.StatusCode.UNAVAILABLE
        host, _, port = target.address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b"llama" not in await reader.read()
        writer.close()
        async with client(target.address, files.authority) as stub:
            response = await stub.GenerateAll(pb.GenerationRequest(text="x", max_tokens=3))
            assert response.responses[0].generated_tokens == 3
        async with client(target.address, trustme.CA()) as stub:
            assert (await refused(stub)).code() is grpc.StatusCode.UNAVAILABLE


async def test_mutual_tls_refuses_clients_without_a_certificate_of_the_authority(files: Files) -> None:
    clients = trustme.CA()
    engine = Engine()
    async with serving(engine, **files.mutual(clients), health_interval=3600) as target:
        for own in (None, trustme.CA().issue_cert("a.example"), files.authority.issue_cert("a.example")):
            async with client(target.address, files.authority, own) as stub:
                assert (await refused(stub)).code() is grpc.StatusCode.UNAVAILABLE
        for own, name in (
            (clients.issue_cert("mesh.example", common_name="other"), "mesh.example"),
            (with_uri(clients, "spiffe://cluster/mesh"), "spiffe://cluster/mesh"),
        ):
            async with client(target.address, files.authority, own) as stub:
                await stub.GetStats(pb.GetStatsRequest())
                assert engine.caller == Caller(name)


async def test_with_keys_a_certificate_counts_if_the_file_lists_it(files: Files) -> None:
    clients, engine = trustme.CA(), Engine()
    path = files.folder / "keys.json"
    mesh = KeyEntry(name="mesh", certificate="spiffe://cluster/mesh", created=datetime.now(UTC), priority=4)
    KeysFile(keys=(mesh, KeyEntry(name="team-a", hash=hash_of(KEY), created=datetime.now(UTC)))).write(path)
    metadata = (("authorization", f"Bearer {KEY}"),)
    wrong = (("authorization", f"Bearer {KEY}x"),)
    settings = {**files.mutual(clients), "api_keys_file": str(path), "health_interval": 3600}
    async with serving(engine, **settings) as target:
        async with client(target.address, files.authority, with_uri(clients, "spiffe://cluster/mesh")) as stub:
            await stub.GetStats(pb.GetStatsRequest())
            assert engine.caller == Caller("mesh", priority=4)
            await stub.GetStats(pb.GetStatsRequest(), metadata=metadata)
            assert engine.caller == Caller("team-a")
            assert details_of(await refused(stub, wrong))[ErrorInfo].reason == "API_KEY_INVALID"
        async with client(target.address, files.authority, with_uri(clients, "spiffe://cluster/other")) as stub:
            assert details_of(await refused(stub))[ErrorInfo].reason == "API_KEY_MISSING"
            await stub.GetStats(pb.GetStatsRequest(), metadata=metadata)
            assert engine.caller == Caller("team-a")


async def test_a_certificate_is_replaced_while_a_stream_runs(files: Files) -> None:
    engine = Engine()
    first = files.issue()
    async with serving(engine, **files.settings) as target, client(target.address, files.authority) as stub:
        stream = stub.GenerateDeltas(pb.GenerationRequest(text="wait", max_tokens=20))
        await stream.read()
        assert await files.served_at(target.address) == first
        with capture_logs() as logs:
            second = files.issue()
            assert await files.served_at(target.address) == second
            assert await files.served_at(target.address) == second
        assert [log["event"] for log in logs] == ["TLS certificates reloaded"]
        engine.go_on.set()
        last = None
        while isinstance(delta := await stream.read(), pb.GenerationDelta):
            last = delta
        assert last is not None
        assert last.finish_reason == "length"
        assert await stream.code() is grpc.StatusCode.OK


async def test_a_secret_that_kubernetes_mounts_is_followed(tmp_path: Path) -> None:
    for version in ("1", "2"):
        (tmp_path / version).mkdir()
    one = Files(tmp_path / "1")
    first = one.issue()
    (tmp_path / "..data").symlink_to("1")
    for name in ("tls.crt", "tls.key"):
        (tmp_path / name).symlink_to(f"..data/{name}")
    settings = {"tls_cert": str(tmp_path / "tls.crt"), "tls_key": str(tmp_path / "tls.key")}
    async with serving(ScriptedEngine(), **settings) as target:
        assert await one.served_at(target.address) == first
        two = Files(tmp_path / "2")
        second = two.issue()
        (tmp_path / "..data_tmp").symlink_to("2")
        (tmp_path / "..data_tmp").rename(tmp_path / "..data")
        assert await two.served_at(target.address) == second


def spoiled(files: Files, harm: str) -> None:
    good = (files.folder / "tls.crt").read_bytes()
    match harm:
        case "another key":
            files.write("tls.key", files.authority.issue_cert("127.0.0.1").private_key_pem.bytes())
        case "half a certificate":
            files.write("tls.crt", good[: len(good) // 2])
        case "half a chain":
            files.write("tls.crt", good + files.authority.cert_pem.bytes()[:300])
        case "empty":
            files.write("tls.crt", b"")
        case "gone":
            (files.folder / "tls.key").unlink()
        case "a pipe":
            (files.folder / "tls.key").unlink()
            os.mkfifo(files.folder / "tls.key")
        case "no authority":
            files.write("ca.crt", b"")
        case "half an authority":
            whole = files.authority.cert_pem.bytes()
            files.write("ca.crt", whole + whole[:300])
        case "an encrypted key":
            key = serialization.load_pem_private_key((files.folder / "tls.key").read_bytes(), None)
            encryption = serialization.BestAvailableEncryption(b"password")
            files.write("tls.key", key.private_bytes(*PKCS8, encryption))
        case _:
            raise AssertionError(harm)


HARM = {
    "another key": "FLYWHEEL_TLS_KEY",
    "half a certificate": "FLYWHEEL_TLS_CERT",
    "half a chain": "FLYWHEEL_TLS_CERT",
    "empty": "FLYWHEEL_TLS_CERT",
    "gone": "FLYWHEEL_TLS_KEY",
    "a pipe": "FLYWHEEL_TLS_KEY",
    "no authority": "FLYWHEEL_TLS_CLIENT_CA",
    "half an authority": "FLYWHEEL_TLS_CLIENT_CA",
    "an encrypted key": "FLYWHEEL_TLS_KEY",
}


@pytest.mark.parametrize("harm", HARM)
async def test_files_that_are_wrong_or_not_whole_change_nothing(harm: str, files: Files) -> None:
    clients = trustme.CA()
    own = clients.issue_cert("a.example")
    first = files.issue()
    async with serving(ScriptedEngine(), **files.mutual(clients)) as target:
        with capture_logs() as logs:
            spoiled(files, harm)
            for _ in range(3):
                assert await files.served_at(target.address) == first
                async with client(target.address, files.authority, own) as stub:
                    await stub.GetModel(pb.GetModelRequest())
                async with client(target.address, files.authority) as stub:
                    assert (await refused(stub)).code() is grpc.StatusCode.UNAVAILABLE
        assert [(log["event"], log["log_level"]) for log in logs] == [("TLS certificates not reloaded", "error")]
        assert HARM[harm] in logs[0]["error"]
        assert "PRIVATE KEY" not in str(logs)
        files.mutual(clients)
        second = files.issue()
        assert await files.served_at(target.address) == second


async def test_the_authority_of_clients_is_replaced(files: Files) -> None:
    old, new = trustme.CA(), trustme.CA()
    former = old.issue_cert("a.example")
    async with (
        serving(ScriptedEngine(), **files.mutual(old)) as target,
        client(target.address, files.authority, former) as connected,
    ):
        await connected.GetModel(pb.GetModelRequest())
        files.mutual(new)
        async with client(target.address, files.authority, new.issue_cert("a.example")) as stub:
            await stub.GetModel(pb.GetModelRequest())
        for own in (former, None):
            async with client(target.address, files.authority, own) as stub:
                assert (await refused(stub)).code() is grpc.StatusCode.UNAVAILABLE
        # This connection is older than the change.
        await connected.GetModel(pb.GetModelRequest())


@pytest.mark.parametrize("harm", HARM)
def test_what_is_wrong_at_the_start_is_said_in_one_line(harm: str, files: Files) -> None:
    settings = files.mutual(files.authority)
    spoiled(files, harm)
    with pytest.raises((OSError, ValueError), match=HARM[harm]) as caught:
        server_credentials(*settings.values())
    assert str(files.folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_pair_that_changes_while_it_is_read_is_not_taken(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    check = ssl.SSLContext.load_cert_chain

    def then_changes(context: ssl.SSLContext, *arguments: Any, **named: Any) -> None:
        check(context, *arguments, **named)
        files.issue()

    monkeypatch.setattr(ssl.SSLContext, "load_cert_chain", then_changes)
    with pytest.raises(ValueError, match="change while they are read"):
        server_credentials(*files.settings.values())
