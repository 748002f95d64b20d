"""What each signal does to the command `flywheel-server`, from its first moment on and while a call runs."""

import asyncio
import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
from asyncio.subprocess import Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from flywheel_proto.v1 import generation_pb2 as pb
from flywheel_server.engines.scripted import ScriptedEngine
from flywheel_server.server import serve
from flywheel_server.settings import Settings
from flywheel_server.system.signals import DUMP_STACKS, STOP_SIGNALS, SWITCH_DEBUG

from tests.server.test_command import SCRIPTED, command, ready_line
from tests.serving import connected, until
from tests.thorough import further

BY_THE_SYSTEM = {
    # An error of the process, which ends it.
    *(signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGABRT, signal.SIGTRAP, signal.SIGSYS),
    # The process has used up its processor time.
    signal.SIGXCPU,
    # A process cannot handle it.
    signal.SIGKILL,
    # These stop a process for a while.
    *(signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU),
}
"""The signals that keep the effect that the system gives them."""

MEANINGLESS = sorted(signal.valid_signals() - BY_THE_SYSTEM - {*STOP_SIGNALS, DUMP_STACKS, SWITCH_DEBUG})

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


@asynccontextmanager
async def serving_a_call(setup: str = "") -> AsyncIterator[tuple[Process, Any]]:
    """Gives a server whose drain waits for its calls, and a call of 20 tokens that the server has begun to answer."""
    arguments = (*SCRIPTED, "--drain-timeout", "60", "--script", '{"token_delay": 0.02}')
    async with command(*arguments, setup=setup) as process:
        _, address = await ready_line(process)
        async with connected(address) as target:
            call = target.stub.GenerateDeltas(pb.GenerationRequest(text="x", max_tokens=20))
            await call.read()
            yield process, call


async def finished(call: Any) -> bool:
    """Returns whether the call has ended as it would without a signal."""
    last = pb.GenerationDelta()
    while (delta := await call.read()) is not grpc.aio.EOF:
        last = delta
    return last.finish_reason == "length" and last.generated_tokens == 20


async def ended(process: Process) -> str:
    """Waits until the process has ended with exit code 0, and returns what it wrote to standard error."""
    _, err = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode == 0, err
    assert b"Traceback" not in err
    return err.decode()


@pytest.mark.parametrize("number", [signal.SIGHUP, *further([signal.SIGQUIT, signal.SIGINT, signal.SIGTERM])])
async def test_a_call_that_runs_finishes_before_the_server_ends(number: signal.Signals) -> None:
    async with serving_a_call() as (process, call):
        process.send_signal(number)
        assert await finished(call)
        await ended(process)


@pytest.mark.parametrize("numbers", further((first, second) for first in STOP_SIGNALS for second in STOP_SIGNALS))
async def test_a_second_signal_of_any_kind_ends_the_drain(numbers: tuple[signal.Signals, signal.Signals]) -> None:
    async with command(*SCRIPTED, "--script", '{"token_delay": 0.05}') as process:
        _, address = await ready_line(process)
        async with connected(address) as target:
            call = target.stub.GenerateDeltas(pb.GenerationRequest(text="x", max_tokens=8000))
            await call.read()
            process.send_signal(numbers[0])
            while (await call.read()).generated_tokens < 10:
                pass
            process.send_signal(numbers[1])
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await finished(call)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            await ended(process)


async def test_meaningless_signals_change_nothing_and_one_shows_the_stacks() -> None:
    # As `nohup` ignores SIGHUP, and as a shell ignores the others for background processes.
    async with serving_a_call("trap '' HUP INT QUIT") as (process, call):
        for number in [*MEANINGLESS, signal.SIGHUP, DUMP_STACKS, DUMP_STACKS]:
            process.send_signal(number)
        assert await finished(call)
        assert process.returncode is None
        process.send_signal(signal.SIGINT)
        said = await ended(process)
    assert said.count("most recent call first") >= 4
    for expected in (r'File ".*serve_command\.py", line \d+ in run', r'File ".*output\.py", line \d+ in _run'):
        assert re.search(expected, said)


def mask(pid: int, kind: str) -> int:
    """Returns the signals that the main thread of the process blocks (SigBlk), ignores (SigIgn) or catches (SigCgt)."""
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith(f"{kind}:")]
    return int(line.split()[1], 16)


