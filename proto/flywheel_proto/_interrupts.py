"""What an interrupt (SIGINT, Ctrl-C) does to a command. This is loaded before everything that takes a while to load."""

import os
import signal

EXIT_INTERRUPTED = 130
"""The exit code of a program that SIGINT ended, as a shell shows it."""


def exit_on_interrupt() -> None:
    """Lets an interrupt end the process at once, for the time in which nothing has to be tidied up."""
    if not _is_ignored():
        signal.signal(signal.SIGINT, lambda *_: os._exit(EXIT_INTERRUPTED))


def raise_on_interrupt() -> None:
    """Lets an interrupt raise `KeyboardInterrupt`, which ends calls and closes connections."""
    if not _is_ignored():
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _is_ignored() -> bool:
    """Returns whether interrupts are ignored: a shell without job control has what it runs in the background ignore them."""
    return signal.getsignal(signal.SIGINT) is signal.SIG_IGN
