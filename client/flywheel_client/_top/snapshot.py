"""Shows servers once, as text or JSON: for pipes, scripts and terminals that cannot draw."""

import asyncio
import time
from collections.abc import Iterator
from dataclasses import asdict

from flywheel_client._terminal import show, show_json
from flywheel_client._top.overview import overview, title
from flywheel_client._top.panels import PANELS, SORT_FIRST, table_lines
from flywheel_client._top.servers import History, Server, Servers


async def poll_twice(servers: Servers, interval: float) -> None:
    """Scrapes all servers twice, so that there are rates. Waits for so many seconds only if a server answered."""
    await servers.poll()
    if any(server.figures for server in servers.all):
        await asyncio.sleep(interval)
        await servers.poll()


def show_once(servers: Servers, interval: float, width: int, *, as_json: bool) -> bool:
    """Prints what happens on servers during an interval in seconds. Returns whether all of them answered."""
    asyncio.run(poll_twice(servers, interval))
    if as_json:
        show_json({"servers": [_json(server) for server in servers.all]})
    else:
        for line in _lines(servers, width):
            show(line)
    return all(server.figures for server in servers.all)


def _lines(servers: Servers, width: int) -> Iterator[str]:
    for index, server in enumerate(servers.all):
        if index:
            yield ""
        yield title(server, server.figures, width, time.time()).plain
        if server.figures is None:
            continue
        yield from (line.plain for line in overview(server.figures, History(), width))
        for panel in PANELS.values():
            table = panel(server.figures, servers.events.of(server.address))
            if table.rows:
                yield ""
                yield from (line.plain for line in table_lines(table, width, SORT_FIRST))


def _json(server: Server) -> dict[str, object]:
    """Returns the fields of a server and its figures, which are null if the server did not answer."""
    return {
        "address": server.address,
        "state": server.state,
        "problem": server.problem,
        "interval_seconds": server.interval.seconds if server.interval else None,
        "figures": asdict(server.figures) if server.figures else None,
    }
