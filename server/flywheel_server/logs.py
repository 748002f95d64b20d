"""Configures the log: one line for each event on standard error, from this server and its libraries alike."""

import logging
from typing import Any, Literal

import structlog

from flywheel_server.system.output import Output

log = structlog.stdlib.get_logger(__name__)


class OutputHandler(logging.Handler):
    """Writes each record as a line to an `Output`, which never blocks.

    Records are formatted at once, because a waiting record would keep the objects in its arguments alive.

    Attributes:
        usual_level: The level of the log while debug is not switched on.
    """

    def __init__(self, formatter: logging.Formatter, output: Output, usual_level: str) -> None:
        super().__init__()
        self.usual_level = usual_level
        self.setFormatter(formatter)
        self._output = output
        output.notice = self._notice

    def emit(self, record: logging.LogRecord) -> None:
        """Writes the record."""
        try:
            self._output.write(self._line(record))
        except Exception:  # noqa: BLE001 - as every handler of logging
            self.handleError(record)

    def close(self) -> None:
        """Waits for a short time until all lines have been written. `logging` calls this at the end of the process."""
        self._output.close()
        super().close()

    def _line(self, record: logging.LogRecord) -> bytes:
        # Indented, so that no line of a traceback or of a caller's text looks like a record.
        text = "\n    ".join(self.format(record).splitlines())
        return f"{text}\n".encode(errors="backslashreplace")

    @property
    def dropped(self) -> int:
        """How many pieces of output have been dropped so far."""
        return self._output.dropped

    def _notice(self, dropped: int) -> bytes:
        text = "%s log lines dropped"
        return self._line(logging.LogRecord(__name__, logging.WARNING, __file__, 0, text, (dropped,), None))


def lines_dropped() -> int:
    """Returns how many lines of the log have been dropped so far; 0 if `configure` was not called."""
    return sum(handler.dropped for handler in logging.getLogger().handlers if isinstance(handler, OutputHandler))


def configure(
    level: Literal["debug", "info", "warning", "error"],
    form: Literal["auto", "text", "json"],
    output: Output | None = None,
    *,
    worker: int | None = None,
) -> None:
    """Logs events of `level` and above to `output`, by default standard error, in the form that `resolved` returns.

    Closes the handler that an earlier call has installed. With `worker`, each line has that worker's number.
    """
    output = output or Output(2)
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        *([] if worker is None else [lambda _, __, event: {**event, "worker": worker}]),
    ]
    render: list[Any]
    if resolved(form, output) == "json":
        # Tracebacks leave out local variables, because these hold prompts.
        tracebacks = structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
        render = [structlog.processors.ExceptionRenderer(tracebacks), structlog.processors.JSONRenderer()]
    else:
        plain = structlog.dev.plain_traceback
        render = [structlog.dev.ConsoleRenderer(colors=False, pad_event_to=0, pad_level=False, exception_formatter=plain)]
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    handler = OutputHandler(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *render],
        ),
        output,
        level.upper(),
    )
    root = logging.getLogger()
    for earlier in root.handlers:
        if isinstance(earlier, OutputHandler):
            earlier.close()
    root.handlers = [handler]
    root.setLevel(handler.usual_level)
    # The libraries below Modal's client log all headers, and so tokens, at the level debug.
    for name in ("asyncio", "grpclib", "h2", "hpack"):
        logging.getLogger(name).setLevel(logging.WARNING)


def resolved(form: Literal["auto", "text", "json"], output: Output) -> Literal["text", "json"]:
    """Returns the form of a log that is written to `output`: for auto, text on a terminal, and otherwise JSON lines."""
    if form != "auto":
        return form
    return "text" if output.is_terminal else "json"


def set_debug(on: bool) -> None:
    """Logs all events while debug is on, and those of the configured level otherwise. May be called on any thread."""
    root = logging.getLogger()
    level = next((handler.usual_level for handler in root.handlers if isinstance(handler, OutputHandler)), "INFO")
    root.setLevel(logging.DEBUG if on else level)
    # The only line of this logger. With a level of its own, the line is logged whatever the level of the log is.
    logging.getLogger(__name__).setLevel(logging.INFO)
    log.info("log level switched", to="debug" if on else level.lower())
