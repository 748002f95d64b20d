"""`generate_many`: several calls at a time, results as they come, and nothing that is left behind."""

from __future__ import annotations

import asyncio
import functools
import gc
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import flywheel_client
import grpc
import pytest
from flywheel_client import AsyncClient, CallCancelledError, Client, InvalidArgumentError, Message, PromptResult
from flywheel_proto.v1 import generation_pb2

from tests.client.conftest import WAIT, Caller, FakeService, serving_fake
from tests.serving import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from grpc_health.v1.health import HealthServicer


@dataclass
class Gate(FakeService):
    """Answers each prompt when the test opens it, and knows which calls run."""

    changed: threading.Condition = field(default_factory=threading.Condition)
    running: set[str] = field(default_factory=set)
    opened: set[str] = field(default_factory=set)
    peak: int = 0
    """The most calls that ran at the same time."""

    def open(self, *prompts: str) -> None:
        with self.changed:
            self.opened.update(prompts)
            self.changed.notify_all()

    def runs(self, *prompts: str) -> bool:
        return self.running == {*prompts}

    def GenerateAll(
        self, request: generation_pb2.GenerationRequest, context: grpc.ServicerContext
    ) -> generation_pb2.GenerationResponse:
        prompt = request.text
        with self.changed:
            self.requests.append(request)
            self.running.add(prompt)
            self.peak = max(self.peak, len(self.running))
            self.changed.notify_all()
            if not context.add_callback(functools.partial(self._end_of, prompt)):
                self.running.discard(prompt)  # the call has already ended
            self.changed.wait_for(lambda: prompt in self.opened or prompt not in self.running, WAIT)
            self.running.discard(prompt)
        if prompt.startswith("bad"):
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "a bad prompt")
        return generation_pb2.GenerationResponse(prompt=prompt)

    def _end_of(self, prompt: str) -> None:
        with self.changed:
            self.running.discard(prompt)
            self.changed.notify_all()


@pytest.fixture
def gate(health: HealthServicer) -> Iterator[Gate]:
    service = Gate()
    with serving_fake(health, service=service):
        yield service


class Prompts:
    """Prompts without end, which count how many were read."""

    def __init__(self) -> None:
        self.read = 0

    def __iter__(self) -> Iterator[str]:
        while True:
            self.read += 1
            yield str(self.read - 1)


async def next_of(one: Caller, results: Any) -> PromptResult:
    result = await (anext(results) if one.is_async else asyncio.to_thread(next, results))
    assert isinstance(result, PromptResult)
    return result


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("flywheel-prompt")]


async def nothing_is_left(gate: Gate) -> None:
    await until(lambda: not gate.running, "all calls are cancelled")
    await until(lambda: not threads(), "the threads have ended")
    await until(lambda: asyncio.all_tasks() == {asyncio.current_task()}, "the tasks have ended")


async def test_results_come_as_they_finish(caller: Callable[..., Caller], gate: Gate) -> None:
    one = caller(gate.address)
    prompts = Prompts()
    results = one.client.generate_many(prompts, concurrency=3, max_tokens=1)
    assert prompts.read == 0
    for prompt, running in (("1", "012"), ("2", "023"), ("0", "034")):
        fetching = asyncio.create_task(next_of(one, results))
        await until(functools.partial(gate.runs, *running), "three calls run")
        gate.open(prompt)
        result = await fetching
        assert (result.position, result.response.prompt, result.error) == (int(prompt), prompt, None)
    assert prompts.read == 5
    assert gate.peak == 3
    await one.close_stream(results)
    await nothing_is_left(gate)
    assert prompts.read == 5


async def test_a_failed_prompt_has_its_error_and_the_others_go_on(caller: Callable[..., Caller], gate: Gate) -> None:
    one = caller(gate.address)
    prompts = ["a", "bad", "b", "bad 2", "c"]
    gate.open(*prompts)
    results = one.client.generate_many(prompts, concurrency=2, max_tokens=1)
    found = [await next_of(one, results) for _ in prompts]
    assert await (anext(results, None) if one.is_async else asyncio.to_thread(next, results, None)) is None
    found.sort(key=lambda result: result.position)
    assert [result.error and result.error.code for result in found] == [
        None if len(prompt) == 1 else grpc.StatusCode.INVALID_ARGUMENT for prompt in prompts
    ]
    with pytest.raises(InvalidArgumentError, match="a bad prompt"):
        _ = found[1].response
    await nothing_is_left(gate)


@pytest.mark.parametrize("how", ["close", "drop", "an error of the prompts", "close the client"])
async def test_leaving_cancels_all_calls(caller: Callable[..., Caller], gate: Gate, how: str) -> None:
    def prompts() -> Iterator[str]:
        yield from ["0", "1", "2"]
        raise LookupError

    one = caller(gate.address)
    results = one.client.generate_many(prompts(), concurrency=3, max_tokens=1)
    gate.open("0")
    assert (await next_of(one, results)).position == 0
    await until(lambda: gate.runs("1", "2"), "the others run")
    match how:
        case "close":
            await one.close_stream(results)
        case "drop":
            del results
            gc.collect()
        case "close the client":
            await one.close()
            with pytest.raises(LookupError):
                await next_of(one, results)
        case _:
            with pytest.raises(LookupError):
                await next_of(one, results)
    await nothing_is_left(gate)


async def test_a_closed_client_ends_its_calls(caller: Callable[..., Caller], gate: Gate) -> None:
    one = caller(gate.address)
    results = one.client.generate_many(["0", "1"], max_tokens=1)
    waiting = asyncio.create_task(next_of(one, results))
    await until(lambda: len(gate.running) == 2, "both run")
    await one.close()
    for result in (await waiting, await next_of(one, results)):
        with pytest.raises(CallCancelledError):
            _ = result.response
    await nothing_is_left(gate)


