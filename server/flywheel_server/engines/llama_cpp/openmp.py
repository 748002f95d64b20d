"""How the threads of llama.cpp wait for one another, some hundred times for each token: at the barriers of OpenMP.

A thread of GNU's OpenMP (libgomp) spins before it sleeps. Long spins are fastest on a quiet machine, where the others arrive
soon. If other programs want the cores, the thread that it waits for may not be running, and spinning takes the very time that
this one needs: beside two busy programs on two cores, two threads may take seconds for a token.

libgomp spins for a moment only while it has more threads than there are cores, as its manual says of GOMP_SPINCOUNT. So while
other programs use the cores, it is given further threads, which sleep.
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

CHOSEN_BY_USER: Final = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
"""Variables that say how long threads spin. If one is set, it holds."""

VARIABLES: Final = {"GOMP_SPINCOUNT": "300000", "OMP_WAIT_POLICY": "active"}
"""Milliseconds on a quiet machine, as without the variables; and 1,000 spins, 5 to 50 µs, with more threads than cores."""

LOOK_INTERVAL: Final = 0.5
"""Seconds between two looks at what other programs use."""

OTHERS_CORES: Final = 0.4
"""Cores that other programs may use of those that the threads need. A busy one gets half a core at least, and a client less."""

_SEMAPHORE_BYTES: Final = 64
"""At least what a sem_t takes."""


@contextmanager
def adjustable_spins() -> Iterator[None]:
    """Makes a libgomp that is loaded within the context spin as `VARIABLES` say, unless the environment says how threads wait.

    The library reads the environment once, when it is loaded. Child processes do not inherit the variables.
    """
    if sys.platform != "linux" or _is_chosen_by_user():
        yield
        return
    before = {name: os.environ.get(name) for name in VARIABLES}
    os.environ.update(VARIABLES)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class SpinGuard:
    """Lets threads that compute spin for a moment only while other programs want their cores. Looks on a thread of its own.

    At first they spin for a moment: whoever loads a model computes a step, and holds the interpreter, so that nobody looks.

    Arguments:
        threads: How many threads compute.
        used: Returns the seconds of all cores that other programs have used so far; raises `OSError` if it cannot tell.
    """

    def __init__(self, threads: int, used: Callable[[], float] | None = None) -> None:
        self._threads = threads
        self._used = used or _used_by_others
        self._ended = threading.Event()
        self._watch: threading.Thread | None = None
        self._short = ExitStack()
        self._is_short = False
        library = _libgomp()
        if threads > 1 and library is not None and not _is_chosen_by_user():
            self._shorten(library)
            self._watch = threading.Thread(target=self._look, args=(library,), name="spins", daemon=True)
            self._watch.start()

    def close(self) -> None:
        """Stops looking."""
        self._ended.set()
        if self._watch:
            self._watch.join()

    def _look(self, library: ctypes.CDLL) -> None:
        free = max(0, _cores() - self._threads) + OTHERS_CORES
        with self._short:
            for (before, since), (used, at) in pairwise(self._looks()):
                if (used - before) / (at - since) > free:
                    self._shorten(library)
                else:
                    self._short.close()
                    self._is_short = False

    def _shorten(self, library: ctypes.CDLL) -> None:
        count = max(2, _cores() - self._threads + 2)
        if not self._is_short and _can_start(count):
            self._short.enter_context(_sleeping_threads(library, count))
            self._is_short = True

    def _looks(self) -> Iterator[tuple[float, float]]:
        """Yields what other programs have used and when, until the end."""
        while True:
            # The process may have run out of descriptors.
            with suppress(OSError):
                yield self._used(), time.monotonic()
            if self._ended.wait(LOOK_INTERVAL):
                return


@contextmanager
def _sleeping_threads(library: ctypes.CDLL, count: int) -> Iterator[None]:
    """Gives libgomp so many threads, of which one is not its own, that sleep."""
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
    """Returns whether so many threads can be started. libgomp ends the process if it cannot start one."""
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
    """Returns the libgomp that is loaded, which may be one that came with llama.cpp."""
    if sys.platform != "linux":
        return None
    lines = Path("/proc/self/maps").read_text().splitlines()
    path = next((line.split(maxsplit=5)[-1] for line in lines if "/libgomp" in line), None)
    return ctypes.CDLL(path) if path else None


def _cores() -> int:
    """Returns how many cores there are, as libgomp counts them, and `_used_by_others`: a quota is no matter of cores."""
    return len(os.sched_getaffinity(0))


def _is_chosen_by_user() -> bool:
    return any(os.environ.get(name) for name in CHOSEN_BY_USER)


def _used_by_others() -> float:
    """Returns the seconds that other processes have used the cores which this one may use."""
    cores = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    ticks = 0
    for line in Path("/proc/stat").read_text().splitlines():
        name, *fields = line.split()
        if name in cores:
            # See proc_stat(5).
            user, nice, system, _idle, _iowait, irq, softirq = map(int, fields[:7])
            ticks += user + nice + system + irq + softirq
    return ticks / os.sysconf("SC_CLK_TCK") - time.process_time()
