"""Calls whose connection breaks, or that something on the way ends, are told from failures of the engine."""

from __future__ import annotations

import asyncio
import contextlib
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import grpc
import pytest
from flywheel_client import (
    CallCancelledError,
    FlywheelError,
    InternalError,
    ResourceExhaustedError,
    Retry,
    UnauthenticatedError,
    UnavailableError,
)
from google.rpc.error_details_pb2 import ErrorInfo
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import RequestReceived

from tests.client.fake_directory import FakeDirectory
from tests.client.test_timeouts import GENERATIONS, finish
from tests.thorough import further

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from tests.client.conftest import Caller, FakeService

Code = grpc.StatusCode
HEADERS = [(":status", "200"), ("content-type", "application/grpc")]
EMPTY_MESSAGE = bytes(5)
TWICE = Retry(max_attempts=2, initial_backoff=0.01)
ENGINE_FAILED = ErrorInfo(reason="ENGINE_FAILED", domain="flywheel.v1")


class Breaker:
    """A server, or a proxy that has lost its server, whose calls all end in one way."""

    def __init__(self, end: Callable[[H2Connection, int], object], *, begins: bool) -> None:
        self._begins = begins
        """Whether a call gets the headers of an answer first, as when the engine has begun."""
        self._end = end
        """Ends a call, given the connection and the stream."""
        self.may_end = asyncio.Event()
        """Until it is set, a call gets a message first."""
        self.may_end.set()
        self.address = ""
        self.calls = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serves a connection."""
        with contextlib.closing(writer), contextlib.suppress(ConnectionError):
            await self._serve(reader, writer)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        http2 = H2Connection(H2Configuration(client_side=False))
        http2.initiate_connection()
        writer.write(http2.data_to_send())
        while data := await reader.read(2**16):
            for event in http2.receive_data(data):
                if not isinstance(event, RequestReceived) or event.stream_id is None:
                    continue
                if b"grpc.health" in dict(event.headers or ())[b":path"]:
                    http2.send_headers(event.stream_id, [*HEADERS, ("grpc-status", "12")], end_stream=True)
                    continue
                self.calls += 1
                if self._begins:
                    http2.send_headers(event.stream_id, [*HEADERS, ("x-request-id", "r")])
                if not self.may_end.is_set():
                    http2.send_data(event.stream_id, EMPTY_MESSAGE)
                    writer.write(http2.data_to_send())
                    await self.may_end.wait()
                self._end(http2, event.stream_id)
            writer.write(http2.data_to_send())


@asynccontextmanager
async def breaking(end: Callable[[H2Connection, int], object], *, begins: bool = False) -> AsyncIterator[Breaker]:
    breaker = Breaker(end, begins=begins)
    server = await asyncio.start_server(breaker.serve, "127.0.0.1", 0)
    breaker.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield breaker
    finally:
        server.close()


def reset(code: ErrorCodes) -> Callable[[H2Connection, int], object]:
    return lambda http2, stream: http2.reset_stream(stream, code)


def status(code: int) -> Callable[[H2Connection, int], object]:
    """Ends a call with a bare status of gRPC."""

    def end(http2: H2Connection, stream: int) -> None:
        begun = http2.streams[stream].state_machine.headers_sent
        http2.send_headers(stream, [*([] if begun else HEADERS), ("grpc-status", str(code))], end_stream=True)

    return end


def answer(code: int) -> Callable[[H2Connection, int], object]:
    """Answers as a proxy or a web server does, with a status of HTTP."""
    return lambda http2, stream: http2.send_headers(
        stream, [(":status", str(code)), ("content-type", "text/html")], end_stream=True
    )


def page(http2: H2Connection, stream: int) -> None:
    """Answers as a web server that finds the path."""
    http2.send_headers(stream, [(":status", "200"), ("content-type", "text/html")])
    http2.send_data(stream, b"<html>", end_stream=True)


def no_end(http2: H2Connection, stream: int) -> None:
    """Ends the answer without a status."""
    http2.end_stream(stream)


OTHER_RESETS = {
    ErrorCodes.REFUSED_STREAM: (Code.UNAVAILABLE, UnavailableError, True),
    ErrorCodes.CANCEL: (Code.CANCELLED, UnavailableError, True),
    ErrorCodes.ENHANCE_YOUR_CALM: (Code.RESOURCE_EXHAUSTED, ResourceExhaustedError, False),
    ErrorCodes.INADEQUATE_SECURITY: (Code.PERMISSION_DENIED, FlywheelError, False),
}
ENDS: dict[str, tuple[Callable[[H2Connection, int], object], Code, type[FlywheelError], bool]] = {
    **{
        f"RST_STREAM {code.name}": (reset(code), *OTHER_RESETS.get(code, (Code.INTERNAL, UnavailableError, True)))
        for code in ErrorCodes
        if code is not ErrorCodes.HTTP_1_1_REQUIRED
    },
    "INTERNAL": (status(13), Code.INTERNAL, UnavailableError, True),
    "UNKNOWN": (status(2), Code.UNKNOWN, UnavailableError, True),
    "CANCELLED": (status(1), Code.CANCELLED, CallCancelledError, True),
    "UNAVAILABLE": (status(14), Code.UNAVAILABLE, UnavailableError, True),
    "UNIMPLEMENTED": (status(12), Code.UNIMPLEMENTED, FlywheelError, False),
}
"""How any call may end: the status of gRPC, what the clients raise, and whether a call that has not begun is repeated."""
ANSWERS = {
    "HTTP 400": (answer(400), Code.INTERNAL, UnavailableError, True),
    "HTTP 401": (answer(401), Code.UNAUTHENTICATED, UnauthenticatedError, False),
    "HTTP 403": (answer(403), Code.PERMISSION_DENIED, FlywheelError, False),
    "HTTP 404": (answer(404), Code.UNIMPLEMENTED, FlywheelError, False),
    "HTTP 429": (answer(429), Code.UNAVAILABLE, UnavailableError, True),
    "HTTP 500": (answer(500), Code.UNKNOWN, UnavailableError, True),
    "HTTP 502": (answer(502), Code.UNAVAILABLE, UnavailableError, True),
    "HTTP 503": (answer(503), Code.UNAVAILABLE, UnavailableError, True),
    "HTTP 504": (answer(504), Code.UNAVAILABLE, UnavailableError, True),
    "a page": (page, Code.UNKNOWN, UnavailableError, True),
}
TELLING = ["RST_STREAM INTERNAL_ERROR", "RST_STREAM CANCEL", "INTERNAL"]
FEW_ANSWERS = ["HTTP 400", "HTTP 500", "a page"]


async def expect(one: Caller, method: str, code: Code, kind: type[FlywheelError]) -> None:
    with pytest.raises(FlywheelError) as caught:
        await finish(one, method)
    assert type(caught.value) is kind
    assert caught.value.code is code
    on_the_way = kind is UnavailableError and code is not Code.UNAVAILABLE
    assert ("something on the way ended the call" in caught.value.message) == on_the_way


@pytest.mark.parametrize("name", [*TELLING, *FEW_ANSWERS, *further([*ENDS, *ANSWERS], but=[*TELLING, *FEW_ANSWERS])])
async def test_before_the_engine_has_begun(caller: Callable[..., Caller], name: str) -> None:
    end, code, kind, repeats = (ENDS | ANSWERS)[name]
    async with breaking(end) as breaker:
        for retry, attempts in ((None, 1), (TWICE, 2 if repeats else 1)):
            one = caller(breaker.address, retry=retry)
            for method in GENERATIONS:
                breaker.calls = 0
                await expect(one, method, code, kind)
                assert breaker.calls == attempts, method
            await one.close()


@pytest.mark.parametrize("name", [*TELLING, *further(ENDS, but=TELLING)])
async def test_after_the_engine_has_begun(caller: Callable[..., Caller], name: str) -> None:
    end, code, kind, _ = ENDS[name]
    for method in GENERATIONS:
        async with breaking(end, begins=True) as breaker:
            one = caller(breaker.address, retry=TWICE)
            if one.is_async and method != "generate_all":
                # grpc.aio may lose the headers of a stream that ends just after them, so this stream ends after a result.
                breaker.may_end.clear()
                stream = getattr(one.client, method)("p", max_tokens=1)
                await anext(stream)
                breaker.may_end.set()
                with pytest.raises(kind) as caught:
                    await one.rest(stream)
                assert caught.value.code is code
            else:
                await expect(one, method, code, kind)
            assert breaker.calls == 1
            await one.close()


async def test_an_answer_without_its_end(caller: Callable[..., Caller]) -> None:
    async with breaking(no_end, begins=True) as breaker:
        await expect(caller(breaker.address, retry=None), "generate_all", Code.UNKNOWN, UnavailableError)


async def test_an_endpoint_that_breaks_calls_off_is_left_for_another(caller: Callable[..., Caller], fake: FakeService) -> None:
    async with breaking(reset(ErrorCodes.INTERNAL_ERROR)) as breaker:
        one = caller(FakeDirectory(breaker.address, fake.address))
        for _ in range(6):
            assert await one.call() == "p"
        assert breaker.calls <= 1


async def test_a_call_that_the_caller_cancelled_is_not_broken_off(caller: Callable[..., Caller], fake: FakeService) -> None:
    fake.hangs = True
    one = caller(fake.address)
    stream = await one.stream()
    assert await one.next(stream) == "ab"
    stream.cancel()
    with pytest.raises(CallCancelledError):
        await one.rest(stream)


@pytest.mark.parametrize("code", [Code.INTERNAL, Code.UNKNOWN, Code.CANCELLED], ids=lambda code: code.name)
async def test_a_reason_of_the_server_is_its_own_word(caller: Callable[..., Caller], fake: FakeService, code: Code) -> None:
    fake.refuses = True
    fake.fail(code, "RST_STREAM", ENGINE_FAILED)
    kind = {Code.INTERNAL: InternalError, Code.CANCELLED: CallCancelledError}.get(code, FlywheelError)
    one = caller(fake.address, retry=TWICE)
    for method in GENERATIONS:
        await expect(one, method, code, kind)
    assert len(fake.requests) == len(GENERATIONS)


async def test_a_reason_of_another_domain_is_not(caller: Callable[..., Caller], fake: FakeService) -> None:
    fake.fail(Code.INTERNAL, "no upstream", ErrorInfo(reason="UPSTREAM", domain="proxy.example"))
    await expect(caller(fake.address, retry=None), "generate_all", Code.INTERNAL, UnavailableError)