async def test_prompts_of_each_kind(caller: Callable[..., Caller], gate: Gate) -> None:
    one = caller(gate.address)
    gate.open("", "text", "own")
    conversation = [Message("user", "Hello")]
    prompts = ["text", conversation, {"text": "own", "max_tokens": 2, "stop": None, "regex": "a"}]
    results = one.client.generate_many(prompts, concurrency=1, max_tokens=1, stop=iter(["END"]), choices=["x"])
    for _ in prompts:
        await next_of(one, results)
    common: dict[str, Any] = {"max_tokens": 1, "stop": ["END"], "choices": {"texts": ["x"]}}
    assert gate.requests == [
        generation_pb2.GenerationRequest(text="text", **common),
        generation_pb2.GenerationRequest(messages=[generation_pb2.Message(role="user", content="Hello")], **common),
        generation_pb2.GenerationRequest(text="own", max_tokens=2, regex="a"),
    ]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"prompts": "one text"}, TypeError, "prompts must be an iterable"),
        ({"prompts": 5}, TypeError, "prompts must be an iterable"),
        ({"concurrency": 0}, ValueError, "concurrency must be at least 1"),
        ({"concurrency": 1.5}, TypeError, "concurrency must be an integer"),
        ({"max_tokens": None}, TypeError, "max_tokens is required"),
        ({"temprature": 1}, TypeError, "temprature is not a field"),
        ({"timeout": -1}, ValueError, "timeout"),
    ],
)
async def test_arguments_are_checked_at_once(
    caller: Callable[..., Caller], arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        caller("localhost:1").client.generate_many(**{"prompts": ["p"], "max_tokens": 1, **arguments})


@pytest.mark.parametrize(
    ("prompt", "message"), [(5, r"prompts\[1\]: messages"), ({"role": "user"}, r"prompts\[1\]: role is not a field")]
)
async def test_a_wrong_prompt_ends_the_iteration(caller: Callable[..., Caller], gate: Gate, prompt: Any, message: str) -> None:
    one = caller(gate.address)
    results = one.client.generate_many(["0", prompt], max_tokens=1)
    with pytest.raises(TypeError, match=message):
        await next_of(one, results)
    await nothing_is_left(gate)


async def test_a_cancelled_task_cancels_all_calls(gate: Gate) -> None:
    async with AsyncClient(gate.address) as client:

        async def collect() -> None:
            async for _ in client.generate_many(Prompts(), concurrency=4, max_tokens=1):
                pass

        collecting = asyncio.create_task(collect())
        await until(lambda: len(gate.running) == 4, "the calls run")
        collecting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await collecting
        await nothing_is_left(gate)


async def test_a_prompt_that_is_late_keeps_no_result_back(gate: Gate) -> None:
    late = asyncio.Event()

    async def prompts() -> AsyncIterator[str]:
        yield "0"
        await late.wait()
        yield "1"

    gate.open("0", "1")
    async with AsyncClient(gate.address) as client:
        results = client.generate_many(prompts(), max_tokens=1)
        assert (await anext(results)).position == 0
        late.set()
        assert [result.position async for result in results] == [1]
        assert asyncio.all_tasks() == {asyncio.current_task()}


INTERRUPTED = """
import faulthandler, itertools, random, signal, sys, threading, time
from flywheel_client import Client

faulthandler.dump_traceback_later(60, exit=True)  # where it hangs, if an interrupt has left a lock taken
client = Client(sys.argv[1], timeout=10)
interrupts = 0

def interrupt(*_):
    global interrupts
    interrupts += 1
    raise KeyboardInterrupt

signal.signal(signal.SIGALRM, interrupt)
while interrupts < 100:
    try:
        # Again later, because Python swallows what is raised in a finalizer.
        signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-4, 0.02), 0.2)
        with client.generate_many(map(str, itertools.count()), concurrency=4, max_tokens=1) as results:
            for result in results: pass
    except KeyboardInterrupt:
        signal.setitimer(signal.ITIMER_REAL, 0)
client.generate_all("0", max_tokens=1)
while any(thread.name.startswith("flywheel-prompt") for thread in threading.enumerate()):
    time.sleep(0.01)
print("no thread is left", flush=True)
sys.stdin.read()
"""


def test_an_interrupt_at_any_moment_cancels_all_calls_and_leaves_the_client_usable(gate: Gate) -> None:
    gate.open("0", "1", "2")
    command = [sys.executable, "-c", INTERRUPTED, gate.address]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "no thread is left\n"
        # The process still lives and holds its channel, so this is the cancellation and not a broken connection.
        with gate.changed:
            assert gate.changed.wait_for(lambda: not gate.running, WAIT)
        process.communicate("")
    assert process.returncode == 0


def test_a_program_may_end_in_the_middle(gate: Gate) -> None:
    gate.open("0")
    program = (
        "import sys; from flywheel_client import Client\n"
        "results = Client(sys.argv[1]).generate_many(['0', '1'], max_tokens=1); print(next(results).position)"
    )
    command = [sys.executable, "-c", program, gate.address]
    process = subprocess.run(command, capture_output=True, text=True, timeout=WAIT, check=True)
    assert (process.stdout, process.stderr) == ("0\n", "")


def test_the_result_types_are_public() -> None:
    with Client("localhost:1") as client:
        assert isinstance(client.generate_many([], max_tokens=1), flywheel_client.PromptResults)
        assert list(client.generate_many([], max_tokens=1)) == []
