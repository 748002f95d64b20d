"""The thread that ends calls and closes channels for a client."""

import threading
import time
from queue import SimpleQueue
from typing import Any

import pytest
from flywheel_client import _calls_sync
from flywheel_client._calls_sync import RetryingChannel
from flywheel_client._janitor import Janitor

from tests.client.conftest import WAIT


class BrokenError(Exception):
    pass


class Channel:
    """Stands for a channel of grpc that may fail to close."""

    def __init__(self, *, breaks: bool) -> None:
        self.breaks = breaks
        self.closed = False

    def close(self) -> None:
        self.closed = True
        if self.breaks:
            raise BrokenError


class Channels(RetryingChannel):
    def __init__(self, channels: list[Any]) -> None:
        super().__init__(None)
        self.channels = channels

    def _channels(self) -> list[Any]:
        return self.channels

    def pick(self, call: object) -> Any:
        raise NotImplementedError


@pytest.fixture
def reported(monkeypatch: pytest.MonkeyPatch) -> SimpleQueue[type[BaseException]]:
    """What threads have reported."""
    reported: SimpleQueue[type[BaseException]] = SimpleQueue()
    monkeypatch.setattr(threading, "excepthook", lambda args: reported.put(args.exc_type))
    return reported


def fail() -> None:
    raise BrokenError


def test_a_job_that_fails_is_reported_and_ends_no_other(reported: SimpleQueue[type[BaseException]]) -> None:
    janitor = Janitor()
    done = threading.Event()
    janitor.run_soon(fail)
    janitor.run_soon(done.set)
    assert done.wait(WAIT)
    assert reported.get(timeout=WAIT) is BrokenError
    janitor.end()


def test_a_channel_that_cannot_be_closed_keeps_no_other_open(
    reported: SimpleQueue[type[BaseException]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_calls_sync, "CLOSE_TIMEOUT", WAIT)
    channels = [Channel(breaks=breaks) for breaks in (False, True, False)]
    begun = time.monotonic()
    Channels(channels).close()
    assert time.monotonic() - begun < WAIT
    assert [channel.closed for channel in channels] == [True] * 3
    assert reported.get(timeout=WAIT) is BrokenError
