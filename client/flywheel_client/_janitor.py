"""Runs jobs in a thread of their own, for code that must not run them itself."""

import sys
import threading
from collections.abc import Callable
from queue import SimpleQueue

Job = Callable[[], object]


class Janitor:
    """Runs jobs one after another in a thread of its own.

    grpc holds locks while it calls Python code. If a signal handler or finalizer interrupts such code and then calls grpc, it
    may wait for a lock that is released only after it has returned. `run_soon` never waits.
    """

    def __init__(self) -> None:
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        # The thread does not hold this object, so that the thread ends when the object is gone. It is a daemon thread, because
        # a job may be running when the process ends.
        threading.Thread(target=_run, args=(self._jobs,), name="flywheel-client", daemon=True).start()

    def run_soon(self, job: Job) -> None:
        """Adds a job. This may be called at any time: `SimpleQueue.put` is reentrant."""
        self._jobs.put(job)

    def end(self) -> None:
        """Ends the thread after the jobs that were added before. Later jobs never run."""
        self._jobs.put(None)

    __del__ = end


def _run(jobs: "SimpleQueue[Job | None]") -> None:
    while (job := jobs.get()) is not None:
        try:
            job()
        except Exception:  # noqa: BLE001 - reported as an error of the thread, which goes on to later jobs
            threading.excepthook(threading.ExceptHookArgs((*sys.exc_info(), threading.current_thread())))
        # While the thread waits for a job, it must not keep the last job, and with it a call, alive.
        del job
