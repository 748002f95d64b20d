"""Tokens with their probabilities: they are those of the text, and deltas carry each of them once."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
from flywheel_proto.v1 import generation_pb2 as pb
from flywheel_server.engines.llama_cpp.engine import EmbeddedEngine

from tests.engines.llama_cpp.conftest import COUNTING
from tests.serving import Target
from tests.thorough import further

NOISE = 0.1
"""How much the logits may differ with what else is in the context."""


async def sample_of(target: Target, text: str = COUNTING, **fields: Any) -> pb.GenerationResponseSample:
    request = pb.GenerationRequest(text=text, **{"max_tokens": 8, "temperature": 0.0, "logprobs": 3, **fields})
    response: pb.GenerationResponse = await target.stub.GenerateAll(request)
    return response.responses[0]


def joined(tokens: Sequence[pb.Token]) -> str:
    return b"".join(token.text for token in tokens).decode()


async def test_the_tokens_are_those_of_the_tokenizer(embedded: EmbeddedEngine, embedded_target: Target) -> None:
    sample = await sample_of(embedded_target)
    assert joined(sample.tokens) == sample.text
    assert [token.id for token in sample.tokens] == embedded._llama.tokenize(sample.text)
    assert not (await sample_of(embedded_target, logprobs=0)).tokens


@pytest.mark.parametrize("logprobs", [20, *further([1])])
async def test_the_likeliest_tokens_are_in_order_and_have_what_greedy_takes(embedded_target: Target, logprobs: int) -> None:
    sample = await sample_of(embedded_target, logprobs=logprobs)
    for token in sample.tokens:
        probabilities = [math.exp(likely.logprob) for likely in token.likeliest]
        assert len(probabilities) == len({likely.id for likely in token.likeliest}) == logprobs
        assert probabilities == sorted(probabilities, reverse=True)
        assert sum(probabilities) <= 1 + 1e-5
        first = token.likeliest[0]
        assert (first.id, first.text, first.logprob) == (token.id, token.text, token.logprob)


async def test_the_probabilities_are_those_of_the_model_before_sampling(embedded_target: Target) -> None:
    greedy = await sample_of(embedded_target, logprobs=20)
    before = COUNTING
    for token in greedy.tokens[:2]:
        settings: dict[str, Any] = {"temperature": 1e6, "top_k": 0, "presence_penalty": 2.0, "repetition_penalty": 9.0}
        (other,) = (await sample_of(embedded_target, before, max_tokens=1, logprobs=20, **settings)).tokens
        for one, two in zip(token.likeliest[:3], other.likeliest, strict=False):
            assert one.id == two.id
            assert one.logprob == pytest.approx(two.logprob, abs=NOISE)
        before += token.text.decode()


async def test_a_character_of_several_tokens_comes_as_one_token(embedded: EmbeddedEngine, embedded_target: Target) -> None:
    ids = embedded._llama.tokenize("🦙")
    sample = await sample_of(embedded_target, "🦙" * 12, max_tokens=8)
    assert [(token.id, token.text.decode()) for token in sample.tokens] == [(ids[-1], "🦙")] * 2
    assert sample.generated_tokens == 8, "two tokens are the beginning of a third character"


async def test_the_token_that_ends_a_sample_is_the_last(embedded: EmbeddedEngine, embedded_target: Target) -> None:
    prompt = "<|im_start|>user\nSay only: Hi<|im_end|>\n<|im_start|>assistant\n"
    sample = await sample_of(embedded_target, prompt, max_tokens=60)
    (end,) = embedded._llama.tokenize("<|im_end|>")
    assert (sample.tokens[-1].id, sample.tokens[-1].text) == (end, b"")
    assert joined(sample.tokens) == sample.text
    assert len(sample.tokens) == sample.generated_tokens
    (comma,) = embedded._llama.tokenize(",")
    sample = await sample_of(embedded_target, eos_token_ids=[comma])
    assert (sample.text, joined(sample.tokens), sample.finish_reason) == (" 14", " 14,", "stop")


async def test_tokens_that_are_no_utf8_come_with_their_replacement(embedded: EmbeddedEngine, embedded_target: Target) -> None:
    by_bytes = {text: number for number, text in enumerate(embedded._tokenizer._vocabulary.token_bytes)}
    bias = {by_bytes[b"\xa2"]: 100.0, by_bytes[b"\xab"]: 100.0, by_bytes[b"a"]: 100.0}
    fields: dict[str, Any] = {"max_tokens": 24, "temperature": 2.0, "top_k": 3, "seed": 1, "logprobs": 1, "logit_bias": bias}
    request = pb.GenerationRequest(text=COUNTING, stop=["a<never>"], **fields)
    (sample,) = (await embedded_target.stub.GenerateAll(request)).responses
    assert "\N{REPLACEMENT CHARACTER}" in sample.text
    assert "a" in sample.text
    assert b"".join(token.text for token in sample.tokens).decode(errors="replace") == sample.text
    text, tokens = "", b""
    async for delta in embedded_target.stub.GenerateDeltas(request):
        text += delta.text
        tokens += b"".join(token.text for token in delta.tokens)
        assert tokens.decode(errors="replace") == text, "a token comes with its text"


CASES = [(COUNTING, []), (COUNTING, ["6,"]), (COUNTING, ["<never>", ", 1<never>"]), ("🦙" * 12, []), ("🦙" * 12, ["🦙🦙"])]


@pytest.mark.parametrize("case", [CASES[1], *further(CASES, but=[CASES[1]])])
async def test_deltas_carry_the_tokens_of_their_text(embedded_target: Target, case: tuple[str, list[str]]) -> None:
    prompt, stop = case
    request = pb.GenerationRequest(text=prompt, max_tokens=9, temperature=0.0, logprobs=2, seed=1, stop=stop)
    (sample,) = (await embedded_target.stub.GenerateAll(request)).responses
    deltas = [delta async for delta in embedded_target.stub.GenerateDeltas(request)]
    assert [token for delta in deltas for token in delta.tokens] == [*sample.tokens], "in order, and none twice"
    text = tokens = b""
    for delta in deltas[:-1]:
        text += delta.text.encode()
        tokens += b"".join(token.text for token in delta.tokens)
        assert text.startswith(tokens), "no token comes before its text"
    assert joined(sample.tokens).startswith(sample.text)
    assert sample.stop_sequence in joined(sample.tokens)
