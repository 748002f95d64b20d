"""Puts the metrics of a server together, and serves them over HTTP. Without the setting `metrics_address`, imports nothing."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Protocol

from flywheel_proto._extras import reason

from flywheel_server.listening import UnsafeError, is_loopback
from flywheel_server.settings import Settings

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from flywheel_server.telemetry.metrics import Metrics


class Source(Protocol):
    """Where the metrics come from: this process, or several."""

    async def refresh(self) -> None:
        """Finds out what takes time, before `registry`."""

    async def registry(self) -> "CollectorRegistry":
        """Returns a registry with the metrics of now."""


def create_metrics(settings: Settings) -> "Metrics | None":
    """Returns the metrics of the calls of this process; None if the settings have no address to serve them.

    Raises the errors of `check_metrics`.
    """
    if settings.metrics_address is None:
        return None
    check_metrics(settings)
    from flywheel_server.telemetry.metrics import Metrics

    return Metrics()


def check_metrics(settings: Settings) -> None:
    """Checks that metrics can be served if there is an address for them.

    Raises:
        UnsafeError: Anybody on a network could read them, and the settings do not allow that.
        ValueError: A package is missing.
    """
    address = settings.metrics_address
    if address is None:
        return
    if not is_loopback(address) and not settings.allow_network_metrics:
        raise UnsafeError(
            f"anybody who reaches {address} could read the metrics and the names of callers. Listen on 127.0.0.1, or set "
            "--allow-network-metrics true"
        )
    try:
        # So that a server without one of them does not start.
        import h11  # noqa: F401
        import prometheus_client  # noqa: F401
    except ImportError as error:
        raise ValueError(f"metrics cannot be used: {reason(error)}") from error


@asynccontextmanager
async def serving_metrics(address: str, source: Source) -> AsyncIterator[None]:
    """Serves the metrics for the length of the context. Raises `OSError` if it cannot listen."""
    from flywheel_server.telemetry.exposition import text_of
    from flywheel_server.telemetry.http import serving_http

    async def render(openmetrics: bool) -> bytes:
        return await text_of(await source.registry(), openmetrics=openmetrics)

    async def page() -> str:
        return "<!doctype html><title>Flywheel gRPC</title><a href=/metrics>metrics</a>"

    async with serving_http(address, source.refresh, render, page):
        yield
