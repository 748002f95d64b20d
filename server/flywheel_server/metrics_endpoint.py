"""Puts the metrics of a server together, and serves them over HTTP. Without the setting `metrics_address`, imports nothing."""

import platform
import re
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import grpc
from flywheel_proto import __version__

from flywheel_server.engines.base import EngineModel
from flywheel_server.listening import UnsafeError, is_loopback
from flywheel_server.settings import Settings

if TYPE_CHECKING:
    from flywheel_server.telemetry.metrics import Metrics


def create_metrics(settings: Settings) -> "Metrics | None":
    """Returns the metrics of this process; None if the settings have no address to serve them.

    Raises:
        UnsafeError: Anybody on a network could read them, and the settings do not allow that.
    """
    address = settings.metrics_address
    if address is None:
        return None
    if not is_loopback(address) and not settings.allow_network_metrics:
        raise UnsafeError(
            f"anybody who reaches {address} could read the metrics and the names of callers. Listen on 127.0.0.1, or set "
            "--allow-network-metrics true"
        )
    from flywheel_server.telemetry.metrics import Metrics

    return Metrics()


@asynccontextmanager
async def serving_metrics(
    settings: Settings, metrics: "Metrics | None", model: Callable[[], EngineModel]
) -> AsyncIterator[None]:
    """Serves the metrics, and a page about the server, for the length of the context; does nothing without metrics.

    Arguments:
        settings: The settings.
        metrics: The metrics, of `create_metrics`.
        model: Returns the engine's model. May raise an error while the engine is not running.

    Raises:
        OSError: The server cannot listen on the address.
    """
    if metrics is None or settings.metrics_address is None:
        yield
        return
    from flywheel_server.telemetry.exposition import text_of
    from flywheel_server.telemetry.http import serving_http
    from flywheel_server.telemetry.status_page import status_page

    started_at, started = time.monotonic(), datetime.now(UTC)
    registry, shown = metrics.registry, shown_settings(settings)

    async def page() -> str:
        build = [*_build(model), ("Started", f"{started:%Y-%m-%d %H:%M:%S} UTC, {time.monotonic() - started_at:.0f} s ago")]
        return await status_page(build, shown, registry)

    async def render(openmetrics: bool) -> bytes:
        return await text_of(registry, openmetrics=openmetrics)

    async with serving_http(settings.metrics_address, render, page, is_local=is_loopback(settings.metrics_address)):
        yield


def _build(model: Callable[[], EngineModel]) -> list[tuple[str, str]]:
    try:
        known = model()
        engine = [("Engine", known.engine), ("Model", known.name)]
    except Exception:  # noqa: BLE001 - an engine that is not running may raise anything
        engine = [("Engine", "not running")]
    return [
        ("Version", __version__),
        *engine,
        ("Python", platform.python_version()),
        ("grpcio", grpc.__version__),
    ]


def shown_settings(settings: Settings) -> dict[str, list[tuple[str, str]]]:
    """Returns the names and values of all settings, by group. A secret is only shown as set or not set."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for name, field in Settings.model_fields.items():
        extra = field.json_schema_extra
        assert isinstance(extra, dict)  # noqa: S101 - every option has it
        value = getattr(settings, name)
        # What is a secret may not be on the command line either.
        text = _shown(value) if extra["has_flag"] else ("set" if value else "not set")
        groups.setdefault(str(extra["group"]), []).append((name, text))
    return groups


def _shown(value: object) -> str:
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return str(value).lower()
    # A URL may have a password.
    return re.sub(r"(?<=//)[^/@]*@", "…@", str(value))
