"""Both clients raise the same error if the answer of a server breaks the rules."""

import asyncio
import resource
import subprocess
import sys
import zlib
from collections.abc import Iterable
from typing import Any

import grpc
import pytest
from flywheel_client import (
    AsyncClient,
    Client,
    FlywheelError,
    InternalError,
    InvalidArgumentError,
    ResourceExhaustedError,
    Retry,
    UnavailableError,
)
from h2.errors import ErrorCodes

from tests.client.conftest import Caller
from tests.client.fake_directory import FakeDirectory
from tests.client.hostile import HEADERS, OK, Answer, GoAway, Headers, HostileServer, Reset, Step, answer, trailers
from tests.server.http2_client import prefixed
from tests.thorough import further

GENERATIONS = ("generate", "generate_deltas", "generate_all")
STREAMS = ("generate", "generate_deltas")
METHODS = (*GENERATIONS, "model", "stats", "health")
INVALID = ("grpc-status", "3")
SERVING = b"\x08\x01"
MIB = 2**20
LARGE = 100 * MIB
UNREADABLE = (InternalError, "the server's answer is no message of this method")
UNANSWERED = (InternalError, "the server ended the call without an answer")

GRPC = tuple(map(int, grpc.__version__.split(".")[:2]))

Expected = tuple[type[FlywheelError], str]

ANSWERS: dict[str, tuple[list[Step], Expected]] = {
    "no message": (answer(b"\xff\xff\xff"), UNREADABLE),
    "a message that is cut off": (answer(b"\x0a\x7f"), UNREADABLE),
    "an unknown status": (answer(b"", ends=(("grpc-status", "99"), ("grpc-message", "m"))), (UnavailableError, "m")),
    "an unknown status alone": ([Headers((*HEADERS, ("grpc-status", "99")), end=True)], (UnavailableError, "")),
    "a negative status": (answer(b"", ends=(("grpc-status", "-1"),)), (UnavailableError, "")),
    "a status that is no number": (answer(b"", ends=(("grpc-status", "OK"),)), (UnavailableError, "")),
    "no status": (answer(b"", ends=(("x-other", "y"),)), (UnavailableError, "")),
    "details that are not Base64": (answer(ends=(INVALID, ("grpc-status-details-bin", "!"))), (UnavailableError, "")),
    "details that are no status": (
        answer(ends=(INVALID, ("grpc-message", "m"), ("grpc-status-details-bin", "/////w"))),
        (InvalidArgumentError, "m"),
    ),
    "a text that is not UTF-8": (answer(ends=(INVALID, ("grpc-message", "%ff%fe"))), (InvalidArgumentError, "")),
    "a text that is not ASCII": (answer(ends=(INVALID, ("grpc-message", b"\xff\xfe"))), (InvalidArgumentError, "")),
    "a request id that is not ASCII": (
        [Headers((*HEADERS, ("x-request-id", b"\xff\xfe"))), trailers(INVALID, ("grpc-message", "m"))],
        (InvalidArgumentError, "m"),
    ),
    "a reset": ([Headers(HEADERS), Reset(ErrorCodes.INTERNAL_ERROR)], (UnavailableError, "")),
    "a reset at once": ([Reset(ErrorCodes.ENHANCE_YOUR_CALM)], (ResourceExhaustedError, "")),
    "the end of the connection": ([Headers(HEADERS), GoAway(ErrorCodes.NO_ERROR)], (UnavailableError, "")),
    "a page of HTML": ([Headers(((":status", "404"), ("content-type", "text/html")), end=True)], (FlywheelError, "")),
    "no trailers": ([Headers(HEADERS), Headers((("x-other", "y"),), end=True)], (UnavailableError, "")),
}


def serving(steps: list[Step]) -> Any:
    """Serves these steps to every call, and is SERVING for grpc's own health checks."""
    server = HostileServer()
    server.answers = lambda path: [Headers(HEADERS), prefixed(SERVING)] if path.endswith("/Watch") else steps
    return server.serving()


async def outcome(caller: Caller, method: str) -> tuple[type, object, str]:
    """Returns what a call of the method ends with: type, code and message of an error, or the result."""
    call = getattr(caller.client, method)
    arguments = {"text": "p", "max_tokens": 1} if method in GENERATIONS else {}
    try:
        if method not in STREAMS:
            result = await caller.ask(call, **arguments)
        elif caller.is_async:
            result = [each async for each in call(**arguments)]
        else:
            result = await asyncio.to_thread(lambda: list(call(**arguments)))
    except FlywheelError as error:
        return type(error), error.code, error.message
    return type(result), None, repr(result)


async def outcomes(target: Any, method: str, **arguments: Any) -> tuple[type, object, str]:
    """Returns the outcome of a call, which must be the same in both clients."""
    found = []
    for kind in (Client, AsyncClient):
        caller = Caller(kind, target, **{"timeout": 10, "retry": None} | arguments)
        try:
            found.append(await outcome(caller, method))
        finally:
            await caller.close()
    threads, other = found
    # grpc.aio 1.73 raises KeyError for a status that it does not know, instead of passing its message on.
    assert threads == other or (GRPC < (1, 85) and threads[:2] == other[:2] and "is not one of gRPC" in other[2])
    return threads


