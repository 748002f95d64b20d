"""The log has the status that the caller gets, and no status of ours for a call that gRPC itself has ended."""

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
import pytest
import structlog
from flywheel_proto.v1 import generation_pb2 as pb
from flywheel_server.engines.base import EngineFailedError, EngineOverloadedError
from flywheel_server.engines.scripted import Script, ScriptedEngine
from structlog.testing import capture_logs

from tests.pulled import PulledEngine
from tests.server.http2_client import Client, http2, prefixed
from tests.serving import Target, serving, until

PATH = "/flywheel.v1.GenerationService/"
METHODS = ["Generate", "GenerateDeltas", "GenerateAll"]
GENERATION = prefixed(pb.GenerationRequest(text="x", max_tokens=1).SerializeToString())
CODES = {code.value[0]: code.name for code in grpc.StatusCode}
GRPC = tuple(map(int, grpc.__version__.split(".")[:2]))
LIMITS: dict[str, Any] = {"max_message_bytes": 10_000, "max_text_bytes": 1_000}


@dataclass(frozen=True)
class Sent:
    """A call as bytes, and the status that its caller gets.

    Attributes:
        data: What is sent after the headers.
        code: The status.
        headers: Further headers.
        half_closes: Whether the caller says that it sends no more.
        is_logged: Whether the server gives the status, and so logs it; otherwise gRPC does.
    """

    data: bytes
    code: str
    headers: tuple[tuple[str, str], ...] = ()
    half_closes: bool = True
    is_logged: bool = False
    path: str = PATH + "{method}"


CALLS = {
    "served": Sent(GENERATION, "OK"),
    "two messages": Sent(GENERATION * 2, "OK"),
    "no message": Sent(b"", "INVALID_ARGUMENT", is_logged=True),
    "undecodable": Sent(prefixed(b"\xff"), "INVALID_ARGUMENT", is_logged=True),
    "invalid": Sent(prefixed(b""), "INVALID_ARGUMENT", is_logged=True),
    "text too long": Sent(
        prefixed(pb.GenerationRequest(text="x" * 2_000, max_tokens=1).SerializeToString()), "INVALID_ARGUMENT", is_logged=True
    ),
    "compressed, but not": Sent(
        prefixed(b"abc", compressed=True), "INVALID_ARGUMENT", (("grpc-encoding", "gzip"),), is_logged=True
    ),
    "ends in the message": Sent(prefixed(b"abc", length=1_000), "INVALID_ARGUMENT", is_logged=True),
    "ends in the prefix": Sent(b"\0\0", "INVALID_ARGUMENT", is_logged=True),
    "deadline": Sent(GENERATION, "DEADLINE_EXCEEDED", (("grpc-timeout", "1n"),)),
    "too large": Sent(prefixed(bytes(20_000)), "RESOURCE_EXHAUSTED"),
    "too large, without end": Sent(prefixed(b"abc", length=100_000_000), "RESOURCE_EXHAUSTED", half_closes=False),
    "compressed without encoding": Sent(prefixed(b"abc", compressed=True), "INTERNAL"),
    "unknown encoding": Sent(prefixed(b"abc", compressed=True), "INTERNAL", (("grpc-encoding", "br"),)),
    "unreadable deadline": Sent(GENERATION, "INTERNAL", (("grpc-timeout", "1x"),)),
    "unknown method": Sent(GENERATION, "UNIMPLEMENTED", path=PATH + "{method}Nothing"),
    "unknown service": Sent(GENERATION, "UNIMPLEMENTED", path="/no.such.Service/{method}"),
    "health, too large for it": Sent(
        prefixed(bytes(5_000)), "RESOURCE_EXHAUSTED", path="/grpc.health.v1.Health/Check", is_logged=True
    ),
    "health, too large": Sent(prefixed(bytes(20_000)), "RESOURCE_EXHAUSTED", path="/grpc.health.v1.Health/Check"),
}
"""How a call may go wrong before a generation begins."""

