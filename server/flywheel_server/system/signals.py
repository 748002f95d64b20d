"""Handles the signals of `flywheel-server`. docs/operations.md has a table of them.

This module imports little, so that signals are handled early. Until then, a signal has the system's default effect, or none in
the first process of a container.
"""

import faulthandler
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Final

STOP_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
"""The signals that stop the server. A second one ends its drain."""

DUMP_STACKS: Final = signal.SIGUSR1
"""The signal that writes the stacks of all threads to standard error."""

SWITCH_DEBUG: Final = signal.SIGUSR2
"""The signal that switches the log to the level debug, and back.

Not SIGUSR1: in a container on Modal, that signal cancels calls of Modal, and ends the process at other times.
"""

_IGNORED: Final = ("SIGALRM", "SIGVTALRM", "SIGPROF", "SIGIO", "SIGPWR", "SIGSTKFLT")
"""Signals that would end the process by default for no reason. Some systems lack some of them."""


def stop_signals() -> list[signal.Signals]:
    """Returns the signals that stop this process: `STOP_SIGNALS`, but without SIGHUP under `nohup`."""
    ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else set()
    return [number for number in STOP_SIGNALS if number not in ignored]


class SignalReceiver:
    """Receives the stop signals and `SWITCH_DEBUG` on a thread of its own, until the process ends.

    All threads block these signals: they inherit that from the thread that creates this object. So a signal cannot reach the
    handlers that llama.cpp installs while it loads a model, which would swallow it. A signal that arrives while llama.cpp holds
    the interpreter lock is handled afterwards.

    Outside the context of `calling`, a stop signal ends the process with exit code 0, as if the server had stopped.
    """

    def __init__(self) -> None:
        self._act: Callable[[], object] = lambda: os._exit(0)
        self._is_debug = False
        self._debug_listeners: list[Callable[[bool], object]] = []
        self._debug_lock = threading.Lock()
        stops = stop_signals()
        numbers = [*stops, SWITCH_DEBUG]
        signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
        for number in stops:
            # A shell without job control makes background processes ignore SIGINT and SIGQUIT.
            signal.signal(number, signal.SIG_DFL)
        # Not the default, which would end the process if an earlier thread, which does not block the signal, got it.
        signal.signal(SWITCH_DEBUG, lambda *_: None)
        threading.Thread(target=self._receive, args=(numbers,), name="signals", daemon=True).start()
        _handle_other_signals()

    @contextmanager
    def calling(self, act: Callable[[], object]) -> Iterator[None]:
        """Calls `act` for each stop signal, on the thread, for the length of the context. `act` may raise `RuntimeError`."""
        before, self._act = self._act, act
        try:
            yield
        finally:
            self._act = before

    @contextmanager
    def switching_debug(self, act: Callable[[bool], object]) -> Iterator[None]:
        """Tells `act` for each `SWITCH_DEBUG` whether debug is on, on the thread, for the length of the context.

        If debug is on already, because the signal came earlier, tells `act` at once. `act` may raise `RuntimeError`.
        """
        with self._debug_lock:
            self._debug_listeners.append(act)
            if self._is_debug:
                act(True)
        try:
            yield
        finally:
            with self._debug_lock:
                self._debug_listeners.remove(act)

    def _receive(self, numbers: list[signal.Signals]) -> None:
        while True:
            number = signal.sigwait(numbers)
            # Raised by an event loop that has just been closed.
            with suppress(RuntimeError):
                if number == SWITCH_DEBUG:
                    self._switch_debug()
                else:
                    self._act()

    def _switch_debug(self) -> None:
        with self._debug_lock:
            self._is_debug = not self._is_debug
            for act in self._debug_listeners:
                act(self._is_debug)


def leave_signals_to_parent() -> None:
    """Ignores stop signals and `SWITCH_DEBUG`.

    If they are sent to the whole process group, the parent gets them too, and passes them on to this process.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, (*STOP_SIGNALS, SWITCH_DEBUG))
    _handle_other_signals()


def call_on_switch_debug(act: Callable[[], object]) -> None:
    """Calls `act` for each `SWITCH_DEBUG` in the main thread, which the signal may interrupt anywhere.

    For a process whose other signals belong to somebody else. Does nothing on another thread, where Python allows no handlers.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(SWITCH_DEBUG, lambda *_: act())


def write_stacks_to(descriptor: int) -> None:
    """Makes `DUMP_STACKS` write the stacks of all threads to the descriptor, even if native code holds the interpreter lock."""
    faulthandler.register(DUMP_STACKS, descriptor, all_threads=True)


def _handle_other_signals() -> None:
    named = [getattr(signal, name) for name in _IGNORED if hasattr(signal, name)]
    real_time = range(signal.SIGRTMIN, signal.SIGRTMAX + 1) if sys.platform == "linux" else ()
    for number in (*named, *real_time):
        signal.signal(number, signal.SIG_IGN)
    write_stacks_to(2)


def exit_at_once() -> None:
    """Makes a stop signal end the process at once, with the exit code that a shell reports for it: 128 + its number."""
    _handle(lambda number, _: os._exit(128 + number))


def exit_in_order() -> None:
    """Makes a stop signal raise `SystemExit` in the main thread, with the same exit code."""
    _handle(lambda number, _: sys.exit(128 + number))


def _handle(handler: Callable[[int, FrameType | None], object]) -> None:
    for number in stop_signals():
        signal.signal(number, handler)
