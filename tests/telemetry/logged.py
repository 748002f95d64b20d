"""The log of a server in this process, as its readers get it."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import structlog
from flywheel_server import logs
from flywheel_server.system.output import Output

ENDS = ("call finished", "call refused", "call failed")
"""The events that say how a call ended."""


class Log:
    """A log in a file."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def text(self) -> str:
        return self._file.read_text()

    def lines(self) -> list[dict[str, Any]]:
        """Returns the whole lines so far of a log in JSON."""
        return [json.loads(line) for line in self.text().splitlines(keepends=True) if line.endswith("\n")]

    def ends(self, request_id: str) -> list[dict[str, Any]]:
        """Returns the lines that say how a call ended."""
        return [line for line in self.lines() if line.get("request_id") == request_id and line["event"] in ENDS]


@contextmanager
def logging_to_output(output: Output | None, form: Literal["text", "json"] = "json") -> Iterator[None]:
    """Writes the log of this process to the output for the length of the context."""
    root = logging.getLogger()
    before, configuration = (root.handlers, root.level), structlog.get_config()
    try:
        logs.configure("info", form, output)
        # Loggers that are kept would write to this output for ever.
        structlog.configure(cache_logger_on_first_use=False)
        yield
    finally:
        structlog.configure(**configuration)
        structlog.contextvars.clear_contextvars()
        root.handlers[0].close()
        root.handlers, level = before
        root.setLevel(level)


@contextmanager
def logging_to(file: Path, form: Literal["text", "json"] = "json") -> Iterator[Log]:
    """Writes the log of this process to the file for the length of the context."""
    with file.open("wb") as writing, logging_to_output(Output(writing.fileno()), form):
        yield Log(file)
