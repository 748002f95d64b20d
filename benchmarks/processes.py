"""Reads the CPU time and the memory of a process and its descendants from outside. Linux only."""

import time
from threading import Event, Thread
from typing import Self

import psutil


def family(pid: int) -> list[int]:
    """Returns the process ids of the process and of all its running descendants."""
    return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]


def cpu_seconds(pid: int) -> float:
    """Returns the seconds of CPU time of the process and its running descendants, including threads that have ended.

    The kernel's CPU clock of a process has the time in /proc/PID/stat, but in nanoseconds instead of hundredths of a second.
    """
    # As clock_getcpuclockid(3) computes the id of a process's CPU clock on Linux.
    return sum(time.clock_gettime((~each << 3) | 2) for each in family(pid))


def resident_bytes(pid: int) -> int:
    """Returns the resident memory of the process and its descendants. Shared pages count once for each process."""
    return sum(psutil.Process(each).memory_info().rss for each in family(pid))


class PeakMemory:
    """Samples the resident memory of a process for the length of the context. `peak` is the maximum, in bytes."""

    INTERVAL_SECONDS = 0.2

    def __init__(self, pid: int) -> None:
        self.peak = resident_bytes(pid)
        self._pid = pid
        self._ended = Event()
        self._sampling = Thread(target=self._sample)

    def __enter__(self) -> Self:
        self._sampling.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._sampling.join()

    def _sample(self) -> None:
        while not self._ended.wait(self.INTERVAL_SECONDS):
            self.peak = max(self.peak, resident_bytes(self._pid))
