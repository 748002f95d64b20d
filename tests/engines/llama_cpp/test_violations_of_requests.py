"""What only the engine can find wrong with a request comes all at once, along with what is wrong with it anyway."""

import json
from collections.abc import AsyncIterator
from itertools import combinations
from typing import Any, Final

import grpc
import grpc.aio
import pytest
from flywheel_proto.v1 import generation_pb2 as pb
from flywheel_server.engines.llama_cpp.default_model import default_model
from flywheel_server.engines.llama_cpp.engine import EmbeddedEngine
from google.rpc.error_details_pb2 import BadRequest

from tests.server.test_errors import details_of
from tests.serving import Target, serving
from tests.thorough import further

NO_ROLE: Final = [pb.Message(role="im_start"), pb.Message(role="user"), pb.Message(role="im_end")]
SCHEMA: Final = json.dumps({"not": {}, "properties": {"a": {"if": 1, "pattern": "["}, "b": 7}, "uniqueItems": True})
WRONG: Final[dict[str, tuple[Any, list[str]]]] = {
    "max_tokens": (0, ["max_tokens"]),
    "stop": (["", "a", ""], ["stop[0]", "stop[2]"]),
    "prompt_token_ids": ([999_999, 1, 999_998], ["prompt_token_ids[0]", "prompt_token_ids[2]"]),
    "messages": (NO_ROLE, ["messages[0].role", "messages[2].role"]),
    "logit_bias": ({999_999: 1.0, 5: 1.0, 49_152: 1.0}, ["logit_bias[49152]", "logit_bias[999999]"]),
    "json_schema": (
        SCHEMA,
        ["json_schema /not", "json_schema /properties/a/if", "json_schema /properties/b", "json_schema /uniqueItems"],
    ),
    "regex": ("(", ["regex"]),
    "choices": (pb.Choices(texts=["", "a", ""]), ["choices[0]", "choices[2]"]),
}
"""Wrong values of fields, and the paths of what is wrong with each."""
TOGETHER: Final = [
    pair
    for pair in combinations(WRONG, 2)
    if not {*pair} <= {"json_schema", "regex", "choices"} and not {*pair} <= {"prompt_token_ids", "messages"}
]
TRIED: Final = [
    ("max_tokens", "json_schema"),
    ("messages", "json_schema"),
    ("prompt_token_ids", "logit_bias"),
    ("stop", "regex"),
]


@pytest.fixture(scope="module")
async def chat() -> AsyncIterator[Target]:
    engine = EmbeddedEngine(
        default_model(), context_tokens=512, slots=1, threads=1, batch_tokens=64, prompt_format="chat", exact_seeds=False
    )
    async with serving(engine) as target:
        yield target


async def paths(target: Target, *names: str) -> list[str]:
    """Returns the paths with which a request with these wrong fields is refused; of a schema, with the JSON pointer."""
    fields: dict[str, Any] = {"max_tokens": 3, **{name: WRONG[name][0] for name in names}}
    if not {"prompt_token_ids", "messages"} & {*names}:
        fields["text"] = "Hello"
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await target.stub.GenerateAll(pb.GenerationRequest(**fields))
    violations = details_of(caught.value)[BadRequest].field_violations
    return [
        f"{each.field} {each.description.partition(':')[0]}" if each.description.startswith("/") else each.field
        for each in violations
    ]


def expected(*names: str) -> list[str]:
    return sorted(path for name in names for path in WRONG[name][1])


@pytest.mark.parametrize("pair", [*TRIED, *further(TOGETHER, but=TRIED)], ids="-".join)
async def test_what_is_wrong_with_two_fields_comes_at_once(chat: Target, pair: tuple[str, str]) -> None:
    assert sorted(await paths(chat, *pair)) == expected(*pair)


@pytest.mark.parametrize("prompt", ["messages", "prompt_token_ids"])
@pytest.mark.parametrize("constraint", ["json_schema", "regex", "choices"])
async def test_what_is_wrong_with_all_fields_comes_at_once(chat: Target, prompt: str, constraint: str) -> None:
    names = ("max_tokens", "stop", "logit_bias", prompt, constraint)
    assert sorted(await paths(chat, *names)) == expected(*names)


async def test_a_wrong_field_comes_before_a_prompt_that_is_too_long(chat: Target) -> None:
    request = pb.GenerationRequest(text="llama " * 50_000, max_tokens=512, logit_bias={999_999: 1.0}, regex="(")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await chat.stub.GenerateAll(request)
    assert {each.field for each in details_of(caught.value)[BadRequest].field_violations} == {"logit_bias[999999]", "regex"}
