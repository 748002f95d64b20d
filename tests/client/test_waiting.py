"""`flywheel` with a server that is starting, silent, or not there: it tells the user, and `generate` waits for an engine."""

from __future__ import annotations

import socket
import subprocess
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from flywheel_client import Client, DeadlineExceededError, Retry, UnavailableError, _terminal, _waiting
from flywheel_client._waiting import ENGINE_NOT_READY, NO_ANSWER, UNREACHABLE, ReadyServer
from google.rpc.error_details_pb2 import ErrorInfo
from grpc_health.v1.health_pb2 import HealthCheckResponse

from tests.client.command import FLYWHEEL, environment, flywheel
from tests.client.conftest import SERVICE, WAIT, serving_fake, unavailable
from tests.client.fake_directory import FakeDirectory
from tests.thorough import further

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from grpc_health.v1.health import HealthServicer

    from tests.client.conftest import FakeService

QUICK = Retry(max_attempts=2, initial_backoff=0.01)


def becomes(health: HealthServicer, status: str) -> None:
    for name in ("", SERVICE):
        health.set(name, HealthCheckResponse.ServingStatus.Value(status))


@contextmanager
def silent_server() -> Iterator[str]:
    """Gives the address of a server that takes connections and says nothing, as one that loads a model does."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"127.0.0.1:{listening.getsockname()[1]}"


class Generation:
    """A generation as the command makes it, in a thread."""

    def __init__(self, target: Any, *, timeout: float | None = None, wait_for_ready: bool = False) -> None:
        self.texts: list[str] = []
        self.client = Client(target, retry=QUICK, wait_for_ready=wait_for_ready)
        self.observer = Client(target, retry=None)
        self.ready = ReadyServer(self.observer, "It", timeout, wait_for_ready=wait_for_ready)
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.ready.call(self._generate)
        except BaseException as error:  # noqa: BLE001 - the test looks at it
            self.error = error

    def _generate(self, seconds: float | None) -> None:
        with self.client.generate_deltas("p", max_tokens=1, timeout=seconds) as deltas:
            self.texts += [delta.text for delta in self.ready.noting_silence(deltas)]

    def wait(self) -> None:
        self.thread.join(WAIT)
        assert not self.thread.is_alive()
        self.client.close()
        self.observer.close()


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Waits until the user has been told this. The client tells the user sooner than usual."""
    notes: list[str] = []
    monkeypatch.setattr(_waiting, "SILENCE_TIMEOUT", 0.7)
    monkeypatch.setattr(_waiting, "POLL_INTERVAL", 0.02)
    monkeypatch.setattr(_terminal, "show_aside", notes.extend)

    def wait(state: str) -> None:
        end = time.monotonic() + WAIT
        while not notes and time.monotonic() < end:
            time.sleep(0.005)
        assert [note.partition(". Waiting;")[0] for note in notes] == [f"It {state}"]

    return wait


@pytest.mark.parametrize("target", ["an address", "a directory"])
def test_an_engine_that_starts_is_waited_for(
    fake: FakeService, health: HealthServicer, noted: Callable[[str], None], target: str
) -> None:
    becomes(health, "NOT_SERVING")
    unavailable(fake)
    generation = Generation(fake.address if target == "an address" else FakeDirectory(fake.address))
    noted(ENGINE_NOT_READY)
    fake.refuses, fake.failure = False, None
    becomes(health, "SERVING")
    generation.wait()
    assert (generation.error, generation.texts) == (None, ["ab", "c"])


def test_the_engine_is_waited_for_until_the_deadline(
    fake: FakeService, health: HealthServicer, noted: Callable[[str], None]
) -> None:
    becomes(health, "NOT_SERVING")
    begun = time.monotonic()
    generation = Generation(fake.address, timeout=1.5)
    noted(ENGINE_NOT_READY)
    generation.wait()
    assert isinstance(generation.error, DeadlineExceededError)
    assert ENGINE_NOT_READY in generation.error.message
    assert 1.4 < time.monotonic() - begun < WAIT
    assert not fake.requests


def test_a_server_that_goes_while_it_starts_is_not_waited_for(health: HealthServicer, noted: Callable[[str], None]) -> None:
    becomes(health, "NOT_SERVING")
    with serving_fake(health) as fake:
        generation = Generation(fake.address)
        noted(ENGINE_NOT_READY)
    generation.wait()
    assert isinstance(generation.error, UnavailableError)


def test_what_has_begun_is_not_repeated(fake: FakeService, health: HealthServicer, noted: Callable[[str], None]) -> None:
    del noted
    fake.hangs = True
    fake.fail(grpc.StatusCode.UNAVAILABLE, "stopping", ErrorInfo(reason="ENGINE_UNAVAILABLE", domain="flywheel.v1"))
    generation = Generation(fake.address)
    assert fake.called.wait(WAIT)
    becomes(health, "NOT_SERVING")
    fake._ended.set()
    generation.wait()
    assert isinstance(generation.error, UnavailableError)
    assert len(fake.requests) == 1


