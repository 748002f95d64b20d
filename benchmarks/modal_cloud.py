"""Runs the stand-in of Modal's cloud, which the tests define, in a process of its own."""

import multiprocessing
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

APP: Final = "benchmark"


@dataclass(frozen=True)
class CloudProcess:
    """The process of the stand-in.

    Attributes:
        environ: The environment variables with which a client process finds the stand-in.
    """

    environ: dict[str, str]
    _pipe: Connection

    def requests(self) -> Counter[str]:
        """Returns the number of requests to the control plane so far, by RPC."""
        self._pipe.send("requests")
        counted: Counter[str] = self._pipe.recv()
        return counted


@contextmanager
def modal_cloud(**script: Any) -> Iterator[CloudProcess]:  # noqa: ANN401 - the fields of a `Script`
    """Runs the stand-in for the length of the context. The app `APP` has a class that plays the script."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_run, args=(theirs, script))
    process.start()
    try:
        yield CloudProcess(ours.recv(), ours)
    finally:
        ours.send("end")
        process.join()


def _run(pipe: Connection, script: dict[str, Any]) -> None:
    from flywheel_server.engines.scripted import Script

    from tests.modal_cloud import ModalCloud, scripted

    with tempfile.TemporaryDirectory() as directory, ModalCloud(Path(directory)) as cloud:
        scripted.deploy(cloud, APP, Script(**script))
        pipe.send(cloud.environ)
        while pipe.recv() != "end":
            pipe.send(Counter(cloud.rpcs))
