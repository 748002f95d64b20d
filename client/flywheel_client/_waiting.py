"""How `flywheel generate` waits for a server whose engine is not ready, and says so."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from math import inf
from typing import Final, TypeVar

import grpc
from flywheel_proto._service_name import SERVICE_NAME

from flywheel_client import _terminal as terminal
from flywheel_client._client_sync import Client
from flywheel_client._errors import DeadlineExceededError, FlywheelError, UnavailableError, has_begun

ResultT = TypeVar("ResultT")

ENGINE_NOT_READY: Final = "answers, but its engine is not ready"
NO_ANSWER: Final = "has not answered yet: it may be loading its model"
UNREACHABLE: Final = "cannot be reached yet"

POLL_INTERVAL: Final = 0.5
"""Seconds between two health checks of a server whose engine is not ready."""

SILENCE_TIMEOUT: Final = 3.0
"""Seconds without a result after which the server is asked for its health, and that it may take to answer."""


def was_begun(error: FlywheelError) -> bool:
    """Returns whether the engine had begun on a call of a client that failed."""
    return error.__cause__ is not None and has_begun(error.__cause__)


class ReadyServer:
    """A server that a generation waits for, within its deadline, while it answers that its engine is not ready.

    The engine is not ready while it starts, for instance. A server that cannot be reached is waited for only if the user has
    asked for that: a wrong address should show at once.
    """

    def __init__(self, observer: Client, name: str, timeout: float | None, *, wait_for_ready: bool) -> None:
        """Begins the time of the generation.

        Args:
            observer: A client of the server that tries nothing again, for health checks.
            name: How to name the server to the user, at the beginning of a sentence.
            timeout: The seconds that the generation may take, all waiting included; None sets no deadline.
            wait_for_ready: Whether the generation waits for a server that cannot be reached.
        """
        self._observer = observer
        self._name = name
        self._deadline = inf if timeout is None else time.monotonic() + timeout
        self._wait_for_ready = wait_for_ready
        self._noted: set[str] = set()
        self._was_not_ready = False
        """Whether the engine was not ready at any look since the last try."""

    def call(self, generate: Callable[[float | None], None]) -> None:
        """Calls `generate` with the seconds that are left, and again, while it fails because the engine is not ready.

        Raises:
            DeadlineExceededError: The engine was not ready in time.
            FlywheelError: The generation failed for another reason, or after the engine had begun on it.
        """
        while True:
            self._was_not_ready = False
            try:
                generate(None if self._deadline == inf else max(self._deadline - time.monotonic(), 0.0))
            except UnavailableError as error:
                # Without a request id, the error is not about the call: a directory knows of no server to send it to.
                if was_begun(error) or not error.request_id:
                    raise
                self._state()
                # It may have become ready meanwhile.
                if not self._was_not_ready:
                    raise
            else:
                return
            self._note(ENGINE_NOT_READY)
            while self._state() == ENGINE_NOT_READY:
                if time.monotonic() + POLL_INTERVAL >= self._deadline:
                    message = f"The deadline passed. {self._name} {ENGINE_NOT_READY}."
                    raise DeadlineExceededError(grpc.StatusCode.DEADLINE_EXCEEDED, message)
                time.sleep(POLL_INTERVAL)

    def noting_silence(self, results: Iterable[ResultT]) -> Iterator[ResultT]:
        """Yields the results of a generation; if the first one takes long for want of a ready server, tells the user so."""
        silent = True

        def look() -> None:
            state = self._state()
            # Asking took a while, in which the generation may have begun or ended.
            if silent:
                self._note(state)

        timer = threading.Timer(SILENCE_TIMEOUT, look)
        timer.daemon = True
        timer.start()
        try:
            for result in results:
                timer.cancel()
                silent = False
                yield result
        finally:
            timer.cancel()
            silent = False

    def _state(self) -> str:
        """Returns what keeps the generation waiting; empty if the server is ready, or there is nothing to wait for."""
        try:
            status = self._observer.health(SERVICE_NAME, timeout=SILENCE_TIMEOUT, wait_for_ready=False)
        except DeadlineExceededError:
            return NO_ANSWER
        except UnavailableError:
            return UNREACHABLE if self._wait_for_ready else ""
        except (FlywheelError, RuntimeError):
            return ""  # the server has no health, or the client has been closed
        if status != "NOT_SERVING":
            return ""
        self._was_not_ready = True
        return ENGINE_NOT_READY

    def _note(self, state: str) -> None:
        if state and state not in self._noted:
            self._noted.add(state)
            terminal.show_aside([f"{self._name} {state}. Waiting; Ctrl-C ends that, and --timeout limits it."])
