"""Behind real proxies, no call is lost while one of two servers drains, and only what may be repeated is."""

import asyncio
import base64
import json
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from flywheel_client import SERVICE_CONFIG, AsyncClient, Client, Retry, UnavailableError
from flywheel_proto.v1 import generation_pb2 as pb
from flywheel_proto.v1 import generation_pb2_grpc
from structlog.testing import capture_logs

from tests.client.conftest import Caller
from tests.client.test_restart import servers as processes
from tests.contract import write_descriptor_set
from tests.draining import Draining
from tests.proxies.proxies import ENVOY, KINDS, Kind, TranscodingEnvoy, proxy
from tests.serving import as_dict, code_of, free_ports, last_of, until
from tests.thorough import further

SHORT = pb.GenerationRequest(text="x", max_tokens=1)
HELD = pb.GenerationRequest(text="x", max_tokens=3)
REPEATING = [("grpc.service_config", SERVICE_CONFIG), ("grpc.use_local_subchannel_pool", 1)]
STREAMS = 200


@asynccontextmanager
async def behind(kind: Kind, folder: Path, **settings: Any) -> AsyncIterator[tuple[list[Draining], str]]:
    """Gives two servers, and the address of the proxy before them."""
    if kind.find() is None:
        pytest.skip("there is no such proxy on this machine")
    ports = free_ports(2)
    servers = [Draining(f"127.0.0.1:{port}", **settings) for port in ports]
    try:
        await until(lambda: all(server.is_open() for server in servers), "the servers listen")
        async with proxy(kind, ports, folder) as address:
            yield servers, address
    finally:
        for server in servers:
            server.engine.may_go_on.set()
            server.stop()
        async with asyncio.timeout(30):
            await asyncio.gather(*(server.stopped() for server in servers))


def stub_of(channel: grpc.aio.Channel) -> Any:
    return generation_pb2_grpc.GenerationServiceStub(channel)


class Load:
    """Calls that go on for as long as a test wants, over connections that stay and over new ones."""

    def __init__(self, address: str) -> None:
        self.outcomes: Counter[str] = Counter()
        self._address = address
        self._over = asyncio.Event()
        self._workers = [asyncio.create_task(work()) for work in (self._over_new_connections, self._over_one_connection) * 3]

    async def _over_new_connections(self) -> None:
        while not self._over.is_set():
            async with grpc.aio.insecure_channel(self._address, options=REPEATING) as channel:
                await self._call(stub_of(channel))

    async def _over_one_connection(self) -> None:
        async with grpc.aio.insecure_channel(self._address, options=REPEATING) as channel:
            while not self._over.is_set():
                await self._call(stub_of(channel))

    async def _call(self, stub: Any) -> None:
        call = stub.GenerateAll(SHORT, timeout=20)
        code = await call.code()
        self.outcomes["OK" if code is grpc.StatusCode.OK else f"{code.name}: {await call.details()}"] += 1
        await asyncio.sleep(0.005)

    async def goes_on(self, calls: int) -> None:
        enough = self.outcomes.total() + calls
        await until(lambda: self.outcomes.total() >= enough, "calls go on")

    async def end(self) -> None:
        self._over.set()
        await asyncio.gather(*self._workers)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
async def test_no_call_fails_while_one_of_two_servers_drains(kind: Kind, tmp_path: Path) -> None:
    async with behind(kind, tmp_path, withdraw_window=0.2) as (servers, address), AsyncExitStack() as stack:
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(address))
        long = stub_of(channel).GenerateDeltas(HELD, wait_for_ready=True)
        await long.read()
        (draining,) = [server for server in servers if server.engine.running]
        load = Load(address)
        await load.goes_on(60)
        draining.stop()
        await until(lambda: not draining.is_open(), "its port is closed")
        await load.goes_on(120)
        await load.end()
        assert draining.is_running
        draining.engine.may_go_on.set()
        assert (await last_of(long)).finish_reason == "length"
        await draining.stopped()
    assert load.outcomes.keys() == {"OK"}, load.outcomes


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
async def test_it_has_room_for_what_callers_do_and_repeats_nothing_that_has_begun(kind: Kind, tmp_path: Path) -> None:
    async with behind(kind, tmp_path, drain_timeout=0) as (servers, address), grpc.aio.insecure_channel(address) as channel:
        stub = stub_of(channel)
        large = stub.GenerateAll(pb.GenerationRequest(text="x" * 2**20, max_tokens=1), metadata=[("x-request-id", "large-1")])
        assert await large.code() is grpc.StatusCode.INVALID_ARGUMENT, "it is longer than the context, as only the server knows"
        assert as_dict(await large.trailing_metadata())["x-request-id"] == "large-1"

        methods = (stub.GenerateAll, stub.Generate, stub.GenerateDeltas)
        calls = [methods[number % len(methods)](HELD) for number in range(STREAMS)]
        await until(lambda: sum(server.engine.held for server in servers) == STREAMS, "all have begun")
        for server in servers:
            server.stop()
        assert {await code_of(call) for call in calls} == {grpc.StatusCode.UNAVAILABLE}
        assert sum(server.engine.calls for server in servers) == STREAMS


