"""Fetches the metrics of a server over HTTP, bounded in size and time whatever the server does."""

import asyncio
import os
import re
from http import HTTPStatus
from typing import Final

import h11

from flywheel_client._targets import MAX_PORT

SCRAPE_TIMEOUT: Final = 5.0
"""Seconds that a scrape may take, from connecting to the last byte."""

MAX_ANSWER_BYTES: Final = 4 * 2**20
MAX_PARTS: Final = 10_000
"""The most chunks and interim answers of an answer, because each of them takes time."""

_READ_BYTES: Final = 2**16
_ADDRESS: Final = re.compile(r"(?:\[(?P<ip>[0-9A-Fa-f:.]+)\]|(?P<name>[A-Za-z0-9._-]+)):(?P<port>[0-9]{1,5})")


class ScrapeError(Exception):
    """A server gave no metrics. The message is for users; it may quote the server."""


def host_and_port(address: str) -> tuple[str, int]:
    """Returns the host and the port of HOST:PORT; the brackets of an IPv6 address are removed.

    Raises:
        ValueError: The address has another form.
    """
    match = _ADDRESS.fullmatch(address)
    if match is None or not 0 < (port := int(match["port"])) <= MAX_PORT:
        raise ValueError(f"{address!r} is not the HOST:PORT of a server's metrics, such as localhost:9464")
    return match["ip"] or match["name"], port


async def scrape(address: str) -> bytes:
    """Returns the metrics of the server at HOST:PORT, in Prometheus' text format.

    Raises:
        ScrapeError: The server cannot be reached, or what answers there has no metrics.
    """
    try:
        async with asyncio.timeout(SCRAPE_TIMEOUT):
            return await _get(address)
    except TimeoutError:
        raise ScrapeError(f"not within {SCRAPE_TIMEOUT:g} s") from None
    except OSError as error:
        raise ScrapeError(_reason(error)) from None
    except h11.ProtocolError:
        raise ScrapeError("what listens there does not speak HTTP/1.1") from None


def _reason(error: OSError) -> str:
    """Returns the system's words for an error: asyncio has others if a connection fails. Errors of the DNS have their own."""
    if error.errno is not None and error.errno > 0:
        return os.strerror(error.errno)
    return error.strerror or str(error)


async def _get(address: str) -> bytes:
    host, port = host_and_port(address)
    reader, writer = await asyncio.open_connection(host, port)
    try:
        connection = h11.Connection(h11.CLIENT)
        headers = [("Host", address), ("Accept", "text/plain;version=0.0.4"), ("Connection", "close")]
        request = connection.send(h11.Request(method="GET", target="/metrics", headers=headers))
        writer.write((request or b"") + (connection.send(h11.EndOfMessage()) or b""))
        return await _body(connection, reader)
    finally:
        writer.close()


async def _body(connection: h11.Connection, reader: asyncio.StreamReader) -> bytes:
    """Returns the body of the answer. Bounds all that arrives: headers and chunks, too."""
    body, received = bytearray(), 0
    for _ in range(MAX_PARTS):
        match connection.next_event():
            case h11.NEED_DATA:
                data = await reader.read(_READ_BYTES)
                received += len(data)
                if not received:
                    raise ScrapeError("it hung up without an answer")
                if received > MAX_ANSWER_BYTES:
                    raise ScrapeError(f"its answer is larger than {MAX_ANSWER_BYTES // 2**20} MiB")
                connection.receive_data(data)
            case h11.Response(status_code=status) if status != HTTPStatus.OK:
                raise ScrapeError(f"it answers with HTTP status {status}, not with metrics")
            case h11.Data(data=data):
                body += data
            case h11.EndOfMessage():
                return bytes(body)
    raise ScrapeError("its answer has too many parts")
