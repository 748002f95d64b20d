"""The text of prompts and samples in spans: always JSON, within the limit, and with what is missing from it."""

import json
from collections.abc import Sequence
from typing import Any

import pytest
from flywheel_proto.v1 import generation_pb2 as pb
from flywheel_server.engines.scripted import Script, ScriptedEngine
from flywheel_server.telemetry.trace_texts import MAX_TEXT_CHARACTERS, text_attributes
from hypothesis import given
from hypothesis import strategies as st

from tests.serving import serving
from tests.telemetry.otlp_receiver import Receiver, attributes_of

pytestmark = pytest.mark.usefixtures("spans_soon")

ECHO = Script(plays_prompt=True, bytes_per_token=1000)
TEXTS = {
    "quotes": 10_000 * '"',
    "newlines": 12_000 * "\n",
    "control characters": 5_000 * "\x01\x1b",
    "backslashes": 9_000 * "\\",
    "emoji": 17_000 * "🦙",
    "joined emoji": 5_000 * "👩‍👩‍👧",
    "plain": 20_000 * "x",
}
SHORT = [pb.Message(role="user" if number % 2 == 0 else "assistant", content=f"message {number}") for number in range(255)]


def contents_of(messages: str) -> list[str]:
    return [message["parts"][0]["content"] for message in json.loads(messages)]


async def attributes_after(receiver: Receiver, request: pb.GenerationRequest) -> dict[str, Any]:
    async with serving(ScriptedEngine(ECHO), otlp_endpoint=receiver.endpoint, trace_prompts=True) as target:
        await target.stub.GenerateAll(request)
        return attributes_of(await receiver.span("GenerateAll"))


def check(attributes: dict[str, Any], direction: str, text: str, limit: int) -> None:
    messages = attributes[f"gen_ai.{direction}.messages"]
    (content,) = contents_of(messages)
    assert text.startswith(content)
    assert limit - 12 <= len(messages) <= limit, "as much as there is room for: an escaped character has up to 6 characters"
    assert attributes[f"flywheel.{direction}.omitted_characters"] == len(text) - len(content)


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
async def test_a_long_prompt_and_a_long_sample_are_cut_within_valid_json(text: str, receiver: Receiver) -> None:
    request = pb.GenerationRequest(text=text, max_tokens=-(-len(text.encode()) // 1000))
    attributes = await attributes_after(receiver, request)
    for direction in ("input", "output"):
        check(attributes, direction, text, MAX_TEXT_CHARACTERS)


async def test_messages_that_do_not_fit_are_left_out(receiver: Receiver) -> None:
    attributes = await attributes_after(receiver, pb.GenerationRequest(messages=SHORT, max_tokens=1))
    kept = contents_of(attributes["gen_ai.input.messages"])
    missing = "".join(message.content for message in SHORT).removeprefix("".join(kept))
    assert 100 < len(kept) < len(SHORT)
    assert attributes["flywheel.input.omitted_characters"] == len(missing)


async def test_texts_that_fit_are_whole(receiver: Receiver) -> None:
    attributes = await attributes_after(receiver, pb.GenerationRequest(text='"', max_tokens=1, num_samples=2))
    assert contents_of(attributes["gen_ai.input.messages"]) == ['"']
    assert contents_of(attributes["gen_ai.output.messages"]) == ['"', '"']
    assert not [name for name in attributes if name.endswith("omitted_characters")]


@pytest.mark.parametrize("variable", ["OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT", "OTEL_SPAN_ATTRIBUTE_VALUE_LENGTH_LIMIT"])
@pytest.mark.parametrize("limit", ["", "30000", "500", "50", "0"])
async def test_the_limit_of_opentelemetry_counts_too(
    variable: str, limit: str, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, limit)
    text = 10_000 * '"'
    attributes = await attributes_after(receiver, pb.GenerationRequest(text=text, max_tokens=10))
    if limit in {"50", "0"}:
        assert "gen_ai.input.messages" not in attributes
        assert attributes["flywheel.input.omitted_characters"] == len(text)
    else:
        check(attributes, "input", text, 500 if limit == "500" else MAX_TEXT_CHARACTERS)


async def test_a_prompt_of_token_ids_has_no_text(receiver: Receiver) -> None:
    async with serving(ScriptedEngine(), otlp_endpoint=receiver.endpoint, trace_prompts=True) as target:
        await target.stub.GenerateAll(pb.GenerationRequest(prompt_token_ids=[1, 2], max_tokens=1))
        attributes = attributes_of(await receiver.span("GenerateAll"))
    assert not [name for name in attributes if ".input." in name]
    assert contents_of(attributes["gen_ai.output.messages"])


any_text = st.text(st.characters(exclude_categories=()), max_size=80)
"""Any characters, surrogates too."""


@given(st.lists(st.tuples(st.sampled_from(["user", "assistant"]), any_text), max_size=8), st.integers(0, 700))
def test_any_texts_are_valid_json_within_any_limit(texts: Sequence[tuple[str, str]], limit: int) -> None:
    attributes = text_attributes("input", texts, limit)
    messages = str(attributes.get("gen_ai.input.messages", "[]"))
    messages.encode()  # as OTLP needs it
    kept = "".join(contents_of(messages))
    assert "gen_ai.input.messages" not in attributes or len(messages) <= limit
    whole = "".join(text for _, text in texts)
    assert whole.encode("utf-8", "replace").decode().startswith(kept)
    assert attributes.get("flywheel.input.omitted_characters", 0) == len(whole) - len(kept)
