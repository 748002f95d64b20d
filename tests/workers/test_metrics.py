"""The metrics of several processes, as one endpoint shows them."""

import asyncio
import os
import signal
import socket
import time
from asyncio.subprocess import PIPE
from collections.abc import Mapping

import grpc
import pytest
from flywheel_proto.v1 import generation_pb2 as pb
from flywheel_server.workers.metrics import REPORT_TIMEOUT

from tests.server.test_command import command
from tests.serving import Target, code_of, until
from tests.telemetry.scraping import get
from tests.telemetry.values import free_address, scraped, until_scraped
from tests.workers.several import ARGUMENTS, Several, several
from tests.workers.test_workers import begun

CALLS = 20
SHORT = pb.GenerationRequest(text="llamas", max_tokens=3)
LONG = pb.GenerationRequest(text="x", max_tokens=8000)
SCRIPT = ("--script", '{"token_delay": 0.01}', "--max-concurrent", "3")

GENERATED = "flywheel_generated_tokens_total"
OK = (
    'rpc_server_call_duration_seconds_count{rpc_method="flywheel.v1.GenerationService/GenerateAll",'
    'rpc_response_status_code="OK",rpc_system_name="grpc"}'
)
MEASURED = "flywheel_queue_wait_seconds_count"


async def test_the_endpoint_shows_all_workers_together() -> None:
    address = free_address()
    async with several(*SCRIPT, "--metrics-address", address) as server, server.connections() as targets:
        await _totals_are_exact(address, targets)
        await _a_scrape_does_not_wait_for_a_worker_that_hangs(address, server)
        await _what_a_killed_worker_counted_stays(address, server, targets)


async def _totals_are_exact(address: str, targets: Mapping[int, Target]) -> None:
    calls = [code_of(target.stub.GenerateAll(SHORT)) for target in targets.values() for _ in range(CALLS)]
    assert set(await asyncio.gather(*calls)) == {grpc.StatusCode.OK}
    values = await until_scraped(address, {OK: 2 * CALLS, GENERATED: 2 * CALLS * 3, MEASURED: 2 * CALLS})
    assert (values["flywheel_engine_up"], values["flywheel_engine_runners"]) == (1, 2)
    assert [value for key, value in values.items() if key.startswith("flywheel_build_info")] == [1]
    assert (values["flywheel_max_concurrent"], values["flywheel_samples_active"]) == (3, 0)
    running = [await begun(target, (), LONG) for target in targets.values() for _ in range(2 - (target is targets[1]))]
    waiting = [target.stub.GenerateDeltas(LONG) for target in targets.values()]
    busy = {"flywheel_calls_active": 3, "flywheel_calls_queued": 2, "flywheel_samples_active": 3, "flywheel_samples_queued": 2}
    values = await until_scraped(address, busy)
    assert values["flywheel_connections"] >= 2
    for call in (*running, *waiting):
        call.cancel()
    await until_scraped(address, dict.fromkeys(busy, 0))
    page = await get(int(address.rpartition(":")[2]), "/")
    assert page.status == 200
    assert b"flywheel_engine_runners" in page.content


async def _a_scrape_does_not_wait_for_a_worker_that_hangs(address: str, server: Several) -> None:
    before = await scraped(address)
    os.kill(server.pids()[1], signal.SIGSTOP)
    try:
        began = time.perf_counter()
        hanging = await scraped(address)
        assert time.perf_counter() - began < REPORT_TIMEOUT + 3
    finally:
        os.kill(server.pids()[1], signal.SIGCONT)
    assert hanging[OK] == before[OK]
    assert hanging["flywheel_engine_runners"] == 2, "it counts as it last reported"


async def _what_a_killed_worker_counted_stays(address: str, server: Several, targets: Mapping[int, Target]) -> None:
    pid = server.pids()[1]
    before = await scraped(address)
    os.kill(pid, signal.SIGKILL)

    async def is_replaced() -> bool:
        values = await scraped(address)
        assert values.items() >= {OK: before[OK], GENERATED: before[GENERATED], MEASURED: before[MEASURED]}.items()
        return server.pids()[1] != pid and values["flywheel_engine_runners"] == 2

    await until(is_replaced, "another worker serves, and the gauges of the killed one do not stay")
    assert await code_of(targets[2].stub.GenerateAll(SHORT)) is grpc.StatusCode.OK
    await until_scraped(address, {OK: before[OK] + 1})


@pytest.mark.parametrize(
    ("address", "problem"),
    [("0.0.0.0:0", b"--allow-network-metrics true"), ("127.0.0.1:{port}", b"cannot listen on 127.0.0.1:")],
)
async def test_several_workers_do_not_start_if_their_metrics_cannot_be_served(address: str, problem: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = address.format(port=taken.getsockname()[1])
        async with command(*ARGUMENTS, "--metrics-address", address, stdout=PIPE, stderr=PIPE) as process:
            _, log = await process.communicate()
    assert process.returncode == 1
    assert problem in log
    assert b"worker started" not in log
