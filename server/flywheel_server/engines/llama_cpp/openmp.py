"""Adjusts how long the threads of llama.cpp spin while they wait for one another at the barriers of OpenMP.

For each token, there are some hundred barriers. A waiting thread of GNU's OpenMP (libgomp) spins before it sleeps. On a quiet
machine, long spins are fastest, because the other threads arrive soon. On a busy machine, spinning takes the core that a late
thread needs: beside two busy programs on two cores, two threads may take seconds for a token.

libgomp spins for a short time only while it has more threads than there are cores; see GOMP_SPINCOUNT in its manual. So while
other programs use the cores, this module gives libgomp additional threads, which sleep.
"""

import ctypes
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Final

SPIN_VARIABLES: Final = {"GOMP_SPINCOUNT": "300000", "OMP_WAIT_POLICY": "active"}
"""The environment variables that libgomp is loaded with. If the user sets one of them, this module changes nothing.

Threads then spin for some milliseconds, as they do by default; with more threads than cores, for 1,000 rounds (5 to 50 µs).
"""

SAMPLE_INTERVAL: Final = 0.5
"""Seconds between two measurements of the CPU time of other programs."""

MAX_CORES_OF_OTHERS: Final = 0.4
"""How much of the cores that llama.cpp's threads need other programs may use before spins are shortened.

It lies between the load of a client and that of a busy program, which gets at least half a core.
"""

_SEMAPHORE_BYTES: Final = 64
"""At least the size of a sem_t."""


@contextmanager
def adjustable_spins() -> Iterator[None]:
    """Applies `SPIN_VARIABLES` to a libgomp that is loaded within the context, unless the user has set one of them.

    libgomp reads the environment once, when it is loaded. Child processes do not inherit the variables.
    """
    if sys.platform != "linux" or _is_set_by_user():
        yield
        return
    before = {name: os.environ[name] for name in SPIN_VARIABLES if name in os.environ}
    os.environ.update(SPIN_VARIABLES)
    try:
        yield
    finally:
        for name in SPIN_VARIABLES:
            del os.environ[name]
        os.environ.update(before)


class SpinGuard:
    """Shortens the spins of computing threads while other programs use their cores. Measures that in a thread of its own.

    The spins are short at first: loading a model computes a step and holds the interpreter lock, so nothing can be measured
    during that time.

    Arguments:
        threads: How many threads compute.
        used: Returns the CPU seconds that other programs have used so far; raises `OSError` if it cannot tell.
    """

    def __init__(self, threads: int, used: Callable[[], float] | None = None) -> None:
        self._threads = threads
        self._used = used or _used_by_others
        self._closed = threading.Event()
        self._measuring: threading.Thread | None = None
        self._short_spins = ExitStack()
        self._is_short = False
        library = _libgomp()
        if threads > 1 and library is not None and not _is_set_by_user():
            self._shorten(library)
            self._measuring = threading.Thread(target=self._measure, args=(library,), name="spins", daemon=True)
            self._measuring.start()

    def close(self) -> None:
        """Stops measuring."""
        self._closed.set()
        if self._measuring:
            self._measuring.join()

    def _measure(self, library: ctypes.CDLL) -> None:
        free = max(0, _cores() - self._threads) + MAX_CORES_OF_OTHERS
        with self._short_spins:
            for (before, since), (used, at) in pairwise(self._samples()):
                if (used - before) / (at - since) > free:
                    self._shorten(library)
                else:
                    self._short_spins.close()
                    self._is_short = False

    def _shorten(self, library: ctypes.CDLL) -> None:
        count = max(2, _cores() - self._threads + 2)
        if not self._is_short and _can_start(count):
            self._short_spins.enter_context(_sleeping_threads(library, count))
            self._is_short = True

    def _samples(self) -> Iterator[tuple[float, float]]:
        """Yields the CPU seconds of other programs and the time of the measurement, in seconds, until `close`."""
        while True:
            # The process may have run out of file descriptors.
            with suppress(OSError):
                yield self._used(), time.monotonic()
            if self._closed.wait(SAMPLE_INTERVAL):
                return


@contextmanager
def _sleeping_threads(library: ctypes.CDLL, count: int) -> Iterator[None]:
    """Gives libgomp that many sleeping threads. One of them is started here and calls libgomp, which starts the others."""
    c = ctypes.CDLL(None)
    semaphore = ctypes.create_string_buffer(_SEMAPHORE_BYTES)
    c.sem_init(semaphore, 0, 0)
    arguments = (c.sem_wait, semaphore, ctypes.c_uint(count), ctypes.c_uint(0))
    thread = threading.Thread(target=library.GOMP_parallel, args=arguments, name="sleeps", daemon=True)
    thread.start()
    try:
        yield
    finally:
        for _ in range(count):
            c.sem_post(semaphore)
        thread.join()


def _can_start(count: int) -> bool:
    """Returns whether that many threads can be started. libgomp ends the process if it cannot start a thread."""
    ended = threading.Event()
    started = []
    try:
        for _ in range(count):
            thread = threading.Thread(target=ended.wait, daemon=True)
            thread.start()
            started.append(thread)
    except RuntimeError:
        return False
    finally:
        ended.set()
        for thread in started:
            thread.join()
    return True


def _libgomp() -> ctypes.CDLL | None:
    """Returns the loaded libgomp, which may be part of llama.cpp's package; None if none is loaded."""
    if sys.platform != "linux":
        return None
    lines = Path("/proc/self/maps").read_text().splitlines()
    path = next((line.split(maxsplit=5)[-1] for line in lines if "/libgomp" in line), None)
    return ctypes.CDLL(path) if path else None


def _cores() -> int:
    """Returns how many cores the process may run on. libgomp and `_used_by_others` count them alike, without CPU quotas."""
    return len(os.sched_getaffinity(0))


def _is_set_by_user() -> bool:
    return any(os.environ.get(name) for name in SPIN_VARIABLES)


def _used_by_others() -> float:
    """Returns the CPU seconds that other processes have used on the cores that this process may use."""
    cores = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    ticks = 0
    for line in Path("/proc/stat").read_text().splitlines():
        name, *fields = line.split()
        if name in cores:
            # See proc_stat(5).
            user, nice, system, _idle, _iowait, irq, softirq = map(int, fields[:7])
            ticks += user + nice + system + irq + softirq
    return ticks / os.sysconf("SC_CLK_TCK") - time.process_time()
