"""Scripts that the conformance suite does not play."""

import math
from typing import Any

import grpc
import pytest
from flywheel_proto.v1 import generation_pb2 as pb
from flywheel_server.engines.scripted import Script, ScriptedEngine

from tests.server.test_errors import METHODS
from tests.serving import Target, serving


@pytest.mark.parametrize("how", [{"fail_after": 1}, {"fail_in_queue": True}], ids=str)
async def test_it_fails_only_on_the_prompts_that_the_script_names(how: dict[str, int]) -> None:
    async with serving(ScriptedEngine(Script(fail_on="fail", **how))) as target:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await target.stub.GenerateAll(pb.GenerationRequest(text="Please fail.", max_tokens=2))
        assert raised.value.code() is grpc.StatusCode.INTERNAL
        response = await target.stub.GenerateAll(pb.GenerationRequest(text="Please succeed.", max_tokens=2))
        assert response.responses[0].generated_tokens == 2


async def test_it_plays_the_prompt_of_each_caller() -> None:
    async with serving(ScriptedEngine(Script(plays_prompt=True, bytes_per_token=3))) as target:
        response = await target.stub.GenerateAll(pb.GenerationRequest(text="ab🦙cd", max_tokens=5))
        assert response.responses[0].text == "ab🦙cdab🦙"


async def samples_of(target: Target, **fields: Any) -> list[pb.GenerationResponseSample]:
    request = pb.GenerationRequest(**{"text": "Hello!", "max_tokens": 4, **fields})
    return [*(await target.stub.GenerateAll(request)).responses]


async def test_seeds_choose_among_the_texts() -> None:
    async with serving(ScriptedEngine(Script(texts=("one ", "two ", "three ")))) as target:
        samples = await samples_of(target, seed=4, num_samples=3)
        assert [(sample.text.split()[0], sample.seed) for sample in samples] == [("two", 4), ("three", 5), ("one", 6)]
        (last, first) = await samples_of(target, seed=2**31 - 1, num_samples=2)
        assert (last.seed, first.seed, first.text) == (2**31 - 1, 0, "one one one one ")
        (drawn,) = await samples_of(target)
        (again,) = await samples_of(target, seed=drawn.seed)
        assert (again.text, again.seed) == (drawn.text, drawn.seed)


async def test_a_choice_is_played_once() -> None:
    async with serving(ScriptedEngine(Script(bytes_per_token=2))) as target:
        choices = pb.Choices(texts=["yes", "no"])
        yes, no = await samples_of(target, choices=choices, seed=0, num_samples=2)
        assert (yes.text, yes.finish_reason, yes.generated_tokens) == ("yes", "stop", 3)
        assert (no.text, no.finish_reason, no.generated_tokens) == ("no", "stop", 2)
        (cut,) = await samples_of(target, choices=choices, seed=0, max_tokens=1)
        assert (cut.text, cut.finish_reason) == ("ye", "length")


async def test_each_token_has_a_probability() -> None:
    async with serving(ScriptedEngine(Script(text="é🦙!", bytes_per_token=2))) as target:
        (sample,) = await samples_of(target, logprobs=3, eos_token_ids=[3], max_tokens=9)
        assert (sample.text, sample.finish_reason) == ("é🦙", "stop")
        assert [token.id for token in sample.tokens] == [0, 1, 2, 3]
        assert b"".join(token.text for token in sample.tokens).decode() == "é🦙!"
        for token in sample.tokens:
            first = token.likeliest[0]
            assert (first.id, first.text, first.logprob) == (token.id, token.text, token.logprob)
            assert len({likely.id for likely in token.likeliest}) == 3
            assert sum(math.exp(likely.logprob) for likely in token.likeliest) <= 1


@pytest.mark.parametrize("method", METHODS)
async def test_a_time_limit_ends_a_sample_with_the_text_so_far(method: str) -> None:
    script = Script(text="word", token_delay=0.01)
    async with serving(ScriptedEngine(script)) as target:
        request = pb.GenerationRequest(text="x", max_tokens=1000, time_limit=0.1, stop=["word" * 60])
        if method == "GenerateAll":
            answers = [*(await target.stub.GenerateAll(request)).responses]
        else:
            answers = [answer async for answer in getattr(target.stub, method)(request)]
        assert answers[-1].finish_reason == "time"
        assert 0 < answers[-1].generated_tokens < 100
        text = "".join(answer.text for answer in answers)
        assert text == "word" * answers[-1].generated_tokens, "with the text that was held back"


async def test_a_time_limit_counts_from_the_start_of_the_prompt() -> None:
    async with serving(ScriptedEngine(Script(prompt_delay=600))) as target:
        (sample,) = await samples_of(target, time_limit=0.01)
        assert (sample.text, sample.finish_reason, sample.generated_tokens) == ("", "time", 0)


async def test_prompts_of_every_kind_are_counted() -> None:
    async with serving(ScriptedEngine(Script(bytes_per_token=3))) as target:
        messages = [pb.Message(role="system", content="abc"), pb.Message(role="user", content="defg")]
        (sample,) = await samples_of(target, text="", messages=messages)
        tokenized = await target.stub.Tokenize(pb.TokenizeRequest(messages=messages))
        assert sample.prompt_tokens == tokenized.prompt_tokens == 3
        assert [(token.id, token.text) for token in tokenized.tokens] == [(0, b"abc"), (1, b"def"), (2, b"g")]
        (sample,) = await samples_of(target, text="", prompt_token_ids=[5, 6, 7, 8])
        assert sample.prompt_tokens == 4
