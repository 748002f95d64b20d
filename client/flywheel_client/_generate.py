"""Runs `flywheel generate`."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from flywheel_proto.v1 import generation_pb2

from flywheel_client import _terminal as terminal
from flywheel_client._client_sync import Client
from flywheel_client._connecting import client_of
from flywheel_client._options import option_for
from flywheel_client._prompt import prompt_fields, read_prompt
from flywheel_client._retry import Retry
from flywheel_client._token_table import sample_json
from flywheel_client._waiting import ReadyServer

if TYPE_CHECKING:
    from flywheel_client._options import RequestOptions, Server

ResultWrapper = Callable[[Iterable[Any]], Iterator[Any]]
Show = Callable[[ResultWrapper, Client, dict[str, Any]], None]

LAST_FIELD_OF_1_0: Final = 11
"""The highest number of a field of GenerationRequest in contract 1.0, whose servers ignore newer fields."""


class Generator:
    """Makes generations with one server, for `generate`. Waits while the server answers that its engine is not ready."""

    def __init__(self, server: "Server", client: Client, observer: Client, timeout: float | None) -> None:
        self.server = server
        self._client = client
        self._observer = observer
        self._timeout = timeout
        self._supports_newer_fields = False

    def run(self, show: Show, fields: dict[str, Any]) -> None:
        """Makes one generation and shows it; raises `ValueError` if the server would ignore a field."""
        ready = ReadyServer(self._observer, self.server.name, self._timeout, wait_for_ready=self.server.wait_for_ready)
        if not self._supports_newer_fields and (newer := newer_fields(fields)):
            ready.call(lambda seconds: self._require_newer_server(newer, ready.noting_silence, seconds))
        ready.call(lambda seconds: show(ready.noting_silence, self._client, fields | {"timeout": seconds}))

    def _require_newer_server(self, newer: list[str], watched: ResultWrapper, seconds: float | None) -> None:
        """Raises `ValueError` if the server is so old that it would ignore these fields. All other servers refuse fields."""
        (model,) = watched(self._client.model(timeout=seconds) for _ in range(1))
        if not model.supported_fields:
            options = ", ".join(map(option_for, newer))
            raise ValueError(f"{self.server.name} is too old to know {options}, and would ignore it")
        self._supports_newer_fields = True


@contextmanager
def generator(server: "Server", timeout: float | None) -> Iterator[Generator]:
    """Makes a `Generator`, and closes its clients."""
    # A user watches the terminal, and can decide about longer delays.
    with client_of(server, timeout, Retry(max_delay=5.0)) as client, client_of(server, timeout) as observer:
        yield Generator(server, client, observer, timeout)


def newer_fields(fields: Mapping[str, Any]) -> list[str]:
    """Returns the names of fields with a value that a server of contract 1.0 would ignore."""
    known = generation_pb2.GenerationRequest.DESCRIPTOR.fields_by_name
    return [name for name, value in fields.items() if value is not None and known[name].number > LAST_FIELD_OF_1_0]


def generate(
    server: "Server",
    prompt: str | None,
    system: str | None,
    options: "RequestOptions",
    *,
    timeout: float | None,
    as_json: bool,
) -> None:
    """Prints the samples of a prompt."""
    fields = prompt_fields(read_prompt(prompt, "generate"), system) | options.fields()
    with generator(server, timeout) as generating:
        generating.run(print_samples if as_json else print_text, fields)


def print_samples(watched: ResultWrapper, client: Client, fields: dict[str, Any]) -> None:
    """Prints each finished sample as a line of JSON."""
    with client.generate(**fields) as samples:
        for sample in watched(samples):
            terminal.show_json(sample_json(sample))


def print_text(watched: ResultWrapper, client: Client, fields: dict[str, Any], output: terminal.Output | None = None) -> None:
    """Prints the text as it is generated, and a summary to stderr."""
    writer = terminal.SampleWriter(output or terminal.Output(sys.stdout), fields.get("num_samples") or 1)
    begun = time.monotonic()
    with client.generate_deltas(**fields) as deltas:
        try:
            for delta in watched(deltas):
                writer.add(delta, time.monotonic() - begun)
        finally:
            deltas.close()
            writer.finish()
    terminal.show_aside(writer.summary())