@pytest.mark.parametrize("name", ANSWERS)
async def test_an_answer_against_the_rules_is_the_same_error_in_both_clients(name: str) -> None:
    steps, (kind, message) = ANSWERS[name]
    with serving(steps) as server:
        for method in METHODS:
            found, code, text = await outcomes(server.address, method)
            assert (found, method) == (kind, method), text
            assert isinstance(code, grpc.StatusCode)
            assert message in text


NONE: dict[str, list[Step]] = {
    "trailers": answer(),
    "trailers only": [Headers((*HEADERS, *OK), end=True)],
    "a part of a message": [Headers(HEADERS), prefixed(b"abcdef")[:7], trailers(*OK)],
}


@pytest.mark.parametrize("steps", NONE.values(), ids=NONE)
async def test_a_missing_answer_is_an_error_except_for_a_stream(steps: list[Step]) -> None:
    with serving(steps) as server:
        for method in METHODS:
            found, _, text = await outcomes(server.address, method)
            if method in STREAMS:
                assert text == "[]"
            else:
                assert (found, text) == UNANSWERED


@pytest.mark.parametrize(
    "message", [b"", b"\x08\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01\xf8\x01\x05"], ids=["empty", "odd values"]
)
async def test_a_message_that_can_be_read_is_handed_on(message: bytes) -> None:
    with serving(answer(message)) as server:
        for method in METHODS:
            _, code, _ = await outcomes(server.address, method)
            assert code is None


@pytest.mark.parametrize("method", STREAMS)
@pytest.mark.parametrize("kind", [Client, AsyncClient])
async def test_a_stream_with_something_that_is_no_message_is_cancelled(kind: type, method: str) -> None:
    with serving([Headers(HEADERS), prefixed(b"\xff")]) as server:
        caller = Caller(kind, server.address, timeout=20, retry=Retry())
        found, _, text = await outcome(caller, method)
        assert (found, text) == UNREADABLE
        assert await asyncio.to_thread(server.resets.acquire, timeout=10)
        await caller.close()


@pytest.mark.parametrize("target", ["an address", "a directory"])
async def test_an_endpoint_that_answers_its_probe_with_nothing_gets_calls(target: str) -> None:
    with serving(answer()) as server:
        address: Any = server.address if target == "an address" else FakeDirectory(server.address)
        assert (await outcomes(address, "stats"))[::2] == UNANSWERED


def large(path: str) -> Iterable[Step]:
    """Yields an answer of 100 MiB."""
    yield Headers(HEADERS)
    if path.endswith("/Watch"):
        yield prefixed(SERVING)
        return
    yield b"\0" + LARGE.to_bytes(4, "big")
    for _ in range(LARGE // MIB):
        yield bytes(MIB)
    yield trailers(*OK)


def bombs() -> Answer:
    """Returns answers of 100 MiB, which compression makes much smaller on the wire."""
    bomb = zlib.compress(bytes(LARGE), level=1, wbits=31)

    def answers(path: str) -> Iterable[Step]:
        yield Headers((*HEADERS, ("grpc-encoding", "gzip")))
        if path.endswith("/Watch"):
            yield prefixed(SERVING)
            return
        yield prefixed(bomb, compressed=True)
        yield trailers(*OK)

    return answers


def grow(address: str) -> None:
    """Calls both clients, and prints by how many MiB the process has grown."""

    async def call() -> None:
        for target, methods in ((address, METHODS), (FakeDirectory(address), ("generate_all", "health"))):
            for method in methods:
                for kind in (Client, AsyncClient):
                    caller = Caller(kind, target, timeout=20, retry=None)
                    found, _, text = await outcome(caller, method)
                    await caller.close()
                    assert found in {ResourceExhaustedError, InternalError, UnavailableError}, text

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    asyncio.run(call())
    sys.stdout.write(str((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024))


@pytest.mark.parametrize("compressed", [False, *further([True])], ids=["large", "compressed"])
def test_too_large_an_answer_is_refused_before_it_is_held(compressed: bool) -> None:
    server = HostileServer()
    server.answers = bombs() if compressed else large
    program = "import sys; from tests.client.test_hostile_answers import grow; grow(*sys.argv[1:])"
    with server.serving():
        command = [sys.executable, "-c", program, server.address]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    if GRPC >= (1, 85):  # 1.73 refuses such an answer as well, but was seen to take it in first
        assert int(done.stdout) < LARGE // MIB // 2


async def test_too_large_an_answer_is_not_tried_again_and_the_users_limit_wins() -> None:
    asked = []
    server = HostileServer()

    def answers(path: str) -> Any:
        asked.append(path)
        return [Headers(HEADERS), prefixed(SERVING)] if path.endswith("/Watch") else answer(b"\x2a\xc0\x3e" + bytes(8000))

    server.answers = answers
    with server.serving():
        options = [("grpc.max_receive_message_length", 8000)]
        found, _, text = await outcomes(server.address, "generate_all", channel_options=options, retry=Retry())
        assert found is ResourceExhaustedError
        assert "larger than max" in text
        assert sum(path.endswith("/GenerateAll") for path in asked) == 2
        assert (await outcomes(server.address, "generate_all"))[1] is None
