"""The command `flywheel` finds deployments on Modal: its endpoints, and calls of them."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from flywheel_client._records import DEFAULT_APP

from tests.client.modal.records import WAIT, record

if TYPE_CHECKING:
    from pathlib import Path

    import modal
    import trustme

    from tests.client.conftest import FakeService
    from tests.modal_cloud import ModalCloud


def flywheel(cloud: ModalCloud, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MODAL_", "FLYWHEEL_"))}
    return subprocess.run(
        [sys.executable, "-m", "flywheel_client", *arguments],
        env=environment | cloud.environ | {"COLUMNS": "80"} | variables,
        capture_output=True,
        text=True,
        timeout=WAIT,
        check=False,
    )


async def test_the_command_lists_endpoints(
    cloud: ModalCloud, records: modal.Dict, secured: list[FakeService], authority: tuple[trustme.CA, Path]
) -> None:
    addresses = [fake.address for fake in secured]
    await records.put.aio("ta-1", record(addresses[0], age=10.2))
    await records.put.aio("ta-22", record(addresses[1], age=3.2))
    # Its container was killed, and had a clock so far ahead that it is listed first.
    await records.put.aio("ta-3", record("localhost:1", age=-600.0))
    trust = ["--cacert", str(authority[1])]
    process = await asyncio.to_thread(flywheel, cloud, "endpoints", *trust)
    lines = [line.split() for line in process.stdout.splitlines()]
    assert lines[0] == ["ADDRESS", "KIND", "AGE", "REFRESHED", "CONTAINER"]
    assert [(line[0], line[1], line[2], line[4]) for line in lines[1:]] == [
        (addresses[1], "tunnel", "60m", "ta-22"),
        (addresses[0], "tunnel", "60m", "ta-1"),
    ]
    assert (process.returncode, process.stderr) == (0, "no answer within 6 s from localhost:1\n")
    process = await asyncio.to_thread(flywheel, cloud, "endpoints", "--json", *trust)
    assert [(each["address"], each["kind"], each["container"]) for each in json.loads(process.stdout)] == [
        (addresses[1], "tunnel", "ta-22"),
        (addresses[0], "tunnel", "ta-1"),
    ]
    process = await asyncio.to_thread(flywheel, cloud, "endpoints", "--first", *trust)
    assert (process.returncode, process.stdout, process.stderr) == (0, f"{addresses[1]}\n", "")


@pytest.mark.thorough
async def test_the_command_lists_all_if_none_answers(cloud: ModalCloud, records: modal.Dict) -> None:
    await records.put.aio("ta-1", record("localhost:1"))
    await records.put.aio("ta-2", record("localhost:2", age=3.0))
    process = await asyncio.to_thread(flywheel, cloud, "endpoints")
    assert [line.split()[0] for line in process.stdout.splitlines()] == ["ADDRESS", "localhost:2", "localhost:1"]
    assert (process.returncode, process.stderr) == (0, "no answer within 6 s from any of these\n")
    process = await asyncio.to_thread(flywheel, cloud, "endpoints", "--first")
    assert (process.returncode, process.stdout) == (0, "localhost:2\n")
    assert process.stderr == "no answer within 6 s from any of these\n"


async def test_the_command_says_that_there_is_none(cloud: ModalCloud, records: modal.Dict) -> None:
    for arguments in ([], ["--first"], ["--json"]):
        process = await asyncio.to_thread(flywheel, cloud, "endpoints", "--app", "absent", "--environment", "dev", *arguments)
        assert (process.returncode, process.stdout) == (1, "")
        assert process.stderr.startswith("flywheel: UNAVAILABLE: the Modal app 'absent' in the environment 'dev' has no live")


async def test_the_command_without_a_token(cloud: ModalCloud) -> None:
    process = await asyncio.to_thread(
        flywheel, cloud, "stats", "--modal-app", DEFAULT_APP, MODAL_TOKEN_ID="", MODAL_TOKEN_SECRET=""
    )
    assert (process.returncode, process.stdout) == (1, "")
    assert process.stderr.startswith("flywheel: UNAUTHENTICATED: Modal cannot be asked")
    assert "modal token new" in process.stderr


async def test_the_command_calls_a_deployment(
    cloud: ModalCloud, records: modal.Dict, secured: list[FakeService], authority: tuple[trustme.CA, Path]
) -> None:
    await records.put.aio("ta-1", record(secured[0].address))
    options = ["--modal-app", DEFAULT_APP, "--cacert", str(authority[1])]
    # The address in the variable is ignored, because --modal-app is on the command line.
    variables = {"FLYWHEEL_ADDRESS": "localhost:1", "FLYWHEEL_API_KEY": "key-2"}
    process = await asyncio.to_thread(flywheel, cloud, "generate", "p", *options, **variables)
    assert (process.returncode, process.stdout) == (0, "abc")
    assert secured[0].metadata[0]["authorization"] == "Bearer key-2"
    process = await asyncio.to_thread(flywheel, cloud, "model", *options, **variables)
    assert process.stdout.startswith("name")
    process = await asyncio.to_thread(flywheel, cloud, "bench", "--requests", "2", "--warm-up", "0", *options, **variables)
    assert process.stdout.startswith("SmolLM2-135M (fake) at flywheel-grpc\n")
    assert len(secured[0].requests) == 3
    secured[0].stop()
    process = await asyncio.to_thread(flywheel, cloud, "stats", *options, **variables)
    assert process.returncode == 1
    assert "To see what is live: flywheel endpoints --app flywheel-grpc\n" in process.stderr
