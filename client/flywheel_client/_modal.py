"""Asks Modal for the addresses of a deployment; `_records` describes what a deployment publishes."""

import asyncio
import importlib
import time
from collections.abc import AsyncIterable, Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final, TypeVar
from urllib.parse import urlsplit

import grpc
from flywheel_proto._extras import install_hint

from flywheel_client._calls_async import retrieve
from flywheel_client._errors import FailedPreconditionError, FlywheelError, UnauthenticatedError, UnavailableError
from flywheel_client._records import DEFAULT_APP, MAX_RECORDS, Endpoint, Reading, RecordTracker, dict_name, is_address

if TYPE_CHECKING:
    import modal

T = TypeVar("T")

SERVER_CLASS: Final = "GatewayServer"

MODAL_TIMEOUT: Final = 8.0
"""Seconds that Modal may take to answer."""


async def published_endpoints(app: str = DEFAULT_APP, environment: str | None = None) -> list[Endpoint]:
    """Returns the endpoints that an app on Modal has published; an empty list if there is none.

    The endpoint of a killed container stays in the list for some minutes, until a gateway of the app notices that its record
    has stopped changing. So connect to several endpoints at the same time, or skip endpoints that do not answer. The endpoint
    of a `GatewayServer`, whose address never changes, comes first. The others follow, most recently refreshed first, by the
    clocks of their containers.

    Args:
        app: The name of the deployed app.
        environment: The Modal environment of the app. Default: the environment of the Modal configuration.

    Raises:
        FlywheelError: Modal does not accept the token, or cannot be reached.
        ModuleNotFoundError: The package modal is not installed.
    """
    return await ModalDirectory(app, environment).endpoints()


def no_endpoint(app: str, environment: str | None) -> UnavailableError:
    """Returns the error for an app that has published no endpoint."""
    where = "the default environment" if environment is None else f"the environment {environment!r}"
    option = "" if environment is None else f" -e {environment}"
    advice = (
        "Deploy it with: modal deploy modal_deploy.py. Its containers take a while to start. If none does, this says why: "
        f"modal app logs {app}{option}"
    )
    return UnavailableError(grpc.StatusCode.UNAVAILABLE, f"the Modal app {app!r} in {where} has no live endpoint. {advice}")


def require_modal() -> None:
    """Raises `ModuleNotFoundError` if the package modal is not installed, without importing it."""
    if advice := install_hint("modal"):
        raise ModuleNotFoundError(advice, name="modal")


class ModalDirectory:
    """A directory of the endpoints of an app on Modal, for repeated reading, as by a client.

    The directory remembers what it has read. If a part of a reading fails, the directory keeps what that part listed before. It
    leaves out a record that has not changed for 90 s while others have. The arguments and errors are the same as for
    `published_endpoints`.
    """

    def __init__(self, app: str = DEFAULT_APP, environment: str | None = None) -> None:
        require_modal()
        self._app = app
        self._environment = environment
        self._tracker = RecordTracker()
        self._server: str | None = None

    async def read(self) -> list[str]:
        """Returns the addresses of the endpoints, in the order of `published_endpoints`."""
        return [endpoint.address for endpoint in await self.endpoints()]

    async def endpoints(self) -> list[Endpoint]:
        """Returns the endpoints that are published now; `FlywheelError` is raised only if none is known."""
        # In a thread, because importing modal takes a third of a second, during which the event loop must not block.
        await asyncio.to_thread(importlib.import_module, "modal")
        reading, server = await asyncio.gather(self._ask(self._records), self._ask(self._url))
        now = time.monotonic()
        if not isinstance(reading, FlywheelError):
            self._tracker.update(reading, self._app, now)
        if not isinstance(server, FlywheelError):
            self._server = server
        servers = [] if self._server is None else [Endpoint(self._server, "server", None, None, None)]
        found = servers + self._tracker.endpoints(now)
        for failure in (reading, server):
            if isinstance(failure, FlywheelError) and not found:
                raise failure
        return found

    def no_endpoint(self) -> UnavailableError:
        """Returns the error of a call if the last reading found no endpoint."""
        return no_endpoint(self._app, self._environment)

    async def _ask(self, read: Callable[[], Coroutine[Any, Any, T]]) -> T | FlywheelError:
        try:
            with _modal_errors(self._app):
                async with asyncio.timeout(MODAL_TIMEOUT):
                    return await _modal_result(read())
        except FlywheelError as error:
            return error

    async def _records(self) -> Reading:
        """Reads the Dict. An unreadable item would end `items`: then each value is read by itself."""
        import modal

        records = modal.Dict.from_name(dict_name(self._app), environment_name=self._environment)
        try:
            return Reading(await _collected(records.items.aio()))
        except modal.exception.NotFoundError:
            return Reading([])
        except modal.exception.DeserializationError:
            return await _one_by_one(records)

    async def _url(self) -> str | None:
        import modal

        try:
            url = await modal.Server.from_name(self._app, SERVER_CLASS, environment_name=self._environment).get_url.aio()
        except modal.exception.NotFoundError:
            return None
        try:
            parts = urlsplit(url or "")
            address = f"{parts.hostname or ''}:{parts.port or 443}"
        except ValueError:
            return None
        return address if is_address(address) else None


async def _one_by_one(records: "modal.Dict") -> Reading:
    import modal

    found: list[tuple[object, object]] = []
    try:
        async for key in records.keys.aio():
            value = None
            with suppress(modal.exception.DeserializationError):
                value = await records.get.aio(key)
            found.append((key, value))
            if len(found) == MAX_RECORDS:
                break
    except modal.exception.DeserializationError:
        # A key that cannot be read ends `keys`, but not `values`.
        with suppress(modal.exception.DeserializationError):
            async for value in records.values.aio():
                found.append((f"unknown {len(found)}", value))
                if len(found) >= MAX_RECORDS:
                    break
        return Reading(found, complete=False)
    return Reading(found)


async def _collected(items: AsyncIterable[T]) -> list[T]:
    found: list[T] = []
    async for item in items:
        found.append(item)
        if len(found) == MAX_RECORDS:
            break
    return found


async def _modal_result(work: Coroutine[Any, Any, T]) -> T:
    """Returns the result of the coroutine; raises CancelledError at once if the task is cancelled.

    The `.aio` methods of Modal may swallow a cancellation that arrives as they end. So the coroutine runs in a task of its own:
    if it swallows the cancellation, it runs to its end, but its caller does not wait for it.
    """
    running = asyncio.create_task(work)
    try:
        await asyncio.wait({running})
    finally:
        running.cancel()  # does nothing to work that has ended
        running.add_done_callback(retrieve)
    return running.result()


@contextmanager
def _modal_errors(app: str) -> Iterator[None]:
    """Raises exceptions of this package, which say what to do, for the exceptions of modal."""
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
        raise UnavailableError(grpc.StatusCode.UNAVAILABLE, f"{asked}: it did not answer within {MODAL_TIMEOUT:g} s") from error
    except (modal.exception.Error, StreamTerminatedError, OSError) as error:
        raise UnavailableError(grpc.StatusCode.UNAVAILABLE, f"{asked}: {error}") from error
