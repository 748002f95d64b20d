"""Sets what an interrupt (SIGINT, Ctrl-C) does to a command. Commands import this before any slow module."""

import os
import signal

EXIT_INTERRUPTED = 130
"""The exit code of a program that SIGINT ended, as shells report it."""


def exit_on_interrupt() -> None:
    """Makes an interrupt end the process at once. This is for the time before there is anything to clean up."""
    if not _is_ignored():
        signal.signal(signal.SIGINT, lambda *_: os._exit(EXIT_INTERRUPTED))


def raise_on_interrupt() -> None:
    """Makes an interrupt raise `KeyboardInterrupt`, which ends calls and closes connections."""
    if not _is_ignored():
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _is_ignored() -> bool:
    """Returns whether interrupts are ignored, as in background processes of a shell without job control."""
    return signal.getsignal(signal.SIGINT) is signal.SIG_IGN
