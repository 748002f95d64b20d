"""A real Prometheus scrapes a real server, and answers every query. `make test-thorough` installs it."""

import asyncio
import json
import sys
import urllib.error
import urllib.parse
import urllib.request
from asyncio.subprocess import PIPE, STDOUT
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.serving import free_ports, until
from tests.telemetry import promql
from tests.telemetry.monitored import call_in_every_way, monitored
from tests.telemetry.promql import ALERTS, DEPLOY

PROGRAM = Path(sys.prefix) / "bin" / "prometheus"

pytestmark = [
    pytest.mark.thorough,
    pytest.mark.skipif(not PROGRAM.exists(), reason="make check and make test-thorough install Prometheus"),
]


class Prometheus:
    """A running Prometheus."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}"

    async def get(self, path: str, **parameters: str) -> Any:
        """Returns the data of an answer; None if Prometheus does not answer yet."""

        def read() -> Any:
            try:
                with urllib.request.urlopen(f"{self._url}{path}?{urllib.parse.urlencode(parameters)}", timeout=10) as answer:
                    return json.load(answer)["data"]
            except OSError as error:
                if isinstance(error, urllib.error.HTTPError) and error.code != 503:
                    raise AssertionError(error.read().decode()) from error
                return None

        return await asyncio.to_thread(read)

    async def series(self, query: str) -> list[Any]:
        """Returns the series that answer a query now."""
        data = await self.get("/api/v1/query", query=query)
        assert data["resultType"] == "vector"
        return list(data["result"])


@asynccontextmanager
async def prometheus(folder: Path, metrics_port: int) -> AsyncIterator[Prometheus]:
    """Runs Prometheus as the example configures it, only quicker, with the server's port."""
    text = (DEPLOY / "prometheus" / "prometheus.yaml").read_text()
    for old, new in (
        ("localhost:9464", f"127.0.0.1:{metrics_port}"),
        ("15s", "200ms"),
        ("alerts.yaml", str(DEPLOY / "prometheus" / "alerts.yaml")),
    ):
        assert old in text
        text = text.replace(old, new)
    (folder / "prometheus.yaml").write_text(text)
    (port,) = free_ports(1)
    process = await asyncio.create_subprocess_exec(
        str(PROGRAM),
        f"--config.file={folder / 'prometheus.yaml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
        stdout=PIPE,
        stderr=STDOUT,
    )
    try:
        yield Prometheus(port)
    finally:
        process.terminate()
        out, _ = await process.communicate()
        sys.stdout.write(out.decode())


async def test_every_query_has_an_answer_under_load(tmp_path: Path) -> None:
    async with monitored(tmp_path) as (stub, port), prometheus(tmp_path, port) as running:

        async def is_scraped() -> bool:
            return bool(await running.get("/api/v1/targets"))

        async def has_rates() -> bool:
            await call_in_every_way(stub)
            return bool(await running.series("rate(flywheel_calls_cancelled_total[5s]) > 0"))

        await until(is_scraped, "Prometheus answers")
        await until(has_rates, "calls are seen")
        keda, *_ = promql.scaling_queries()
        queries = [query for _, query, _ in promql.dashboard_queries(window="5s")]
        queries += [keda, *promql.documented_queries(), *[selector for selector, _ in promql.variable_queries()]]
        for query in queries:

            async def is_answered(query: str = query) -> bool:
                return bool(await running.series(query))

            # A busy machine may be late with a scrape, and Prometheus then has no figures until the next one.
            await until(is_answered, f"{query} has an answer", within=20)
        for query in [rule["expr"] for rule in ALERTS]:
            await running.series(query)


async def test_prometheus_accepts_the_alerts_and_sees_the_server(tmp_path: Path) -> None:
    async with monitored(tmp_path) as (_, port), prometheus(tmp_path, port) as running:

        async def expires() -> bool:
            alerts = await running.get("/api/v1/alerts")
            return alerts is not None and {each["labels"]["alertname"] for each in alerts["alerts"]} >= {"FlywheelKeyExpires"}

        await until(expires, "the key of the test expires within a week, and an alert says so")
        (group,) = (await running.get("/api/v1/rules"))["groups"]
        assert {rule["name"]: rule["health"] for rule in group["rules"]} == {rule["alert"]: "ok" for rule in ALERTS}
        (target,) = (await running.get("/api/v1/targets"))["activeTargets"]
        assert (target["health"], target["labels"]["job"]) == ("up", "flywheel")
