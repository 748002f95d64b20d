"""How a server of several processes ends, and how it does not start: each case with processes of its own."""

import asyncio
import os
import resource
import signal
from contextlib import nullcontext
from pathlib import Path

import grpc
import psutil
import pytest
import structlog
from flywheel_proto.v1 import generation_pb2 as pb
from flywheel_server.settings import parse
from flywheel_server.workers import parent as parent_module
from flywheel_server.workers.parent import END_TIMEOUT, serve_in_workers

from tests.server.test_command import SCRIPTED, command, ready_line
from tests.serving import Target, connected, until
from tests.workers.several import ARGUMENTS, is_running, several
from tests.workers.test_workers import LONG, SCRIPT, begun, counts_of, ended_by

pytestmark = pytest.mark.thorough


async def test_workers_end_with_their_parent_and_their_calls_with_a_status() -> None:
    async with several(*SCRIPT) as server, server.connections() as targets:
        calls = [await begun(target, ()) for target in targets.values()]
        server.process.kill()
        for call in calls:
            assert (await ended_by(call))[0] is grpc.StatusCode.UNAVAILABLE
        await until(lambda: not any(is_running(pid) for pid in server.pids().values()), "no worker is left", within=10)


async def test_a_worker_that_hangs_ends_some_time_after_its_parent() -> None:
    async with several(*SCRIPT) as server:
        pids = list(server.pids().values())
        os.kill(pids[0], signal.SIGSTOP)
        server.process.kill()
        await until(lambda: not is_running(pids[1]), "the other worker has ended")
        os.kill(pids[0], signal.SIGCONT)
        await until(lambda: not is_running(pids[0]), "and so has this one, when it could")


async def test_a_second_signal_ends_the_drain_of_all_workers() -> None:
    async with several(*SCRIPT) as server, server.connections() as targets:
        calls = [await begun(target, ()) for target in targets.values()]
        server.process.send_signal(signal.SIGTERM)
        await until(lambda: len(server.events("stopping")) == 2, "both drain")
        for call in calls:
            await call.read()
        server.process.send_signal(signal.SIGTERM)
        for call in calls:
            assert (await ended_by(call))[0] is grpc.StatusCode.UNAVAILABLE
        assert await server.closed() == 0


@pytest.mark.parametrize("signals", [1, 2])
async def test_a_worker_that_hangs_does_not_keep_the_server_from_its_end(signals: int) -> None:
    async with several(*SCRIPT, "--drain-timeout", "0.5") as server:
        pid = server.pids()[1]
        os.kill(pid, signal.SIGSTOP)
        for _ in range(signals):
            server.process.send_signal(signal.SIGTERM)
            await asyncio.sleep(0.1)
        async with asyncio.timeout(END_TIMEOUT + 10):
            assert await server.closed() == 0
        assert not is_running(pid)


async def test_a_worker_heeds_nobody_but_its_parent() -> None:
    async with several(*SCRIPT) as server, server.connections() as targets:
        for number, target in targets.items():
            for stopping in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
                os.kill(server.pids()[number], stopping)
            assert await target.stub.GenerateAll(pb.GenerationRequest(text="x", max_tokens=3))
        assert len(server.events("worker started")) == 2


async def test_a_server_whose_workers_die_again_and_again_ends() -> None:
    async with several(*SCRIPT) as server:
        killed: set[int] = set()
        while server.process.returncode is None:
            for pid in set(server.pids().values()) - killed:
                if is_running(pid):
                    os.kill(pid, signal.SIGKILL)
                killed.add(pid)
            await asyncio.sleep(0.05)
        assert await server.closed() == 1
        assert "has died 5 times in a row" in server.log[-1]["text"]


async def test_a_worker_that_cannot_be_started_is_started_later() -> None:
    async with several(*SCRIPT) as server, server.connections() as targets:
        parent = server.process.pid
        in_use = psutil.Process(parent).num_fds()
        before = resource.prlimit(parent, resource.RLIMIT_NOFILE)
        resource.prlimit(parent, resource.RLIMIT_NOFILE, (in_use, before[1]))
        pid = server.pids()[1]
        os.kill(pid, signal.SIGKILL)
        await until(lambda: len(server.events("worker not started")) == 2, "there are no descriptors for another one")
        assert await targets[2].stub.GenerateAll(pb.GenerationRequest(text="x", max_tokens=1))
        resource.prlimit(parent, resource.RLIMIT_NOFILE, before)
        await until(lambda: server.pids()[1] != pid, "the worker is replaced")
        async with server.connections():
            pass


