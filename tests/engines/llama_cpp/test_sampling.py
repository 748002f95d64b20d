"""Parameters of sampling: each of them reaches the model."""

import math
from collections.abc import Iterable
from typing import Any

import grpc
import grpc.aio
import pytest
from flywheel_proto.v1 import generation_pb2 as pb
from flywheel_server.engines.llama_cpp.engine import EmbeddedEngine
from google.rpc.error_details_pb2 import BadRequest

from tests.engines.llama_cpp.conftest import COUNTING
from tests.server.test_errors import METHODS, details_of
from tests.serving import Target, drained
from tests.thorough import further

LLAMA = "<|im_start|>user\nTell me about llamas.<|im_end|>\n<|im_start|>assistant\n"


async def texts(target: Target, text: str = LLAMA, **fields: Any) -> list[str]:
    request = pb.GenerationRequest(text=text, **{"max_tokens": 8, "temperature": 0.0, **fields})
    return [sample.text for sample in (await target.stub.GenerateAll(request)).responses]


def is_varied(some: Iterable[str]) -> bool:
    return len({*some}) > 1


async def test_min_p_counts_from_the_likeliest_token_after_temperature(embedded_target: Target) -> None:
    only_the_likeliest = await texts(embedded_target, temperature=2.0, top_k=0, min_p=1.0)
    assert only_the_likeliest == await texts(embedded_target)
    # At a very high temperature, all tokens are about as likely as the likeliest one.
    assert is_varied(await texts(embedded_target, temperature=1e6, top_k=0, min_p=0.9, num_samples=3, max_tokens=3))


async def test_min_p_takes_no_token_from_top_p(embedded_target: Target) -> None:
    one = pb.GenerationRequest(text=LLAMA, max_tokens=1, logprobs=3)
    (known,) = (await embedded_target.stub.GenerateAll(one)).responses
    first, second, third = known.tokens[0].likeliest
    # With these biases, the three tokens have these probabilities, and all other tokens none. The first two make up top_p. If
    # min_p excluded the third token before that, the first one alone would make up top_p.
    for likely, share in ((first, 0.4), (second, 0.35), (third, 0.25)):
        one.logit_bias[likely.id] = 80 + math.log(share) - likely.logprob
    one.top_k, one.top_p, one.min_p, one.num_samples = 0, 0.5, 0.8, 16
    taken = {sample.tokens[0].id for sample in (await embedded_target.stub.GenerateAll(one)).responses}
    assert taken == {first.id, second.id}


async def test_a_repetition_penalty_makes_repetition_rarer(embedded: EmbeddedEngine, embedded_target: Target) -> None:
    async def distinct_tokens(penalty: float) -> int:
        (text,) = await texts(embedded_target, max_tokens=16, repetition_penalty=penalty)
        return len({*embedded._llama.tokenize(text)})

    assert await distinct_tokens(0.5) < await distinct_tokens(2.0)
    assert await texts(embedded_target, repetition_penalty=1.0) == await texts(embedded_target)


@pytest.mark.parametrize("penalty", [1e-45, *further([1e-38, 3e38])])
async def test_an_extreme_repetition_penalty_harms_nobody(embedded_target: Target, penalty: float) -> None:
    assert len(await texts(embedded_target, temperature=1.0, repetition_penalty=penalty, num_samples=2, max_tokens=3)) == 2
    assert (await texts(embedded_target, COUNTING))[0].startswith(" 14, 15")


async def test_a_logit_bias_chooses_and_excludes_tokens(embedded: EmbeddedEngine, embedded_target: Target) -> None:
    (music,) = embedded._llama.tokenize(" music")
    assert await texts(embedded_target, max_tokens=3, logit_bias={music: 100.0}, temperature=1.0) == [" music" * 3]
    (comma,) = embedded._llama.tokenize(",")
    assert "," in (await texts(embedded_target, COUNTING))[0]
    (without,) = await texts(embedded_target, COUNTING, logit_bias={comma: -100.0})
    assert "," not in without


@pytest.mark.parametrize("method", METHODS)
async def test_a_logit_bias_for_no_token_is_refused(embedded: EmbeddedEngine, embedded_target: Target, method: str) -> None:
    size = embedded._file.vocabulary_size
    generate = getattr(embedded_target.stub, method)
    await drained(generate(pb.GenerationRequest(text="x", max_tokens=1, logit_bias={size - 1: 1.0})))
    for token_id in (size, 2**31 - 1):
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await drained(generate(pb.GenerationRequest(text="x", max_tokens=1, logit_bias={1: 1.0, token_id: 1.0})))
        assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        (violation,) = details_of(raised.value)[BadRequest].field_violations
        assert violation.field == f"logit_bias[{token_id}]"
        assert f"0 to {size - 1}" in violation.description