def test_the_user_learns_of_silence(noted: Callable[[str], None]) -> None:
    with silent_server() as address:
        generation = Generation(address, timeout=2.0)
        noted(NO_ANSWER)
        generation.wait()
    assert isinstance(generation.error, DeadlineExceededError)


def test_the_user_learns_that_a_server_cannot_be_reached_if_it_is_waited_for(noted: Callable[[str], None]) -> None:
    generation = Generation("127.0.0.1:1", timeout=2.0, wait_for_ready=True)
    noted(UNREACHABLE)
    generation.wait()
    assert isinstance(generation.error, DeadlineExceededError)


def test_a_slow_generation_is_not_called_silent(fake: FakeService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_waiting, "SILENCE_TIMEOUT", 1.0)
    notes: list[str] = []
    monkeypatch.setattr(_terminal, "show_aside", notes.extend)
    looked = threading.Event()
    look = ReadyServer._state

    def noted_look(server: ReadyServer) -> str:
        state = look(server)
        looked.set()
        return state

    monkeypatch.setattr(ReadyServer, "_state", noted_look)
    fake.holds = True
    generation = Generation(fake.address)
    assert looked.wait(WAIT)
    fake._ended.set()
    generation.wait()
    assert (generation.texts, notes) == (["ab", "c"], [])


@pytest.mark.parametrize("ends", [False, True])
def test_a_generation_that_begins_while_the_server_is_asked_is_not_called_silent(
    monkeypatch: pytest.MonkeyPatch, ends: bool
) -> None:
    asked, begun, answered = threading.Event(), threading.Event(), threading.Event()
    notes: list[str] = []

    class Observer(Client):
        def health(self, *_: object, **__: object) -> str:
            asked.set()
            begun.wait(WAIT)
            threading.Timer(0.05, answered.set).start()
            raise DeadlineExceededError(grpc.StatusCode.DEADLINE_EXCEEDED, "silent")

    def results() -> Iterator[str]:
        asked.wait(WAIT)
        if not ends:
            yield "a"

    monkeypatch.setattr(_waiting, "SILENCE_TIMEOUT", 0.0)
    monkeypatch.setattr(_terminal, "show_aside", notes.extend)
    for _ in ReadyServer(Observer("localhost:1"), "It", None, wait_for_ready=False).noting_silence(results()):
        pass
    begun.set()
    assert answered.wait(WAIT)
    assert not notes


@pytest.mark.parametrize("options", [[], *further([["--json"]])], ids=str)
def test_the_command_waits_for_the_engine(fake: FakeService, health: HealthServicer, options: list[str]) -> None:
    becomes(health, "NOT_SERVING")
    with subprocess.Popen(
        [*FLYWHEEL, "generate", "p", *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(fake)
    ) as process:
        assert process.stderr is not None
        assert process.stderr.readline().startswith(f"The server at {fake.address} {ENGINE_NOT_READY}. Waiting".encode())
        becomes(health, "SERVING")
        out, _ = process.communicate(timeout=WAIT)
    assert process.returncode == 0
    assert b"abc" in out
    assert len(fake.requests) == 1


def test_the_command_says_that_its_time_is_over(fake: FakeService, health: HealthServicer) -> None:
    becomes(health, "NOT_SERVING")
    process = flywheel(fake, "generate", "p", "--timeout", "2")
    assert process.returncode == 1
    assert b"flywheel: DEADLINE_EXCEEDED" in process.stderr
    assert ENGINE_NOT_READY.encode() in process.stderr


@pytest.mark.parametrize("command", [("generate", "p"), *further([("stats",), ("model",), ("health",)])], ids=str)
def test_the_command_says_that_nothing_listens(fake: FakeService, command: tuple[str, ...]) -> None:
    process = flywheel(fake, *command, "--timeout", "0.5", "--address", "127.0.0.1:1")
    assert process.returncode == 1
    assert b"gRPC names one of them. Is flywheel-server running at 127.0.0.1:1?" in process.stderr


@pytest.mark.parametrize("command", [("health",), *further([("generate", "p"), ("stats",), ("model",)])], ids=str)
def test_the_command_says_that_the_server_is_silent(command: tuple[str, ...]) -> None:
    with silent_server() as address:
        words = [*FLYWHEEL, *command, "--timeout", "0.5", "--address", address]
        process = subprocess.run(words, capture_output=True, timeout=WAIT, check=False)
    assert process.returncode == 1
    assert f"The server at {address} has not answered. It may be loading its model".encode() in process.stderr


def test_the_command_says_that_the_engine_is_not_there(fake: FakeService) -> None:
    unavailable(fake)
    process = flywheel(fake, "model")
    assert process.returncode == 1
    assert f"The server at {fake.address} answers, but its engine is starting".encode() in process.stderr
