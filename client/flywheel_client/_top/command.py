"""Runs `flywheel top`."""

import os
import shutil
import sys
from collections.abc import Sequence

from click.exceptions import Exit
from flywheel_proto._extras import loading

from flywheel_client._commands import EXIT_FAILURE
from flywheel_client._top.scraping import host_and_port
from flywheel_client._top.servers import Servers
from flywheel_client._top.snapshot import show_once


def top(addresses: Sequence[str], *, interval: float, once: bool, as_json: bool) -> None:
    """Shows servers until the user quits; once if asked to, or if there is no terminal to draw on.

    Raises:
        ValueError: An address is not HOST:PORT.
    """
    for address in addresses:
        host_and_port(address)
    servers = Servers(addresses)
    if once or as_json or not _can_draw():
        if not show_once(servers, interval, shutil.get_terminal_size().columns, as_json=as_json):
            raise Exit(EXIT_FAILURE)
        return
    with loading("flywheel", "cli"):
        from flywheel_client._top.app import Top
    if not os.environ.get("NO_COLOR"):
        os.environ.pop("NO_COLOR", None)  # Textual takes an empty one for a set one; https://no-color.org does not.
    app = Top(servers, interval)
    app.run()
    if app.return_code:
        raise Exit(app.return_code)


def _can_draw() -> bool:
    """Returns whether all standard streams are a terminal that can move its cursor."""
    return os.environ.get("TERM") != "dumb" and all(stream.isatty() for stream in (sys.stdin, sys.stdout, sys.stderr))
