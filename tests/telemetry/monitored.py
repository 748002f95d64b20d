"""A server each of whose metrics has a value, so that queries can be compared with what it shows."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
from flywheel_proto.v1 import generation_pb2 as pb
from flywheel_server.access.keys_file import KeyEntry, KeysFile, hash_of
from flywheel_server.engines.base import EngineStats
from flywheel_server.engines.scripted import Script, ScriptedEngine
from prometheus_client.parser import text_string_to_metric_families

from tests.server.test_tls import Files, client
from tests.serving import code_of, free_ports, serving, until
from tests.telemetry.scraping import get

METADATA = (("authorization", "Bearer key"),)
QUICK = pb.GenerationRequest(text="x", max_tokens=8)
SLOW = pb.GenerationRequest(text="x", max_tokens=1000)


class Engine(ScriptedEngine):
    """Counts prompts as read from a cache, as the embedded engine does."""

    def __init__(self) -> None:
        script = Script(
            token_delay=0.001,
            context_tokens=2000,
            shared_context_tokens=2000,
            fail_on="fail",
            fail_after=1,
            failure="unavailable",
        )
        super().__init__(script)

    async def stats(self) -> EngineStats:
        stats = await super().stats()
        return EngineStats(stats.backlog, stats.num_total_runners, cached_prompt_tokens=1)


@asynccontextmanager
async def monitored(folder: Path) -> AsyncIterator[tuple[Any, int]]:
    """Gives a stub of a server, and the port of its metrics."""
    now = datetime.now(UTC)
    KeysFile(keys=(KeyEntry(name="team-a", hash=hash_of("key"), created=now, expires=now + timedelta(days=1)),)).write(
        keys := folder / "keys.json"
    )
    files = Files(folder)
    (port,) = free_ports(1)
    settings = {**files.settings, "api_keys_file": str(keys), "max_concurrent": 1, "max_queued": 1}
    async with (
        serving(Engine(), metrics_address=f"127.0.0.1:{port}", **settings) as target,
        client(target.address, files.authority) as stub,
    ):
        yield stub, port


async def call_in_every_way(stub: Any) -> None:
    """Makes calls that go well, and calls that are invalid, refused, failed and cancelled."""
    assert await code_of(stub.GenerateDeltas(QUICK, metadata=METADATA)) is grpc.StatusCode.OK
    await code_of(stub.GenerateAll(pb.GenerationRequest(text="x"), metadata=METADATA))
    await code_of(stub.GenerateAll(pb.GenerationRequest(text="fail", max_tokens=8), metadata=METADATA))
    running = stub.GenerateDeltas(SLOW, metadata=METADATA)
    await running.read()
    queued = stub.GenerateDeltas(SLOW, metadata=METADATA)

    async def is_full() -> bool:
        stats = await stub.GetStats(pb.GetStatsRequest(), metadata=METADATA)
        return bool(stats.queued)

    await until(is_full, "the queue is full")
    await code_of(stub.GenerateDeltas(QUICK, metadata=METADATA))
    for call in (queued, running):
        call.cancel()
    await code_of(stub.GenerateDeltas(QUICK, metadata=METADATA))


async def scraped(port: int) -> str:
    """Returns all metrics as text."""
    # A proxy would keep the connection.
    answer = await get(port, Connection="close")
    assert answer.status == 200, answer
    return answer.content.decode()


class Exposed:
    """What an endpoint shows.

    Attributes:
        kinds: The kind of each metric: gauge, counter or histogram.
        labels: The labels of each name that a query can use, such as `…_bucket`.
        values: The values of each label of all metrics.
    """

    def __init__(self, text: str) -> None:
        self.kinds: dict[str, str] = {}
        self.labels: dict[str, set[str]] = {}
        self.values: dict[str, set[str]] = {}
        for family in text_string_to_metric_families(text):
            name = f"{family.name}_total" if family.type == "counter" else family.name
            self.kinds[name] = family.type
            for sample in family.samples:
                self.labels.setdefault(sample.name, set()).update(sample.labels)
                for label, value in sample.labels.items():
                    self.values.setdefault(label, set()).add(value)

    def labels_of(self, metric: str) -> set[str]:
        """Returns the labels of a metric; of a histogram, without the bounds of buckets."""
        name = f"{metric}_count" if self.kinds[metric] == "histogram" else metric
        return self.labels.get(name, set())