# How gRPC ends the calls that it refuses by itself depends on its version: 1.73 resets some of these streams.
TRIED = {name: sent for name, sent in CALLS.items() if sent.is_logged or GRPC >= (1, 85)}


@asynccontextmanager
async def logged(engine: ScriptedEngine, **settings: Any) -> AsyncIterator[tuple[Target, dict[str, list[str]]]]:
    """Gives a server, and the statuses in its log by request id."""
    codes: dict[str, list[str]] = defaultdict(list)
    with capture_logs(processors=[structlog.contextvars.merge_contextvars]) as lines:
        async with serving(engine, **settings) as target:
            yield target, codes
    for line in lines:
        if line["event"] in {"call refused", "call failed"}:
            codes[line["request_id"]].append(line.get("code", "INTERNAL"))


def id_of(name: str) -> str:
    """Returns a request id."""
    return name.replace(" ", "-")


async def send(client: Client, sent: Sent, method: str, request_id: str) -> str:
    path = sent.path.format(method=method)
    code = await client.call(path, sent.data, ("x-request-id", request_id), *sent.headers, end=sent.half_closes)
    return CODES.get(code, "a reset")


@pytest.mark.parametrize("method", METHODS)
async def test_the_logged_status_is_the_one_that_the_caller_gets(method: str) -> None:
    async with logged(ScriptedEngine(), **LIMITS) as (target, codes), http2(target.address) as client:
        ids = {f"{id_of(name)}-{number}": sent for name, sent in TRIED.items() for number in range(5)}
        got = await asyncio.gather(*(send(client, sent, method, request_id) for request_id, sent in ids.items()))
    assert got == [sent.code for sent in ids.values()]
    for request_id, sent in ids.items():
        # gRPC may be first to see that a deadline has passed.
        if sent.is_logged or (sent.code == "DEADLINE_EXCEEDED" and request_id in codes):
            assert codes.pop(request_id) == [sent.code]
    assert not codes


async def test_it_is_also_if_grpc_reports_a_missing_message_before_the_end_of_the_call() -> None:
    """Makes 600 calls, because gRPC does this with one in a hundred."""
    sent = CALLS["compressed without encoding"]
    got: list[str] = []
    async with logged(ScriptedEngine(), **LIMITS) as (target, codes), http2(target.address) as client:
        for first in range(0, 600, 60):
            calls = (send(client, sent, "GenerateAll", str(first + number)) for number in range(60))
            got += await asyncio.gather(*calls)
    assert not {request_id: logged for request_id, logged in codes.items() if logged != [got[int(request_id)]]}


class RefusingEngine(PulledEngine):
    """Raises an error when a call is cancelled, as an engine may if it is interrupted."""

    def __init__(self, error: Exception) -> None:
        super().__init__(Script(hang_after=1))
        self.error = error

    async def events(self, prepared: Any) -> Any:
        try:
            async for event in super().events(prepared):
                yield event
        except asyncio.CancelledError:
            if prepared.request.text == "check":
                raise
            raise self.error from None


async def left(target: Target, engine: ScriptedEngine, method: str) -> None:
    """Makes a call, and drops the connection while it runs."""
    async with http2(target.address) as client:
        stream = client.begin(PATH + method, ("x-request-id", "gone"))
        await client.send(stream, prefixed(pb.GenerationRequest(text="x", max_tokens=9).SerializeToString()), end=True)
        await until(lambda: engine.running == 1, "it runs")
    await until(lambda: engine.running == 0, "it has ended")


@pytest.mark.parametrize("method", METHODS)
async def test_the_status_of_a_call_whose_caller_has_gone_is_not_logged(method: str) -> None:
    engine = RefusingEngine(EngineOverloadedError("full"))
    async with logged(engine) as (target, codes):
        await left(target, engine, method)
    assert not codes


async def test_a_fault_of_the_server_is_logged_even_if_the_caller_has_gone() -> None:
    engine = RefusingEngine(EngineFailedError("broken"))
    async with logged(engine) as (target, codes):
        await left(target, engine, "GenerateAll")
    assert codes == {"gone": ["INTERNAL"]}
