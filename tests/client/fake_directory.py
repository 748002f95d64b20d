"""A directory of servers whose addresses the test sets."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING

import grpc
from flywheel_client import FlywheelError, UnavailableError

from tests.client.conftest import WAIT

if TYPE_CHECKING:
    from tests.client.conftest import FakeService


class FakeDirectory:
    """Lists the addresses that the test has set."""

    def __init__(self, *addresses: str) -> None:
        self.addresses = list(addresses)
        self.error: Exception | None = None
        self.readings = 0
        self.answers = threading.Event()
        self.answers.set()

    async def read(self) -> list[str]:
        self.readings += 1
        if not self.answers.is_set():
            await asyncio.to_thread(self.answers.wait, WAIT)
        if self.error is not None:
            raise self.error
        return list(self.addresses)

    def no_endpoint(self) -> FlywheelError:
        return UnavailableError(grpc.StatusCode.UNAVAILABLE, "nothing is live")


def directory_of(fakes: list[FakeService]) -> FakeDirectory:
    return FakeDirectory(*(fake.address for fake in fakes))
