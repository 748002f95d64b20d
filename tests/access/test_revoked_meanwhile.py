"""A call is refused if its caller was accepted when the call began, but no longer is when the request has arrived."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import trustme
from flywheel_server.access.keys import KeyRing
from flywheel_server.access.keys_file import KeyEntry, KeysFile, hash_of
from flywheel_server.engines.base import PreparedRequest
from google.rpc.error_details_pb2 import ErrorInfo

from tests.access.test_authentication import CALLS
from tests.pulled import PulledEngine
from tests.server.test_errors import details_of
from tests.server.test_tls import Files, chain_of, with_uri
from tests.serving import drained, serving, until
from tests.thorough import further

PATH = "/flywheel.v1.GenerationService/"
KEY = "0123456789abcdef"
OTHER = "fedcba9876543210"
URI = "spiffe://cluster/mesh"


class Engine(PulledEngine):
    """Counts the requests that it gets."""

    requests = 0

    async def events(self, prepared: PreparedRequest) -> Any:
        if prepared.request.text == "x":
            self.requests += 1
        async for event in super().events(prepared):
            yield event


def entry(**fields: Any) -> KeyEntry:
    return KeyEntry(**{"name": "team-a", "created": datetime.now(UTC), **fields})


@pytest.fixture
def looked_up(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Gets a line for each time that a caller is looked up."""
    lines: list[str] = []
    for name in ("caller_of_key", "caller_of_certificate"):
        original = getattr(KeyRing, name)

        def spy(ring: KeyRing, sent: Any, original: Any = original, name: str = name) -> Any:
            lines.append(name)
            return original(ring, sent)

        monkeypatch.setattr(KeyRing, name, spy)
    return lines


CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any] | None, str]] = {
    "key revoked": ({"hash": hash_of(KEY)}, None, "API_KEY_REVOKED"),
    "key replaced": ({"hash": hash_of(KEY)}, {"hash": hash_of(OTHER)}, "API_KEY_REVOKED"),
    "key replaced by a certificate": ({"hash": hash_of(KEY)}, {"certificate": "spiffe://cluster/other"}, "API_KEY_REVOKED"),
    "key expired": ({"hash": hash_of(KEY)}, {"hash": hash_of(KEY)}, "API_KEY_EXPIRED"),
    "certificate removed": ({"certificate": URI}, None, "API_KEY_REVOKED"),
    "certificate replaced": ({"certificate": URI}, {"certificate": "spiffe://cluster/other"}, "API_KEY_REVOKED"),
    "certificate expired": ({"certificate": URI}, {"certificate": URI}, "API_KEY_EXPIRED"),
}
SOME_CHANGES = ["key revoked", "key replaced by a certificate", "certificate expired"]


@pytest.mark.parametrize("change", [*SOME_CHANGES, *further(CHANGES, but=SOME_CHANGES)])
async def test_a_call_is_refused_if_its_caller_is_revoked_before_the_request_arrives(
    change: str, tmp_path: Path, looked_up: list[str]
) -> None:
    before, after, reason = CHANGES[change]
    if reason == "API_KEY_EXPIRED":
        before = after = {**before, "expires": datetime.now(UTC) + timedelta(seconds=2)}
    files, clients, engine = Files(tmp_path), trustme.CA(), Engine()
    path = tmp_path / "keys.json"
    stays = entry(name="stays", hash=hash_of(KEY + OTHER))
    KeysFile(keys=(entry(**before), stays)).write(path)
    metadata = (("authorization", f"Bearer {KEY}"),) if "hash" in before else ()
    settings = {**files.mutual(clients), "api_keys_file": str(path), "health_interval": 3600}
    async with serving(engine, **settings) as target, AsyncExitStack() as stack:
        own = with_uri(clients, URI)
        credentials = grpc.ssl_channel_credentials(files.authority.cert_pem.bytes(), own.private_key_pem.bytes(), chain_of(own))
        channel = await stack.enter_async_context(grpc.aio.secure_channel(target.address, credentials))
        arrive = asyncio.Event()

        async def requests(message: Any) -> AsyncIterator[bytes]:
            await arrive.wait()
            yield message.SerializeToString()

        def begin(method: str, metadata: Any) -> asyncio.Future[None]:
            call = channel.stream_stream(PATH + method, bytes, bytes)(requests(CALLS[method]), metadata=metadata)
            return asyncio.ensure_future(drained(call))

        refused = {method: begin(method, metadata) for method in CALLS}
        served = {method: begin(method, (("authorization", f"Bearer {KEY + OTHER}"),)) for method in CALLS}
        await until(lambda: len(looked_up) == 2 * len(CALLS), "all callers were looked up")
        assert not any(call.done() for call in refused.values()), "they may call"
        KeysFile(keys=(*([entry(**after)] if after else []), stays)).write(path)

        async def is_refused() -> bool:
            probe = channel.unary_unary(PATH + "GetModel", bytes, bytes)(b"", metadata=metadata)
            return await probe.code() is grpc.StatusCode.UNAUTHENTICATED

        await until(is_refused, "a new call is refused")
        arrive.set()
        for method, call in refused.items():
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED, method
            assert details_of(caught.value)[ErrorInfo].reason == reason, method
        for call in served.values():
            await call
    assert engine.requests == 3, "one for each generation of the other caller"
