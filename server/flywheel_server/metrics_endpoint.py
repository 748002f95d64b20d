"""Puts the metrics of a server together, and serves them over HTTP. Without the setting `metrics_address`, imports nothing."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from flywheel_proto._extras import reason

from flywheel_server.listening import UnsafeError, is_loopback
from flywheel_server.settings import Settings

if TYPE_CHECKING:
    from flywheel_server.telemetry.metrics import Metrics


def create_metrics(settings: Settings) -> "Metrics | None":
    """Returns the metrics of this process; None if the settings have no address to serve them.

    Raises:
        UnsafeError: Anybody on a network could read them, and the settings do not allow that.
        ValueError: A package is missing.
    """
    address = settings.metrics_address
    if address is None:
        return None
    if not is_loopback(address) and not settings.allow_network_metrics:
        raise UnsafeError(
            f"anybody who reaches {address} could read the metrics and the names of callers. Listen on 127.0.0.1, or set "
            "--allow-network-metrics true"
        )
    try:
        import h11  # noqa: F401 - so that a server without it does not start

        from flywheel_server.telemetry.metrics import Metrics
    except ImportError as error:
        raise ValueError(f"metrics cannot be used: {reason(error)}") from error
    return Metrics()


@asynccontextmanager
async def serving_metrics(settings: Settings, metrics: "Metrics | None") -> AsyncIterator[None]:
    """Serves the metrics for the length of the context, if there are any. Raises `OSError` if it cannot listen."""
    if metrics is None or settings.metrics_address is None:
        yield
        return
    from flywheel_server.telemetry.exposition import text_of
    from flywheel_server.telemetry.http import serving_http

    async def render(openmetrics: bool) -> bytes:
        return await text_of(metrics.registry, openmetrics=openmetrics)

    async def page() -> str:
        return "<!doctype html><title>Flywheel gRPC</title><a href=/metrics>metrics</a>"

    async with serving_http(settings.metrics_address, render, page):
        yield
