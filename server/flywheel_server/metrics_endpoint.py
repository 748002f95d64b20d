"""Puts the metrics of a server together, and serves them over HTTP. Without the setting `metrics_address`, imports nothing."""

import platform
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Protocol

import grpc
from flywheel_proto import __version__

from flywheel_server.engines.base import EngineModel
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

    def model(self) -> EngineModel | None:
        """Returns the engine's model; None if it is not known here."""


def create_metrics(settings: Settings) -> "Metrics | None":
    """Returns the metrics of the calls of this process; None if the settings name nobody who gets them.

    Raises the errors of `check_metrics`.
    """
    if settings.metrics_address is None and settings.otlp_endpoint is None:
        return None
    check_metrics(settings)
    from flywheel_server.telemetry.metrics import Metrics

    return Metrics()


def check_metrics(settings: Settings) -> None:
    """Checks that metrics can be served if there is an address for them.

    Raises:
        UnsafeError: Anybody on a network could read them, and the settings do not allow that.
    """
    address = settings.metrics_address
    if address is None:
        return
    if not is_loopback(address) and not settings.allow_network_metrics:
        raise UnsafeError(
            f"anybody who reaches {address} could read the metrics and the names of callers. Listen on 127.0.0.1, or set "
            "--allow-network-metrics true"
        )


@asynccontextmanager
async def serving_metrics(settings: Settings, source: Source) -> AsyncIterator[None]:
    """Serves the metrics, and a page about the server, at `settings.metrics_address` for the length of the context.

    Raises `OSError` if it cannot listen there.
    """
    address = settings.metrics_address
    assert address is not None  # noqa: S101 - the metrics exist only if there is an address
    from flywheel_server.telemetry.exposition import text_of
    from flywheel_server.telemetry.http import serving_http
    from flywheel_server.telemetry.status_page import status_page

    started_at, started = time.monotonic(), datetime.now(UTC)
    shown = shown_settings(settings)

    async def page() -> str:
        build = [
            *_build(source.model()),
            ("Started", f"{started:%Y-%m-%d %H:%M:%S} UTC, {time.monotonic() - started_at:.0f} s ago"),
        ]
        return await status_page(build, shown, await source.registry())

    async def render(openmetrics: bool) -> bytes:
        return await text_of(await source.registry(), openmetrics=openmetrics)

    async with serving_http(address, render, page, is_local=is_loopback(address), refresh=source.refresh):
        yield


def _build(model: EngineModel | None) -> list[tuple[str, str]]:
    return [
        ("Version", __version__),
        *([("Engine", model.engine), ("Model", model.name)] if model else []),
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
    return str(value).lower() if isinstance(value, bool) else str(value)
