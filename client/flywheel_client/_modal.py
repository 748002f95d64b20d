"""Where a deployment on Modal publishes its addresses, and how they are read.

A container of `Gateway` has a tunnel, whose address it puts into the `modal.Dict` named `DICT`, under its own id, as
`{"app": …, "address": "host:port", "started": …, "refreshed": …}` with times in seconds since the epoch. It refreshes that
every 20 s and takes it back when it ends, so that what has long not been refreshed belongs to a container that could not.
A `GatewayServer` has an address that stays. Both speak TLS, with certificates that everybody trusts.
"""

import asyncio
import importlib
import importlib.util
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, Literal
from urllib.parse import urlsplit

import grpc

from flywheel_client._errors import FailedPreconditionError, UnauthenticatedError, UnavailableError

APP: Final = "flywheel-grpc"
DICT: Final = "flywheel-grpc-endpoints"
SERVER: Final = "GatewayServer"

STALE_AFTER: Final = 90.0
"""Seconds without a refresh after which an address is taken as dead."""

TIMEOUT: Final = 8.0
"""Seconds that Modal may take to answer."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An address of a deployment on Modal, which speaks TLS. Times are seconds since the epoch, on the container's clock.

    A `server` is the one address of all containers of a `GatewayServer`, so it has no container and no times.
    """

    address: str
    kind: Literal["tunnel", "server"]
    container: str | None
    started: float | None
    refreshed: float | None


@dataclass(frozen=True, slots=True)
class Published:
    """What an app has published: the live endpoints, and how many stale ones were left out."""

    live: list[Endpoint]
    stale: int


async def published_endpoints(app: str = APP, environment: str | None = None) -> list[Endpoint]:
    """Returns the live endpoints of an app on Modal; none is an empty list.

    Those that were refreshed last are first, and before all of them a `GatewayServer`, whose address stays the same.

    Args:
        app: The name of the deployed app.
        environment: The Modal environment it is deployed in. Default: that of the Modal configuration.

    Raises:
        FlywheelError: Modal cannot be asked: it knows no such token, or cannot be reached.
        ModuleNotFoundError: The package modal is not installed.
    """
    return (await read_published(app, environment)).live


async def read_published(app: str, environment: str | None) -> Published:
    """Returns what `published_endpoints` does, with the number of stale ones."""
    require_modal()
    # In a thread, because importing modal takes a third of a second, for which an event loop must not stand still.
    await asyncio.to_thread(importlib.import_module, "modal")
    with _modal_errors(app):
        async with asyncio.timeout(TIMEOUT):
            # Both answers are waited for, also where one is an error, so that nothing is left running.
            items, server = await asyncio.gather(_items(environment), _server(app, environment), return_exceptions=True)
        if isinstance(items, BaseException):
            raise items
        if isinstance(server, BaseException):
            raise server
    return published(items, server, app, time.time())


def published(items: Iterable[tuple[object, object]], server: str | None, app: str, now: float) -> Published:
    """Sorts what was read at the time `now`: records of other apps, and what is no record at all, are left out."""
    tunnels: list[tuple[float, Endpoint]] = []
    for container, record in items:
        match record:
            case {
                "address": str(address),
                "started": int() | float() as started,
                "refreshed": int() | float() as refreshed,
                "app": str(named),
            } if named == app:
                tunnels.append((refreshed, Endpoint(address, "tunnel", str(container), started, refreshed)))
    tunnels.sort(key=lambda tunnel: tunnel[0], reverse=True)
    live = [tunnel for refreshed, tunnel in tunnels if now - refreshed <= STALE_AFTER]
    servers = [] if server is None else [Endpoint(server, "server", None, None, None)]
    return Published(servers + live, stale=len(tunnels) - len(live))


def no_endpoint(app: str, environment: str | None, stale: int = 0) -> UnavailableError:
    """Returns what to tell where an app has no live endpoint."""
    where = "the default environment" if environment is None else f"the environment {environment!r}"
    found = f"the Modal app {app!r} in {where} has no live endpoint"
    if stale:
        found += f" ({stale} not refreshed for {STALE_AFTER:g} s: ended, unless the clock of this machine is wrong)"
    advice = "Deploy it with: modal deploy modal_deploy.py. Its containers take a while to start."
    return UnavailableError(grpc.StatusCode.UNAVAILABLE, f"{found}. {advice}")


def require_modal() -> None:
    """Raises `ModuleNotFoundError` where the package modal is not installed, without importing it."""
    if importlib.util.find_spec("modal") is None:
        raise ModuleNotFoundError("this needs modal; install it with: pip install 'flywheel-grpc[modal]'", name="modal")


class ModalDirectory:
    """The endpoints of an app on Modal, as the `Directory` of a client."""

    def __init__(self, app: str, environment: str | None) -> None:
        require_modal()
        self._app = app
        self._environment = environment
        self._stale = 0

    async def read(self) -> list[str]:
        """Returns the addresses of the live endpoints; raises what `published_endpoints` does."""
        found = await read_published(self._app, self._environment)
        self._stale = found.stale
        return [endpoint.address for endpoint in found.live]

    def no_endpoint(self) -> UnavailableError:
        """Returns what to tell a caller where the last reading found none."""
        return no_endpoint(self._app, self._environment, self._stale)


async def _items(environment: str | None) -> list[tuple[object, object]]:
    import modal

    records = modal.Dict.from_name(DICT, environment_name=environment)
    try:
        return [item async for item in records.items.aio()]
    except modal.exception.NotFoundError:
        return []


async def _server(app: str, environment: str | None) -> str | None:
    import modal

    try:
        url = await modal.Server.from_name(app, SERVER, environment_name=environment).get_url.aio()
    except modal.exception.NotFoundError:
        return None
    if not url:
        return None
    parts = urlsplit(url)
    return f"{parts.hostname}:{parts.port or 443}"


@contextmanager
def _modal_errors(app: str) -> Iterator[None]:
    """Turns the exceptions of modal into those of this package, which say what to do."""
    import modal
    from grpclib.exceptions import StreamTerminatedError

    asked = f"Modal cannot be asked for the endpoints of the app {app!r}"
    try:
        yield
    except modal.exception.AuthError as error:
        raise UnauthenticatedError(
            grpc.StatusCode.UNAUTHENTICATED,
            f"{asked} without a valid token. Run: modal token new; or set MODAL_TOKEN_ID and MODAL_TOKEN_SECRET. ({error})",
        ) from error
    except (modal.exception.PermissionDeniedError, modal.exception.InvalidError, modal.exception.VersionError) as error:
        raise FailedPreconditionError(grpc.StatusCode.FAILED_PRECONDITION, f"{asked}: {error}") from error
    except TimeoutError as error:
        raise UnavailableError(grpc.StatusCode.UNAVAILABLE, f"{asked}: it did not answer within {TIMEOUT:g} s") from error
    except (modal.exception.Error, StreamTerminatedError, OSError) as error:
        raise UnavailableError(grpc.StatusCode.UNAVAILABLE, f"{asked}: {error}") from error
