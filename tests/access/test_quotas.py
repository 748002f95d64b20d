"""Each caller has what its key grants it, and no more."""

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import structlog
from flywheel_proto.v1 import generation_pb2 as pb
from flywheel_server.access.callers import ANYBODY, Caller
from flywheel_server.access.keys_file import KeyEntry, KeysFile, hash_of, new_key
from flywheel_server.access.quotas import Quotas, Reservation, Usage
from flywheel_server.engines.base import EngineModel, TextDelta
from flywheel_server.engines.scripted import Script, ScriptedEngine
from flywheel_server.errors import QuotaExceededError
from flywheel_server.messages import GenerationRequest, GenerationResponseSample
from google.rpc.error_details_pb2 import ErrorInfo, QuotaFailure, RetryInfo
from structlog.testing import capture_logs

from tests.server.test_errors import METHODS, details_of
from tests.serving import drained, serving, until


class Clock:
    def __init__(self) -> None:
        self.now = 50.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def quotas(clock: Clock) -> Quotas:
    return Quotas(lambda _: 8.0, clock)


def request(max_tokens: int = 10, num_samples: int = 1) -> GenerationRequest:
    return GenerationRequest(text="x", max_tokens=max_tokens, num_samples=num_samples)


def sample(index: int, generated: int, prompt: int) -> GenerationResponseSample:
    return GenerationResponseSample(
        text="", generated_tokens=generated, finished=1.0, finish_reason="stop", index=index, prompt_tokens=prompt
    )


def use(quotas: Quotas, caller: Caller, asked: GenerationRequest, generated: int, prompt: int) -> None:
    with Reservation(quotas, caller, asked) as usage:
        usage.count(sample(0, generated, prompt))


def refused(quotas: Quotas, caller: Caller, asked: GenerationRequest) -> QuotaExceededError:
    with pytest.raises(QuotaExceededError) as caught, Reservation(quotas, caller, asked):
        pass
    return caught.value


def test_usage_counts_the_prompt_once_and_each_sample() -> None:
    usage = Usage()
    for index in (0, 1):
        for generated in (1, 2, 3):
            usage.count(TextDelta(index, "a", generated))
    assert usage.tokens == 6
    usage.count(sample(1, 4, 100))
    usage.count(sample(0, 5, 100))
    assert usage.tokens == 109


def test_a_call_that_ends_early_has_cost_its_prompt(quotas: Quotas) -> None:
    caller = Caller("team", tokens_per_minute=100)
    with Reservation(quotas, caller, request(1)) as usage:
        usage.set_prompt_tokens(90)
    refused(quotas, caller, request(11))