async def test_envoy_repeats_what_a_full_server_refuses_and_nothing_that_is_wrong(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_concurrent": 1, "max_queued": 0}
    async with behind(ENVOY, tmp_path, **settings) as (servers, address), AsyncExitStack() as stack:
        full, _ = servers
        filling = stub_of(await stack.enter_async_context(grpc.aio.insecure_channel(full.address))).GenerateDeltas(HELD)
        await filling.read()
        stub = stub_of(await stack.enter_async_context(grpc.aio.insecure_channel(address)))
        with capture_logs() as log:
            for _ in range(20):
                await stub.GenerateAll(SHORT)
        refused = [entry for entry in log if entry.get("code") == "RESOURCE_EXHAUSTED"]
        assert refused, "the full server was asked too"
        with capture_logs() as log:
            assert await stub.GenerateAll(pb.GenerationRequest()).code() is grpc.StatusCode.INVALID_ARGUMENT
            # A call is logged once its status has been sent, by which time its caller may have it.
            await until(lambda: any(entry.get("code") == "INVALID_ARGUMENT" for entry in log), "the refusal is logged")
        assert len([entry for entry in log if entry.get("code") == "INVALID_ARGUMENT"]) == 1


KEY = "a-key-of-the-caller"
DIRECTLY = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Without the proxy that the environment may name."""


async def post(address: str, method: str, request: dict[str, Any], *, key: str | None = KEY) -> tuple[int, list[Any]]:
    """Calls with JSON over HTTP, and returns the status and the lines of the body."""
    asked = urllib.request.Request(
        f"http://{address}/flywheel.v1.GenerationService/{method}",
        json.dumps(request).encode(),
        {"content-type": "application/json", **({"authorization": f"Bearer {key}"} if key else {})},
    )

    def read() -> tuple[int, bytes]:
        try:
            with DIRECTLY.open(asked, timeout=60) as response:
                return response.status, response.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read()

    status, body = await asyncio.to_thread(read)
    return status, [json.loads(line) for line in body.splitlines()]


async def test_envoy_takes_json_and_answers_with_error_details(tmp_path: Path) -> None:
    kind = TranscodingEnvoy(write_descriptor_set(tmp_path / "set.binpb"))
    async with behind(kind, tmp_path, api_keys=KEY) as (_, address):
        request = {"text": "x", "max_tokens": 1}
        status, (response,) = await post(address, "GenerateAll", request)
        assert (status, response["responses"][0]["finish_reason"]) == (200, "length")

        status, (response,) = await post(address, "GenerateAll", {**request, "a_field_of_later": 1})
        assert (status, response["num_samples"]) == (200, 1), "Envoy drops it, as the document says"

        conversation = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1, "seed": 7, "logprobs": 1}
        status, (response,) = await post(address, "GenerateAll", conversation)
        (sample,) = response["responses"]
        assert (status, sample["seed"], base64.b64decode(sample["tokens"][0]["text"])) == (200, 7, sample["text"].encode())

        status, deltas = await post(address, "GenerateDeltas", {**request, "num_samples": 3})
        assert (status, sorted(delta.get("index", 0) for delta in deltas)) == (200, [0, 1, 2])

        for method in ("GenerateAll", "Generate", "GenerateDeltas"):
            status, (error,) = await post(address, method, {"text": "x", "top_p": 2})
            assert (status, error["code"]) == (400, grpc.StatusCode.INVALID_ARGUMENT.value[0])
            (detail,) = error["details"]
            assert detail["@type"] == "type.googleapis.com/google.rpc.BadRequest"
            assert [each["field"] for each in detail["field_violations"]] == ["max_tokens", "top_p"]

        wrong = {"messages": [{"role": "User"}], "max_tokens": 1, "logit_bias": {"7": 200}, "choices": {"texts": [""]}}
        status, (error,) = await post(address, "GenerateAll", wrong)
        named = [each["field"] for each in error["details"][0]["field_violations"]]
        assert (status, named) == (400, ["messages[0].role", "choices[0]", "logit_bias"])

        status, (error,) = await post(address, "GetModel", {}, key=None)
        (detail,) = error["details"]
        assert (status, detail["reason"]) == (401, "API_KEY_MISSING")


@pytest.mark.parametrize("name", ["envoy", *further(KINDS, but=["envoy"])])
async def test_clients_tell_a_killed_server_from_a_failed_engine(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    if kind.find() is None:
        pytest.skip("there is no such proxy on this machine")
    ports = free_ports(2)
    server = f"127.0.0.1:{ports[0]}"
    async with processes(server, script='{"slots": 2, "hang_after": 2}') as running, proxy(kind, ports, tmp_path) as address:
        callers = [Caller(kind, address, retry=Retry(max_attempts=2, initial_backoff=0.01)) for kind in (Client, AsyncClient)]
        begun = [await one.stream(max_tokens=9, wait_for_ready=True) for one in callers]
        for one, stream in zip(callers, begun, strict=True):
            assert await one.next(stream)
        queued = [asyncio.create_task(one.call()) for one in callers]
        direct = Caller(AsyncClient, server)

        async def are_queued() -> bool:
            return int((await direct.client.stats()).queued) == len(queued)

        await until(are_queued, "the calls wait for the engine")
        running[server].kill()
        for one, stream, call in zip(callers, begun, queued, strict=True):
            for result in (one.rest(stream), call):
                with pytest.raises(UnavailableError):
                    await result
            await one.close()
        await direct.close()
