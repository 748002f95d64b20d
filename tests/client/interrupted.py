"""A program that is interrupted while it makes calls, again and again, by something that uses the same client.

    python -m tests.client.interrupted ADDRESS HOW WHAT TIMES

If it hangs, it prints where and exits with 1.
"""

import faulthandler
import gc
import random
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, Final

from flywheel_client import CallCancelledError, Client, PromptResults, Stream

LIMIT: Final = 100.0
"""Seconds after which the program counts as hanging."""

LONGEST_DELAY: Final = 0.004
"""The most seconds until an interruption: about as long as a call takes."""


@contextmanager
def refused(message: str) -> Iterator[None]:
    """Suppresses the `RuntimeError` of a call that is refused with this message."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith(message):
            raise


class Program:
    """Makes calls until it is interrupted, and begins again with another client."""

    def __init__(self, address: str, what: str) -> None:
        self._address = address
        self._interrupt: Callable[[], object] = getattr(self, what)
        self.client = Client(address, timeout=10)
        self.stream: Stream[Any] | None = None
        self.results: PromptResults | None = None
        self.interruptions = 0

    def interrupt(self) -> None:
        """Interrupts the program, by what the command line says."""
        self.interruptions += 1
        self._interrupt()

    def close(self) -> None:
        """Closes the client."""
        self.client.close()

    def cancel_stream(self) -> None:
        """Cancels the stream that is being read."""
        if self.stream is not None:
            self.stream.cancel()

    def close_stream(self) -> None:
        """Closes the stream that is being read."""
        if self.stream is not None:
            self.stream.close()

    def close_results(self) -> None:
        """Closes the results of many prompts that are being read."""
        if self.results is not None:
            self.results.close()

    def call(self) -> None:
        """Makes calls."""
        with refused("reentrant call"):
            self.client.stats()
            self.client.generate_all("p", max_tokens=1)

    def run(self, times: int, arm: Callable[["Program"], object]) -> None:
        """Makes calls until it was interrupted so many times, with a new client after each interruption."""
        # grpc imports some of itself only then.
        self.client.generate_all("p", max_tokens=1)
        while self.interruptions < times:
            before = self.interruptions
            kept: list[list[None]] = []
            arm(self)
            with refused("the client is closed"), suppress(CallCancelledError), self.client:
                while self.interruptions == before:
                    # Without objects that are kept, there is no garbage collection.
                    kept.extend([] for _ in range(20))
                    self.client.generate_all("p", max_tokens=1)
                    with self.client.generate_deltas("p", max_tokens=1) as self.stream:
                        for _ in self.stream:
                            pass
                    with self.client.generate_many(["p"] * 3, concurrency=2, max_tokens=1) as self.results:
                        for _ in self.results:
                            pass
            self.client = Client(self._address, timeout=10)
        self.client.close()


class Garbage:
    """Interrupts a program when the garbage collector finds it."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._cycle = self

    def __del__(self) -> None:
        self._program.interrupt()


def by_signal(_: Program) -> None:
    """Makes a signal arrive soon."""
    signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-5, LONGEST_DELAY))


def by_finalizer(program: Program) -> None:
    """Makes a garbage collection run soon, in the thread that makes the next objects."""
    gc.set_threshold(random.randint(1, 1000), 1, 1)
    Garbage(program)


def main(address: str, how: str, what: str, times: str) -> None:
    """Runs the program."""
    faulthandler.dump_traceback_later(LIMIT, exit=True)
    program = Program(address, what)

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        program.interrupt()

    signal.signal(signal.SIGALRM, interrupt)
    program.run(int(times), {"signal": by_signal, "finalizer": by_finalizer}[how])


if __name__ == "__main__":
    main(*sys.argv[1:])
