"""What signals do to `flywheel-server`. docs/operations.md has the table.

Imports nothing of ours and little else: until this is done, a signal ends the process as the system sees fit, or is lost if the
process is the first of a container.
"""

import faulthandler
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Final, NoReturn

STOPPING: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
"""Each of them stops the server, and a second one ends its drain."""

STACKS: Final = signal.SIGUSR1
"""Has the stacks of all threads written to standard error."""

_IGNORED: Final = ("SIGUSR2", "SIGALRM", "SIGVTALRM", "SIGPROF", "SIGIO", "SIGPWR", "SIGSTKFLT")
"""What would end the process although nothing is wrong with it. Not every system has all of them."""


def stopping() -> list[signal.Signals]:
    """Return the signals that are to stop this process: all of `STOPPING`, but without SIGHUP under `nohup`."""
    ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else set()
    return [number for number in STOPPING if number not in ignored]


class StopSignals:
    """The signals that stop the server, which a thread of its own receives from the beginning to the end of the process.

    All threads block these signals, because they inherit that from the one that makes this. So a signal does not reach the
    handlers that llama.cpp sets up while it loads a model, which would swallow it. What arrives while llama.cpp holds the
    interpreter is acted on right after.

    Until `calling` says otherwise, a signal ends the process with 0, as if the server had stopped.
    """

    def __init__(self) -> None:
        self._act: Callable[[], object] = _end
        numbers = stopping()
        signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
        for number in numbers:
            # A shell without job control has what runs in the background ignore SIGINT and SIGQUIT.
            signal.signal(number, signal.SIG_DFL)
        threading.Thread(target=self._receive, args=(numbers,), name="signals", daemon=True).start()
        _ignore_what_means_nothing()
        write_stacks_to(2)

    @contextmanager
    def calling(self, act: Callable[[], object]) -> Iterator[None]:
        """Call `act` for each signal, on a thread, for the length of the context. It may raise `RuntimeError`."""
        before, self._act = self._act, act
        try:
            yield
        finally:
            self._act = before

    def _receive(self, numbers: list[signal.Signals]) -> None:
        while True:
            signal.sigwait(numbers)
            # An event loop that has just been closed takes no more calls.
            with suppress(RuntimeError):
                self._act()


def leave_stopping_to_parent() -> None:
    """Heed no stopping signal: whoever sends them to a whole group of processes means the parent, which stops this one."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    _ignore_what_means_nothing()
    write_stacks_to(2)


def write_stacks_to(descriptor: int) -> None:
    """Write the stacks of all threads there when `STACKS` arrives, also while the interpreter is held."""
    faulthandler.register(STACKS, descriptor, all_threads=True)


def _ignore_what_means_nothing() -> None:
    named = [getattr(signal, name) for name in _IGNORED if hasattr(signal, name)]
    real_time = range(signal.SIGRTMIN, signal.SIGRTMAX + 1) if sys.platform == "linux" else ()
    for number in (*named, *real_time):
        signal.signal(number, signal.SIG_IGN)


def _end() -> NoReturn:
    os._exit(0)


def exit_at_once() -> None:
    """End the process when a stopping signal arrives, with the exit code that a shell shows for it: 128 and its number."""
    _handle(lambda number, _: os._exit(128 + number))


def exit_in_order() -> None:
    """Raise `SystemExit` in the main thread when a stopping signal arrives, with the same exit code."""

    def leave(number: int, _: FrameType | None) -> NoReturn:
        sys.exit(128 + number)

    _handle(leave)


def _handle(handler: Callable[[int, FrameType | None], object]) -> None:
    for number in stopping():
        signal.signal(number, handler)
