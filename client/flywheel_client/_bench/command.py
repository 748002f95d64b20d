"""Runs `flywheel bench`."""

import asyncio
import selectors
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, cast

import grpc
from click.exceptions import Exit
from flywheel_proto._interrupts import EXIT_INTERRUPTED

from flywheel_client import _terminal as terminal
from flywheel_client._bench.calls import Caller, Method, open_channels
from flywheel_client._bench.comparison import comparison_lines
from flywheel_client._bench.driver import Driver, Outcome, Plan, warm_up
from flywheel_client._bench.measurements import Measurements
from flywheel_client._bench.options import DEFAULT_CONCURRENCY, DEFAULT_DURATION, MAX_REQUESTS
from flywheel_client._bench.progress import ProgressLine
from flywheel_client._bench.report import Report, Setup, load_in_words, read_report, report_of
from flywheel_client._bench.report_files import STDOUT, ReportFiles
from flywheel_client._bench.terminal_report import EIGHTHS, report_lines
from flywheel_client._bench.workload import requests_of
from flywheel_client._channel import Connection
from flywheel_client._connecting import client_of, connection_of
from flywheel_client._errors import FlywheelError
from flywheel_client._generate import newer_fields
from flywheel_client._waiting import ReadyServer

if TYPE_CHECKING:
    from flywheel_client._bench.options import BenchOptions
    from flywheel_client._bench.schedule import Arrivals
    from flywheel_client._options import RequestOptions, Server
    from flywheel_client._results import Model

EXIT_FAILURE: Final = 1

# Without this, channels with the same options share a connection.
OWN_CONNECTION: Final = (("grpc.use_local_subchannel_pool", 1),)


def bench(server: "Server", options: "BenchOptions", request_options: "RequestOptions") -> None:
    """Makes the run and shows its report; or compares two reports."""
    if options.compare is not None:
        for line in comparison_lines(*map(read_report, options.compare)):
            terminal.show(line)
        return
    fields = request_options.fields()
    requests = requests_of(options.prompts, fields)
    plan = plan_of(options)
    used = {field.name: True for request in requests for field, _ in request.ListFields()}
    files = ReportFiles(options)
    files.check()
    with _telling_of_interrupts("before the run"):
        model, engine = _model(server, used, options.timeout)
    setup = Setup(
        server=server.address if server.modal_app is None else server.modal_app,
        model=model,
        engine=engine,
        method=options.method,
        load=load_in_words(plan),
        prompts="built-in" if options.prompts is None else options.prompts.name,
        connections=options.connections,
        timeout=options.timeout,
        fields=fields,
    )
    begun = time.time()
    # The default selector rounds timers up to milliseconds. The loop itself has few descriptors, because grpc polls its own.
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selectors.SelectSelector())) as runner:
        connection = connection_of(server, options.timeout, OWN_CONNECTION)
        outcome, notes = runner.run(_run(connection, options, plan, requests))
    report = report_of(outcome, setup, plan, begun, notes)
    # First the files, because the reader of standard output may have left.
    failures = files.write(report)
    _show(report, as_json=options.json_file == STDOUT)
    for failure in failures:
        terminal.show_error(failure)
    if failures:
        raise Exit(EXIT_FAILURE)
    if report.interrupted:
        raise Exit(EXIT_INTERRUPTED)
    if not report.calls_succeeded:
        raise Exit(EXIT_FAILURE)


def plan_of(options: "BenchOptions") -> Plan:
    """Returns the load and its limits; raises `ValueError` if the options contradict each other."""
    if options.concurrency is not None and options.rate is not None:
        raise ValueError("give --concurrency or --rate, not both")
    by_default = DEFAULT_DURATION if options.requests is None else None
    return Plan(
        concurrency=None if options.rate is not None else options.concurrency or DEFAULT_CONCURRENCY,
        rate=options.rate,
        arrivals=cast("Arrivals", options.arrivals),
        requests=options.requests or MAX_REQUESTS,
        duration=by_default if options.duration is None else options.duration,
        max_in_flight=options.max_in_flight,
        max_errors=options.max_errors or None,
        drain_timeout=options.drain_timeout,
    )


def _model(server: "Server", used: Mapping[str, Any], timeout: float) -> tuple[str, str]:
    """Returns the names of the model and the engine, which are empty if the server has no GetModel.

    Waits while the engine of the server is not ready, as `flywheel generate` does.

    Raises:
        FlywheelError: The server cannot be reached, or refuses the caller.
        ValueError: The server is so old that it would ignore a field of the requests.
    """
    models: list[Model] = []
    with client_of(server, timeout) as client:
        ready = ReadyServer(client, server.name, timeout, wait_for_ready=server.wait_for_ready)
        try:
            ready.call(lambda seconds: models.append(client.model(timeout=seconds)))
        except FlywheelError as error:
            if error.code is grpc.StatusCode.UNIMPLEMENTED:
                return "", ""
            raise
    (model,) = models
    if not model.supported_fields and (newer := newer_fields(used)):
        raise ValueError(f"{server.name} is too old to know {', '.join(newer)}, and would ignore it")
    return model.name, model.engine


async def _run(connection: Connection, options: "BenchOptions", plan: Plan, requests: list[Any]) -> tuple[Outcome, list[str]]:
    """Makes the run. Returns its outcome, and what to note about the calls before it."""
    async with open_channels(connection, options.connections) as channels:
        caller = Caller(connection, channels, cast("Method", options.method), requests, options.timeout)
        with _telling_of_interrupts("during the warm-up"):
            notes = _warm_up_notes(await warm_up(caller, options.warm_up * options.connections))
        progress = ProgressLine(plan)
        try:
            return await Driver(caller, plan, progress.show).run(), notes
        finally:
            progress.clear()


def _warm_up_notes(measurements: Measurements) -> list[str]:
    kinds = ", ".join(f"{code} {reason}".rstrip() for code, reason in measurements.errors)
    return [f"{measurements.failed} of {measurements.sent} warm-up calls failed: {kinds}."] if kinds else []


@contextmanager
def _telling_of_interrupts(when: str) -> Iterator[None]:
    """Tells the user that an interrupt has left nothing to report. An event loop turns an interrupt into a cancellation."""
    try:
        yield
    except (KeyboardInterrupt, asyncio.CancelledError):
        terminal.show_error(f"interrupted {when}; nothing was measured")
        raise


def _show(report: Report, *, as_json: bool) -> None:
    """Shows the report on standard output."""
    if as_json:
        terminal.show_json(report.as_json())
    else:
        for line in report_lines(report, blocks=_can_show(EIGHTHS)):
            terminal.show(line)


def _can_show(text: str) -> bool:
    try:
        text.encode(sys.stdout.encoding)
    except UnicodeEncodeError:
        return False
    return True
