"""A thread that does what must not be done where it is asked for."""

import sys
import threading
from collections.abc import Callable
from queue import SimpleQueue

Job = Callable[[], object]


class Janitor:
    """Runs jobs one after another in a thread of its own.

    grpc holds locks while it calls Python code. A signal handler or a finalizer that interrupts such code, and then calls grpc
    itself, may wait for a lock that is only released after it has returned. `run_soon` never waits.
    """

    def __init__(self) -> None:
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        # The thread does not hold this object, so that it ends if nobody does. A daemon, because it may be in the middle of
        # a job of a process that ends.
        threading.Thread(target=_run, args=(self._jobs,), name="flywheel-client", daemon=True).start()

    def run_soon(self, job: Job) -> None:
        """Adds a job. May be called at any moment: `SimpleQueue.put` is reentrant."""
        self._jobs.put(job)

    def end(self) -> None:
        """Ends the thread after the jobs that it has; later ones are never run."""
        self._jobs.put(None)

    __del__ = end


def _run(jobs: "SimpleQueue[Job | None]") -> None:
    while (job := jobs.get()) is not None:
        try:
            job()
        except Exception:  # noqa: BLE001 - reported as if it had ended the thread, which later jobs need
            threading.excepthook(threading.ExceptHookArgs((*sys.exc_info(), threading.current_thread())))
        # While the thread waits, the last job must not keep a call from being collected.
        del job
