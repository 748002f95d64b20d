"""Reads the HTTP endpoint of a server: as bytes, and as figures."""

import asyncio
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

from prometheus_client.parser import text_string_to_metric_families


class Answer(NamedTuple):
    """An answer over HTTP: its status, its headers in lower case, and its content."""

    status: int
    headers: dict[str, str]
    content: bytes


async def exchange(port: int, sent: bytes) -> Answer:
    """Sends these bytes, and reads the answer until the server closes or resets the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(sent)
    received = b""
    with suppress(ConnectionError):
        received = await reader.read()
    writer.close()
    with suppress(ConnectionError):
        await writer.wait_closed()
    return parsed(received)


def parsed(answer: bytes) -> Answer:
    """Returns an answer as it was received; status 0 if nothing was."""
    head, _, content = answer.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    return Answer(int(first.split()[1]) if first else 0, headers, content)


async def get(port: int, path: str = "/metrics", method: str = "GET", **headers: str) -> Answer:
    """Sends a request without a body."""
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", *(f"{name}: {value}" for name, value in headers.items())]
    return await exchange(port, ("\r\n".join(lines) + "\r\n\r\n").encode())


class Figures:
    """The figures in the text format of Prometheus."""

    def __init__(self, text: str) -> None:
        self.samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]

    def by(self, name: str, label: str, **labels: str) -> dict[str, float]:
        """Returns for each value of a label the sum of the samples with this name and these labels."""
        sums: dict[str, float] = {}
        for value, has in self._of(name, labels):
            sums[has[label]] = sums.get(has[label], 0) + value
        return sums

    def total(self, name: str, **labels: str) -> float:
        """Returns the sum of the samples with this name and these labels."""
        return sum(value for value, _ in self._of(name, labels))

    def mean(self, name: str, **labels: str) -> float:
        """Returns the mean of the values in histograms with this name and these labels."""
        return self.total(f"{name}_sum", **labels) / self.total(f"{name}_count", **labels)

    def _of(self, name: str, labels: dict[str, str]) -> Iterator[tuple[float, dict[str, str]]]:
        for sample in self.samples:
            if sample.name == name and labels.items() <= sample.labels.items():
                yield sample.value, sample.labels


async def figures(port: int) -> Figures:
    """Returns the figures of the server, as they are now."""
    answer = await get(port)
    assert answer.status == 200, answer
    return Figures(answer.content.decode())
