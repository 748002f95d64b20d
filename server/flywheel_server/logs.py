"""Configures the log: one line for each event on standard error, from this server and its libraries alike."""

import json
import logging
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any, Final, Literal

import structlog
from pydantic_core import to_json
from structlog.typing import Processor

from flywheel_server.system.output import Output

log = structlog.stdlib.get_logger(__name__)


class OutputHandler(logging.Handler):
    """Writes each event, and each record of a library, as a line to an `Output`, which never blocks.

    They are rendered at once, because a waiting one would keep the objects in it alive.

    Arguments:
        shared: What is added to each event. This server's own events have it already.
        render: Makes the text of an event.
        output: Where the lines go.
        usual_level: The level of the log while debug is not switched on.

    Attributes:
        usual_level: As given.
    """

    def __init__(self, shared: Sequence[Processor], render: Sequence[Processor], output: Output, usual_level: str) -> None:
        super().__init__()
        self.usual_level = usual_level
        self.setFormatter(
            structlog.stdlib.ProcessorFormatter(
                foreign_pre_chain=shared, processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *render]
            )
        )
        self._render = render
        self._output = output
        output.notice = self._notice

    def emit(self, record: logging.LogRecord) -> None:
        """Writes the record of a library."""
        try:
            self._output.write(_line(self.format(record)))
        except Exception:  # noqa: BLE001 - as every handler of logging
            self.handleError(record)

    def write(self, event: dict[str, Any]) -> None:
        """Writes an event of this server."""
        name = event.get("event")
        text: Any = event
        try:
            for step in self._render:
                text = step(None, "", text)
            self._output.write(_line(text))
        except Exception:  # noqa: BLE001 - as every handler of logging
            self.handleError(logging.makeLogRecord({"msg": name}))

    def close(self) -> None:
        """Waits for a short time until all lines have been written. `logging` calls this at the end of the process."""
        self._output.close()
        super().close()

    @property
    def dropped(self) -> int:
        """How many pieces of output have been dropped so far."""
        return self._output.dropped

    def _notice(self, dropped: int) -> bytes:
        text = "%s log lines dropped"
        return _line(self.format(logging.LogRecord(__name__, logging.WARNING, __file__, 0, text, (dropped,), None)))


def _line(text: str) -> bytes:
    return f"{text}\n".encode(errors="backslashreplace")


class EventLogger:
    """Writes events to the log, without a record of `logging`, which costs more than the line.

    Its level is that of the logger of `logging` with the same name, as for libraries. The loggers of structlog write to one.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._levels = logging.getLogger(name)
        self.getEffectiveLevel = self._levels.getEffectiveLevel

    @property
    def disabled(self) -> bool:
        """Whether nothing is logged, as `logging` has it."""
        return self._levels.disabled

    def info(self, /, **event: object) -> None:
        """Writes an event that has all its fields, such as its level."""
        _write(event)

    debug = warning = error = critical = exception = info

    def write(self, level: Literal["info", "warning"], event: dict[str, Any]) -> None:
        """Writes an event, in a third of the time of a logger of structlog, and without what is bound to the context."""
        if self._levels.isEnabledFor(_LEVELS[level]):
            timestamp = datetime.now(UTC).isoformat().replace("+00:00", "Z")
            _write({**event, "logger": self.name, "level": level, "timestamp": timestamp})


_LEVELS: Final = {"info": logging.INFO, "warning": logging.WARNING}


def _handlers() -> list[OutputHandler]:
    """Returns the handler that `configure` has installed; none before that."""
    return [handler for handler in logging.getLogger().handlers if isinstance(handler, OutputHandler)]


def _write(event: dict[str, Any]) -> None:
    for handler in _handlers():
        handler.write(event)


def lines_dropped() -> int:
    """Returns how many lines of the log have been dropped so far; 0 if `configure` was not called."""
    return sum(handler.dropped for handler in _handlers())


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
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    render: list[Processor] = [] if worker is None else [lambda _, __, event: {**event, "worker": worker}]
    if resolved(form, output) == "json":
        # Tracebacks leave out local variables, because these hold prompts.
        tracebacks = structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
        render += [structlog.processors.ExceptionRenderer(tracebacks), structlog.processors.JSONRenderer(_json)]
    else:
        plain = structlog.dev.plain_traceback
        console = structlog.dev.ConsoleRenderer(colors=False, pad_event_to=0, pad_level=False, exception_formatter=plain)
        render += [console, _indented]
    structlog.configure(
        processors=[structlog.stdlib.filter_by_level, *shared],
        logger_factory=EventLogger,
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    handler = OutputHandler(shared, render, output, level.upper())
    root = logging.getLogger()
    for earlier in _handlers():
        earlier.close()
    root.handlers = [handler]
    root.setLevel(handler.usual_level)
    # The libraries below Modal's client log all headers, and so tokens, at the level debug.
    for name in ("asyncio", "grpclib", "h2", "hpack"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # OpenTelemetry warns of each invalid header, and quotes it, so that callers without a key could fill the log.
    for name in ("opentelemetry.trace", "opentelemetry.baggage"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _indented(_: object, __: str, text: Any) -> str:  # noqa: ANN401 - the text of the renderer before
    # So that no line of a traceback or of a caller's text looks like an event. JSON has no line ends.
    return "\n    ".join(text.splitlines())


def _json(event: dict[str, Any], default: Callable[[Any], Any]) -> str:
    """Returns an event as JSON in ASCII.

    pydantic's encoder takes a fifth of the time of Python's, but knows no ASCII, and no text that is not valid Unicode.
    """
    try:
        return to_json(event, fallback=default).decode("ascii")
    except ValueError:
        return json.dumps(event, default=default, separators=(",", ":"))


def resolved(form: Literal["auto", "text", "json"], output: Output) -> Literal["text", "json"]:
    """Returns the form of a log that is written to `output`: for auto, text on a terminal, and otherwise JSON lines."""
    if form != "auto":
        return form
    return "text" if output.is_terminal else "json"


def set_debug(on: bool) -> None:
    """Logs all events while debug is on, and those of the configured level otherwise. May be called on any thread."""
    root = logging.getLogger()
    level = next((handler.usual_level for handler in _handlers()), "INFO")
    root.setLevel(logging.DEBUG if on else level)
    # The only line of this logger. With a level of its own, the line is logged whatever the level of the log is.
    logging.getLogger(__name__).setLevel(logging.INFO)
    log.info("log level switched", to="debug" if on else level.lower())