async def test_a_worker_that_hangs_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parent_module, "CHECK_INTERVAL", 0.1)
    monkeypatch.setattr(parent_module, "MAX_SILENCE", 5.0)
    arguments = ["--engine", "scripted", "--workers", "2", "--withdraw-window", "0", *SCRIPT]
    settings = parse(["--address", "127.0.0.1:0", *arguments])
    with structlog.testing.capture_logs() as log:
        serving = serve_in_workers(settings, arguments, lambda _: None, lambda _: nullcontext())
        async with serving as port, connected(f"127.0.0.1:{port}") as target:
            call = await begun(target, ())
            pids = [line["pid"] for line in log if line["event"] == "worker started"]
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)
            assert (await ended_by(call))[0] is grpc.StatusCode.UNAVAILABLE
            await until(lambda: len([line for line in log if line["event"] == "worker started"]) == 4, "they are replaced")
            assert sorted(line["pid"] for line in log if line["event"] == "worker hangs") == sorted(pids)
            assert await target.stub.GenerateAll(pb.GenerationRequest(text="x", max_tokens=1), wait_for_ready=True)


@pytest.mark.parametrize("workers", ["1", "2"])
async def test_a_second_server_on_the_port_does_not_start(workers: str) -> None:
    async with several() as server:
        arguments = ("--engine", "scripted", "--address", server.address, "--workers", workers)
        async with command(*arguments) as second:
            _, err = await asyncio.wait_for(second.communicate(), 30)
            assert second.returncode == 1
            assert f"flywheel-server: cannot listen on {server.address}" in err.decode()


async def test_a_port_that_a_single_server_has_is_refused() -> None:
    async with command(*SCRIPTED) as first:
        _, address = await ready_line(first)
        async with command("--engine", "scripted", "--address", address, "--workers", "2") as second:
            _, err = await asyncio.wait_for(second.communicate(), 30)
            assert second.returncode == 1
            assert address in err.decode()


async def test_the_last_line_says_why_workers_cannot_start(tmp_path: Path) -> None:
    broken = tmp_path / "cert.pem"
    broken.write_text("no certificate")
    async with command(*ARGUMENTS, "--tls-cert", str(broken), "--tls-key", str(broken)) as process:
        out, err = await asyncio.wait_for(process.communicate(), 60)
        assert (process.returncode, out) == (1, b"")
        assert b"Traceback" not in err
        last = err.decode().strip().splitlines()[-1]
        assert last.startswith("flywheel-server: ")
        assert str(broken) in last


@pytest.mark.parametrize("delay", [0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.5])
async def test_a_signal_while_workers_start_ends_all(delay: float) -> None:
    async with command(*ARGUMENTS) as process:
        assert process.stderr is not None
        assert b"worker started" in await process.stderr.readline()
        await asyncio.sleep(delay)
        process.send_signal(signal.SIGTERM)
        _, err = await asyncio.wait_for(process.communicate(), 30)
        assert process.returncode == 0, err
        assert b"Traceback" not in err


async def test_calls_of_dying_workers_release_all_that_they_held() -> None:
    limits = ("--max-concurrent", "4", "--max-queued", "4")
    async with several(*SCRIPT, *limits) as server:
        for round_number in range(3):
            async with server.connections() as targets:
                calls = [target.stub.GenerateDeltas(LONG) for target in targets.values() for _ in range(4)]

                async def all_are_here(target: Target = targets[1]) -> bool:
                    return await counts_of(target, ()) == (4, 4)

                await until(all_are_here, "four run, and four wait")
                for call in calls[::3]:
                    call.cancel()
                pid = server.pids()[1 + round_number % 2]
                os.kill(pid, signal.SIGKILL)
                await until(lambda pid=pid: pid not in server.pids().values(), "it is replaced")  # type: ignore[misc]
                for call in calls:
                    call.cancel()
        async with server.connections() as targets:
            one, two = targets.values()
            running = [await begun(target, ()) for target in (one, two, one, two)]
            stats = await one.stub.GetStats(pb.GetStatsRequest())
            assert (stats.active, stats.queued) == (4, 0)
            for call in running:
                call.cancel()