async def has(pid: int, kind: str, number: signal.Signals) -> None:
    await until(lambda: bool(mask(pid, kind) & 1 << number - 1), f"{kind} has {number.name}")


def test_nothing_that_takes_time_is_loaded_before_signals_are_heeded() -> None:
    listed = "import sys, flywheel_server.__main__; print(*(name for name in sys.modules if 'flywheel_' in name))"
    run = subprocess.run([sys.executable, "-c", listed], capture_output=True, text=True, check=True)
    ours = {name for name in run.stdout.split() if not name.startswith("__editable__")}
    assert ours == {"flywheel_server", "flywheel_server.__main__", "flywheel_server.system", "flywheel_server.system.signals"}


@pytest.mark.parametrize("number", STOP_SIGNALS)
async def test_a_signal_while_the_code_is_loaded_ends_the_server_in_order(number: signal.Signals) -> None:
    async with command(*SCRIPTED) as process:
        await has(process.pid, "SigBlk", number)
        process.send_signal(number)
        await ended(process)


@pytest.fixture(scope="module")
def as_first_process() -> str:
    """A shell command that runs its arguments as the first process of a namespace, as in a container."""
    words = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child"]
    if shutil.which(words[0]) is None or subprocess.run([*words, "true"], capture_output=True, check=False).returncode:
        pytest.skip("there are no namespaces of processes here")
    return f'exec {" ".join(words)} "$@"'


async def test_a_signal_to_the_first_process_of_a_container_is_not_lost(as_first_process: str) -> None:
    async with command(*SCRIPTED, setup=as_first_process) as process:
        first = 0

        def is_there() -> bool:
            nonlocal first
            children = psutil.Process(process.pid).children()
            first = children[0].pid if children else 0
            # Before that it is `unshare`, which blocks signals as well.
            return bool(children) and children[0].cmdline()[:1] == [sys.executable]

        await until(is_there, "the namespace has its first process")
        await has(first, "SigBlk", signal.SIGTERM)
        os.kill(first, signal.SIGTERM)
        await ended(process)


@pytest.mark.parametrize(
    "numbers", further([(signal.SIGTERM, signal.SIGINT), *((number,) for number in STOP_SIGNALS)]), ids=str
)
async def test_a_signal_while_the_model_is_loaded_is_acted_on_after_that(numbers: tuple[signal.Signals, ...]) -> None:
    async with command("--address", "127.0.0.1:0") as process:
        maps = Path(f"/proc/{process.pid}/maps")
        await until(lambda: ".gguf" in maps.read_text(), "the model is being loaded")
        for number in numbers:
            process.send_signal(number)
        await ended(process)


def files_of(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir()]


@pytest.mark.parametrize("number", [signal.SIGTERM, *further([number for number in STOP_SIGNALS if number != signal.SIGTERM])])
async def test_keys_end_with_the_code_of_the_signal_and_leave_the_file_whole(number: signal.Signals, tmp_path: Path) -> None:
    file, lock = tmp_path / "keys.json", tmp_path / ".keys.json.lock"
    arguments = ("keys", "create", "team-a", "--file", str(file))
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        async with command(*arguments) as process:
            await has(process.pid, "SigCgt", STOP_SIGNALS[-1])  # they are set up one after the other
            process.send_signal(number)
            assert await asyncio.wait_for(process.communicate(), 20) == (b"", b"")
            assert process.returncode == 128 + number
        async with command(*arguments) as process:
            opened = psutil.Process(process.pid).open_files

            def waits() -> bool:
                return any(file.path == str(lock) for file in opened())

            await until(waits, "it waits for the other command")
            process.send_signal(number)
            assert await asyncio.wait_for(process.communicate(), 20) == (b"", b"")
            assert process.returncode == 128 + number
    assert files_of(tmp_path) == [lock.name]


@pytest.mark.parametrize("steps", range(12))
async def test_a_server_may_be_stopped_at_any_step_of_its_start(steps: int) -> None:
    problems: list[Any] = []
    loop = asyncio.get_running_loop()
    handler = loop.get_exception_handler()
    loop.set_exception_handler(lambda _, context: problems.append(context))

    async def run() -> None:
        async with serve(ScriptedEngine(), Settings(address="127.0.0.1:0", withdraw_window=0)):
            await asyncio.Event().wait()

    try:
        task = asyncio.create_task(run())
        for _ in range(steps):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    finally:
        loop.set_exception_handler(handler)
    assert not problems
