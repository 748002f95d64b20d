"""A pipe that tests of outputs and logs fill or read."""

import os
import re
from collections.abc import Iterator

import pytest

from tests.serving import until


class Pipe:
    """A pipe that is read only on request."""

    def __init__(self) -> None:
        self.reading, self.writing = os.pipe()

    def fill(self) -> None:
        """Writes until the pipe is full."""
        os.set_blocking(self.writing, False)
        try:
            while True:
                os.write(self.writing, b"." * 4096)
        except BlockingIOError:
            os.set_blocking(self.writing, True)

    async def read_until(self, sign: re.Pattern[bytes]) -> bytes:
        """Reads until the pattern matches, and returns all that was read."""
        os.set_blocking(self.reading, False)
        read = b""

        def found() -> bool:
            nonlocal read
            try:
                read += os.read(self.reading, 2**20)
            except BlockingIOError:
                return False
            return sign.search(read) is not None

        await until(found, "it is written", 30)
        return read


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    pipe = Pipe()
    yield pipe
    os.close(pipe.reading)
    os.close(pipe.writing)
