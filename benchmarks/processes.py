"""What a process and its children cost, read from outside. Linux only."""

import time
from threading import Event, Thread
from typing import Self

import psutil


def family(pid: int) -> list[int]:
    """Returns the process and all its descendants that run now."""
    return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]


def cpu_seconds(pid: int) -> float:
    """Returns the CPU time of the process and its descendants so far, threads that have ended included.

    The kernel's clock of a process has the same time as /proc/PID/stat, in nanoseconds instead of hundredths of a second.
    """
    # How clock_getcpuclockid(3) makes the id of a clock from that of a process on Linux.
    return sum(time.clock_gettime((~each << 3) | 2) for each in family(pid))


def resident_bytes(pid: int) -> int:
    """Returns the resident memory of the process and its descendants; pages that they share count for each of them."""
    return sum(psutil.Process(each).memory_info().rss for each in family(pid))


class PeakMemory:
    """Looks at the resident memory of a process now and then, for the length of the context."""

    INTERVAL = 0.2

    def __init__(self, pid: int) -> None:
        self.peak = resident_bytes(pid)
        self._pid = pid
        self._ended = Event()
        self._looking = Thread(target=self._look)

    def __enter__(self) -> Self:
        self._looking.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._looking.join()

    def _look(self) -> None:
        while not self._ended.wait(self.INTERVAL):
            self.peak = max(self.peak, resident_bytes(self._pid))