@pytest.mark.parametrize("method", METHODS)
async def test_a_prompt_counts_although_its_call_does_not_finish(method: str, tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    with keys_for(file, small={"tokens_per_minute": 60}) as metadata:
        async with serving(ScriptedEngine(Script(hang_after=0)), api_keys_file=str(file)) as target:
            asked = pb.GenerationRequest(text="word" * 59, max_tokens=2)
            codes = []
            for _ in range(2):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await drained(getattr(target.stub, method)(asked, timeout=0.2, metadata=metadata["small"]))
                codes.append(caught.value.code())
    assert codes == [grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.RESOURCE_EXHAUSTED]


def test_without_quotas_there_is_no_limit(quotas: Quotas) -> None:
    with ExitStack() as stack:
        for _ in range(1000):
            stack.enter_context(Reservation(quotas, ANYBODY, request(2**30, 16)))


def test_samples_at_a_time(quotas: Quotas) -> None:
    caller = Caller("team", max_concurrent=4)
    with Reservation(quotas, caller, request(num_samples=3)):
        error = refused(quotas, caller, request(num_samples=2))
        # Calls take eight seconds, so one of four ends every two seconds.
        assert (error.caller, error.quota, error.retry_delay) == ("team", "max_concurrent 4", 4.0)
        with Reservation(quotas, caller, request()), Reservation(quotas, Caller("other", max_concurrent=1), request()):
            refused(quotas, caller, request())
    with Reservation(quotas, caller, request(num_samples=4)):
        pass


def test_a_call_counts_as_the_slots_that_it_takes(quotas: Quotas) -> None:
    caller = Caller("team", max_concurrent=4)
    with Reservation(quotas, caller, request(), slots=4):
        refused(quotas, caller, request())
    with Reservation(quotas, caller, request(num_samples=4)):
        pass


def test_a_call_that_alone_exceeds_the_quota_gets_no_retry_delay(quotas: Quotas) -> None:
    assert refused(quotas, Caller("team", max_concurrent=4), request(num_samples=5)).retry_delay is None


def test_tokens_of_a_minute_come_back_with_time(quotas: Quotas, clock: Clock) -> None:
    caller = Caller("team", tokens_per_minute=600)
    use(quotas, caller, request(600), generated=500, prompt=50)
    assert refused(quotas, caller, request(100)).retry_delay == pytest.approx(5)
    use(quotas, caller, request(50), generated=0, prompt=0)
    clock.now += 5
    use(quotas, caller, request(100), generated=100, prompt=0)
    clock.now += 3600
    use(quotas, caller, request(600), generated=600, prompt=0)
    assert refused(quotas, caller, request(1)).retry_delay == pytest.approx(0.1)


def test_calls_at_a_time_cannot_together_exceed_the_quota(quotas: Quotas) -> None:
    caller = Caller("team", tokens_per_minute=100)
    with Reservation(quotas, caller, request(30, num_samples=2)):
        refused(quotas, caller, request(41))
        with Reservation(quotas, caller, request(40)):
            refused(quotas, caller, request(1))


def test_a_call_that_may_generate_more_than_a_minute_grants_takes_all_of_it(quotas: Quotas, clock: Clock) -> None:
    caller = Caller("team", tokens_per_minute=100)
    use(quotas, caller, request(8000), generated=250, prompt=50)
    # 200 more than the quota: two minutes to refill these, and one more for the tokens of the next call.
    assert refused(quotas, caller, request(100)).retry_delay == pytest.approx(180)
    clock.now += 181
    use(quotas, caller, request(100), generated=1, prompt=1)


def test_a_call_that_fails_costs_the_tokens_that_it_generated(quotas: Quotas) -> None:
    caller = Caller("team", tokens_per_minute=100, max_concurrent=1)
    with suppress(KeyError), Reservation(quotas, caller, request(100)) as usage:
        usage.count(TextDelta(0, "a", 7))
        raise KeyError
    refused(quotas, caller, request(94))
    use(quotas, caller, request(93), generated=0, prompt=0)


@contextmanager
def keys_for(path: Path, **callers: Any) -> Iterator[dict[str, tuple[tuple[str, str]]]]:
    """Writes a file with a key for each caller, and gives the metadata that carries it."""
    keys = {name: new_key() for name in callers}
    entries = [
        KeyEntry(name=name, hash=hash_of(keys[name]), created=datetime.now(UTC), **fields) for name, fields in callers.items()
    ]
    KeysFile(keys=tuple(entries)).write(path)
    yield {name: (("authorization", f"Bearer {key}"),) for name, key in keys.items()}


class _OneSeedAtATime(ScriptedEngine):
    """An engine in which a request with a seed takes all slots."""

    def model(self) -> EngineModel:
        return replace(super().model(), slots=4, slots_for_seed=4)


async def test_a_request_that_takes_all_slots_needs_a_quota_for_all(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    with keys_for(file, small={"max_concurrent": 3}, large={"max_concurrent": 4}) as metadata:
        async with serving(_OneSeedAtATime(), api_keys_file=str(file)) as target:
            asked = pb.GenerationRequest(text="x", max_tokens=1)
            await target.stub.GenerateAll(asked, metadata=metadata["small"])
            asked.seed = 7
            await target.stub.GenerateAll(asked, metadata=metadata["large"])
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await target.stub.GenerateAll(asked, metadata=metadata["small"])
            assert details_of(caught.value)[ErrorInfo].reason == "QUOTA_EXCEEDED"
            assert RetryInfo not in details_of(caught.value)


@pytest.mark.parametrize("method", METHODS)
async def test_a_used_up_quota_reaches_its_caller_and_nobody_else(method: str, tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    with keys_for(file, small={"tokens_per_minute": 60}, large={}) as metadata:
        async with serving(ScriptedEngine(), api_keys_file=str(file)) as target:
            asked = pb.GenerationRequest(text="x", max_tokens=50)
            generate = getattr(target.stub, method)
            await drained(generate(asked, metadata=metadata["small"]))
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await drained(generate(asked, metadata=metadata["small"]))
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            details = details_of(caught.value)
            assert details[ErrorInfo].reason == "QUOTA_EXCEEDED"
            (violation,) = details[QuotaFailure].violations
            assert (violation.subject, violation.description) == ("small", "tokens_per_minute 60")
            assert 0 < details[RetryInfo].retry_delay.seconds <= 60
            await drained(generate(asked, metadata=metadata["large"]))


async def test_samples_at_a_time_of_a_key(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    engine = ScriptedEngine(Script(hang_after=1))
    asked = pb.GenerationRequest(text="x", max_tokens=5, num_samples=2)
    with keys_for(file, narrow={"max_concurrent": 3}) as metadata:
        async with serving(engine, api_keys_file=str(file)) as target:
            first = target.stub.GenerateAll(asked, metadata=metadata["narrow"])
            await until(lambda: engine.running == 1, "the first runs")
            for samples, retried in ((2, True), (4, False)):
                asked.num_samples = samples
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await target.stub.GenerateAll(asked, metadata=metadata["narrow"])
                assert details_of(caught.value)[ErrorInfo].reason == "QUOTA_EXCEEDED"
                assert (RetryInfo in details_of(caught.value)) == retried
            first.cancel()


async def test_the_priority_of_a_key_decides_who_is_next(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    engine = ScriptedEngine(Script(token_delay=0.02))
    finished: list[str] = []
    with keys_for(file, high={"priority": 1}, low={}) as metadata:
        async with serving(engine, api_keys_file=str(file), max_concurrent=1) as target:
            first = target.stub.GenerateAll(pb.GenerationRequest(text="x", max_tokens=20), metadata=metadata["low"])
            await until(lambda: engine.running == 1, "the server is full")

            async def call(name: str) -> None:
                await target.stub.GenerateAll(pb.GenerationRequest(text="x", max_tokens=1), metadata=metadata[name])
                finished.append(name)

            async def waiting(number: int) -> bool:
                stats = await target.stub.GetStats(pb.GetStatsRequest(), metadata=metadata["low"])
                return bool(stats.queued == number)

            calls = []
            for number, name in enumerate(("low", "low", "high"), 1):
                calls.append(asyncio.ensure_future(call(name)))
                await until(lambda number=number: waiting(number), "it waits")  # type: ignore[misc]
            await asyncio.gather(first, *calls)
    assert finished == ["high", "low", "low"]


async def test_the_log_names_the_caller_of_a_call_that_was_refused(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    with keys_for(file, small={"max_concurrent": 1}) as metadata:
        async with serving(ScriptedEngine(), api_keys_file=str(file)) as target:
            with capture_logs(processors=[structlog.contextvars.merge_contextvars]) as logs:
                call = target.stub.GenerateAll(
                    pb.GenerationRequest(text="x", max_tokens=1, num_samples=2), metadata=metadata["small"]
                )
                assert await call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
                await target.stub.GenerateAll(pb.GenerationRequest(text="x", max_tokens=1), metadata=metadata["small"])
    (refused,) = [line for line in logs if line["event"] == "call refused"]
    assert (refused["caller"], refused["cause"]) == ("small", "max_concurrent 1")
