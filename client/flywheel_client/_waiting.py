"""Makes `flywheel generate` wait for a server whose engine is not ready, and tell the user about it."""

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
"""Seconds without a result before a health check of the server, and also the timeout of each health check."""


def was_begun(error: FlywheelError) -> bool:
    """Returns whether the engine had begun on the call that failed with this error."""
    return error.__cause__ is not None and has_begun(error.__cause__)


class ReadyServer:
    """Makes a generation wait, within its deadline, while the server answers that its engine is not ready.

    For example, the engine is not ready while it starts. A generation waits for a server that cannot be reached only if the
    user asks for that, because the user should see at once that an address is wrong.
    """

    def __init__(self, observer: Client, name: str, timeout: float | None, *, wait_for_ready: bool) -> None:
        """Starts the deadline of the generation.

        Args:
            observer: A client of the server, without retries, for health checks.
            name: The name of the server for the user, for the beginning of a sentence.
            timeout: The seconds that the generation may take, including all waiting; None sets no deadline.
            wait_for_ready: Whether the generation waits for a server that cannot be reached.
        """
        self._observer = observer
        self._name = name
        self._deadline = inf if timeout is None else time.monotonic() + timeout
        self._wait_for_ready = wait_for_ready
        self._noted: set[str] = set()
        self._was_not_ready = False
        """Whether any health check since the last try showed that the engine was not ready."""

    def call(self, generate: Callable[[float | None], None]) -> None:
        """Calls `generate` with the seconds that are left, and repeats that while it fails because the engine is not ready.

        Raises:
            DeadlineExceededError: The engine was not ready in time.
            FlywheelError: The generation failed for another reason, or after the engine had begun on it.
        """
        while True:
            self._was_not_ready = False
            try:
                generate(None if self._deadline == inf else max(self._deadline - time.monotonic(), 0.0))
            except UnavailableError as error:
                # Without a request id, the error is not about a call: the directory lists no server.
                if was_begun(error) or not error.request_id:
                    raise
                self._state()
                # The engine may have become ready meanwhile.
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
        """Yields the results of a generation. Tells the user if no result arrives because the server is not ready."""
        silent = True

        def look() -> None:
            state = self._state()
            # The generation may have begun or ended during the health check.
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
        """Returns why the generation has to wait; empty if the server is ready, or waiting would not help."""
        try:
            status = self._observer.health(SERVICE_NAME, timeout=SILENCE_TIMEOUT, wait_for_ready=False)
        except DeadlineExceededError:
            return NO_ANSWER
        except UnavailableError:
            return UNREACHABLE if self._wait_for_ready else ""
        except (FlywheelError, RuntimeError):
            return ""  # the server has no health service, or the client was closed
        if status != "NOT_SERVING":
            return ""
        self._was_not_ready = True
        return ENGINE_NOT_READY

    def _note(self, state: str) -> None:
        if state and state not in self._noted:
            self._noted.add(state)
            terminal.show_aside([f"{self._name} {state}. Waiting; Ctrl-C ends the wait, and --timeout limits it."])
