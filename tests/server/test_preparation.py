"""Tokenizing a prompt is work of its caller: by priority, one at a time for each, counted, and held until it is over."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from flywheel_proto.v1 import generation_pb2 as pb
from flywheel_server.access.callers import Caller
from flywheel_server.access.quotas import Quotas, Reservation, Usage
from flywheel_server.engines.base import EngineFailedError, PreparedRequest, PromptTooLongError
from flywheel_server.engines.scripted import Script, ScriptedEngine
from flywheel_server.engines.uninterrupted import wait_until_done
from flywheel_server.messages import GenerationRequest
from flywheel_server.preparation import Preparation
from google.rpc.error_details_pb2 import ErrorInfo

from tests.access.test_quotas import keys_for
from tests.server.test_errors import METHODS, details_of, details_of_a_deadline
from tests.serving import Target, drained, serving, settled, until

REQUEST = GenerationRequest(text="x", max_tokens=1)


class Workshop(ScriptedEngine):
    """An engine that tokenizes a prompt until the test finishes it, even if the call is cancelled."""

    def __init__(self, script: Script | None = None) -> None:
        super().__init__(script or Script(tokenizers=2))
        self.at_work: dict[str, asyncio.Future[PreparedRequest]] = {}
        self.begun: list[str] = []

    async def prepare(self, request: GenerationRequest) -> PreparedRequest:
        self.begun.append(request.text)
        done = self.at_work[request.text] = asyncio.get_running_loop().create_future()
        try:
            return await wait_until_done(done)
        finally:
            del self.at_work[request.text]

    def finish_all(self) -> int:
        """Finishes what is at work, and returns how many prompts that were."""
        at_work = [text for text, done in self.at_work.items() if not done.done()]
        for text in at_work:
            self.finish(text)
        return len(self.at_work)

    def finish(self, text: str, tokens: int = 1) -> None:
        self.at_work[text].set_result(PreparedRequest(GenerationRequest(text=text, max_tokens=1), range(tokens)))


@pytest.fixture
async def workshop() -> AsyncIterator[Workshop]:
    engine = Workshop()
    yield engine
    # A call that waited forever for a thread would keep the event loop from closing.
    await until(lambda: engine.finish_all() == 0, "nothing is at work")


@dataclass
class Prompts:
    """Prompts of callers on their way through the preparation."""

    engine: Workshop
    preparation: Preparation
    usages: dict[str, Usage]

    async def come(self, text: str, of: str, priority: int = 0) -> "asyncio.Task[PreparedRequest]":
        usage = self.usages[text] = Usage()
        request = GenerationRequest(text=text, max_tokens=1)
        task = asyncio.create_task(self.preparation.prepare(request, Caller(of, priority), usage))
        await settled()
        return task

    async def finish(self, text: str) -> None:
        self.engine.finish(text)
        await settled()


@asynccontextmanager
async def prompts(threads: int = 2) -> AsyncIterator[Prompts]:
    engine = Workshop()
    preparation = Preparation(engine)
    preparation.set_threads(threads)
    all_prompts = Prompts(engine, preparation, {})
    yield all_prompts
    await until(lambda: engine.finish_all() == 0, "nothing is at work")
    assert not preparation._callers_with_thread
    assert not preparation._waiters


async def test_no_caller_has_two_threads() -> None:
    async with prompts() as those:
        await those.come("a1", "a")
        await those.come("a2", "a")
        await those.come("b1", "b")
        assert those.engine.begun == ["a1", "b1"]
        await those.finish("a1")
        assert those.engine.begun == ["a1", "b1", "a2"]


async def test_a_higher_priority_is_next() -> None:
    async with prompts(1) as those:
        await those.come("a", "a")
        await those.come("low", "low", -1)
        await those.come("high", "high", 1)
        await those.come("high too", "high too", 1)
        for text in ("a", "high", "high too"):
            await those.finish(text)
        assert those.engine.begun == ["a", "high", "high too", "low"]


async def test_a_call_keeps_its_thread_until_the_work_is_done_even_if_the_call_is_cancelled() -> None:
    async with prompts() as those:
        first = await those.come("a1", "a")
        second = await those.come("a2", "a")
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            async with asyncio.timeout(10):
                await first
        await settled()
        assert those.engine.begun == ["a1"], "the thread works on"
        await those.finish("a1")
        assert those.engine.begun == ["a1", "a2"]
        await those.finish("a2")
        assert len((await second).prompt) == 1


async def test_a_call_that_gives_up_before_it_has_a_thread_costs_nothing() -> None:
    async with prompts(1) as those:
        await those.come("a", "a")
        waiting = await those.come("word " * 100, "b")
        waiting.cancel()
        await settled()
        await those.finish("a")
        assert those.engine.begun == ["a"]
        assert those.usages["word " * 100].tokens == 0


async def test_the_prompt_is_charged_when_it_is_tokenized_and_by_its_length_before() -> None:
    async with prompts() as those:
        text = "word " * 100
        call = await those.come(text, "a")
        assert those.usages[text].tokens == 125
        call.cancel()
        await settled()
        those.engine.finish(text, tokens=101)
        await settled()
        assert those.usages[text].tokens in (101, 125), "the work was done, though nobody wanted its result"


@pytest.mark.parametrize(
    ("error", "charged"),
    [(PromptTooLongError(9000, 1, 8192), 9000), (PromptTooLongError(9000, 1, 8192, 0), 0), (EngineFailedError("x"), 0)],
)
async def test_a_prompt_that_is_refused_costs_the_tokens_that_were_counted(error: Exception, charged: int) -> None:
    async with prompts() as those:
        call = await those.come("x", "a")
        those.engine.at_work["x"].set_exception(error)
        with pytest.raises(type(error)):
            await call
        assert those.usages["x"].tokens == charged


async def test_the_quota_is_held_as_long_as_the_work_lasts() -> None:
    quotas = Quotas(lambda _: 1.0)
    caller = Caller("team", max_concurrent=1)
    work: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    with Reservation(quotas, caller, REQUEST) as usage:
        usage.extend_until_done(work)
    assert quotas._samples == {"team": 1}
    work.cancel()
    await settled()
    assert not quotas._samples


@asynccontextmanager
async def shop(tmp_path: Path, engine: ScriptedEngine, **callers: Any) -> AsyncIterator[tuple[Target, dict[str, Any]]]:
    file = tmp_path / "keys.json"
    with keys_for(file, **callers) as metadata:
        async with serving(engine, api_keys_file=str(file)) as target:
            yield target, metadata


@pytest.mark.parametrize("method", METHODS)
async def test_a_caller_that_cancels_has_no_more_threads_and_other_callers_go_on(
    workshop: Workshop, method: str, tmp_path: Path
) -> None:
    engine = workshop
    async with shop(tmp_path, engine, heavy={"max_concurrent": 1, "tokens_per_minute": 1000}, light={}) as (target, metadata):

        def call(caller: str, text: str, max_tokens: int = 1) -> "asyncio.Task[None]":
            request = pb.GenerationRequest(text=text, max_tokens=max_tokens)
            return asyncio.create_task(drained(getattr(target.stub, method)(request, metadata=metadata[caller])))

        prompt = "hog" * 3000
        hog = call("heavy", prompt)
        await until(lambda: engine.begun == [prompt], "the thread is taken")
        hog.cancel()
        await asyncio.wait([hog])
        for _ in range(3):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call("heavy", "again")
            assert details_of(caught.value)[ErrorInfo].reason == "QUOTA_EXCEEDED"
        other = call("light", "o")
        await until(lambda: engine.begun == [prompt, "o"], "another caller has a thread")
        engine.finish("o")
        await other
        # The prompt of the cancelled call is charged all the same, by its length: more than a minute's quota.
        engine.finish(prompt)
        await until(lambda: not engine.at_work, "the thread is free")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call("heavy", "more", max_tokens=1000)
        assert details_of(caught.value)[ErrorInfo].reason == "QUOTA_EXCEEDED"


@pytest.mark.parametrize("method", METHODS)
async def test_a_call_that_loses_its_place_ends_although_its_prompt_is_not_done(
    workshop: Workshop, method: str, tmp_path: Path
) -> None:
    engine = workshop
    file = tmp_path / "keys.json"
    with keys_for(file, low={"priority": -1}, high={}) as metadata:
        async with serving(engine, api_keys_file=str(file), max_concurrent=1, max_num_samples=1, max_queued=1) as target:

            def call(caller: str, text: str) -> Any:
                return getattr(target.stub, method)(
                    pb.GenerationRequest(text=text, max_tokens=1), metadata=metadata[caller], timeout=30
                )

            # The first is at work with a thread, and the second waits for it.
            lost = [call("low", "first")]
            await until(lambda: engine.begun == ["first"], "its prompt is at work")
            lost.append(call("low", "second"))

            async def both_wait() -> bool:
                return bool((await target.stub.GetStats(pb.GetStatsRequest(), metadata=metadata["high"])).queued == 2)

            await until(both_wait, "the second waits too")
            taken = [call("high", f"high {number}") for number in range(2)]
            try:
                for each in lost:
                    async with asyncio.timeout(10):
                        assert await each.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
                    with pytest.raises(grpc.aio.AioRpcError) as caught:
                        await drained(each)
                    assert details_of(caught.value)[ErrorInfo].reason == "OVERLOADED"
                for _ in taken:
                    await until(lambda: any("high" in text for text in engine.at_work), "the next one is at work")
                    engine.finish(next(text for text in engine.at_work if "high" in text))
                    await settled()
                for each in taken:
                    await drained(each)
                assert "second" not in engine.begun
            finally:
                for each in (*lost, *taken):
                    each.cancel()


async def test_a_deadline_ends_the_call_although_its_thread_works_on(workshop: Workshop) -> None:
    async with serving(workshop) as target:
        details = await details_of_a_deadline(
            lambda: target.stub.GenerateAll(pb.GenerationRequest(text="slow", max_tokens=1), timeout=0.3)
        )
        assert details[ErrorInfo].reason == "IN_QUEUE"


async def test_an_engine_that_fails_to_tokenize_is_in_doubt() -> None:
    class Mute(ScriptedEngine):
        checks = 0

        async def prepare(self, request: GenerationRequest) -> PreparedRequest:
            raise EngineFailedError("it cannot")

        async def check(self) -> None:
            self.checks += 1

    engine = Mute()
    async with serving(engine) as target:
        call = target.stub.GenerateAll(pb.GenerationRequest(text="x", max_tokens=1))
        assert await call.code() is grpc.StatusCode.INTERNAL
        await until(lambda: engine.checks == 2, "it is checked at the start, and after the failure")
