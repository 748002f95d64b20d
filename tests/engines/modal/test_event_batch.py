"""Events come through the queue as they went in, and nothing else does."""

from typing import Any

import pytest
from flywheel_server.engines.base import EngineFailedError, Event, Started, TextDelta
from flywheel_server.engines.modal.event_batch import EventBatch
from flywheel_server.messages import GenerationResponseSample, LikelyToken, Token

SAMPLE = GenerationResponseSample(
    text="é 🦙", generated_tokens=3, finished=1.5, finish_reason="stop", index=1, prompt_tokens=7, stop_sequence="."
)
TOKEN = Token(5, b"\xf0\x9f", -0.5, (LikelyToken(7, b"\xff", -float("inf")),))
EVENTS: list[Event] = [
    Started(),
    TextDelta(0, "é", 1),
    TextDelta(1, " ", 2, (TOKEN, TOKEN)),
    SAMPLE,
    SAMPLE.model_copy(update={"seed": 7, "tokens": (TOKEN,)}),
]


def plain(data: Any) -> bool:
    match data:
        case list():
            return all(map(plain, data))
        case dict():
            return all(isinstance(key, str) and plain(value) for key, value in data.items())
        case _:
            return type(data) in {str, int, float, bool}


def test_there_and_back() -> None:
    for batch in (
        EventBatch("call-1", "attempt-1", 3, EVENTS),
        EventBatch("call-1", "attempt-1", 3, EVENTS, "container-1"),
        EventBatch("call-1", "attempt-1", 4, [], "container-1", ended=True),
        EventBatch.heartbeat("container-1"),
        EventBatch.heartbeat("container-1", leaving=True),
    ):
        assert plain(batch.pack())
        assert EventBatch.unpack(batch.pack()) == batch


def batch(*events: Any, **fields: Any) -> dict[str, Any]:
    return {"call": "call-1", "attempt": "attempt-1", "number": 0, "events": list(events), **fields}


@pytest.mark.parametrize(
    "data",
    [
        None,
        "SECRET",
        batch(number=-1),
        batch(call=1),
        batch(None),
        batch({"event": "ended"}),
        batch({"event": "delta", "index": 0, "text": b"SECRET", "generated_tokens": 1}),
        batch({"event": "delta", "index": "0", "text": "SECRET", "generated_tokens": 1}),
        batch({"event": "delta", "index": -1, "text": "SECRET", "generated_tokens": 1}),
        batch({"event": "delta", "index": 0, "text": "x", "generated_tokens": 1, "tokens": [{"id": 1, "text": "SECRET!"}]}),
        batch({"event": "sample", "sample": {"text": "SECRET"}}),
    ],
)
def test_anything_else_is_refused_without_its_text(data: Any) -> None:
    with pytest.raises(EngineFailedError) as caught:
        EventBatch.unpack(data)
    assert "SECRET" not in str(caught.value)
    assert caught.value.__context__ is None or caught.value.__suppress_context__


def test_without_tokens_a_delta_has_no_place_for_them() -> None:
    (packed,) = EventBatch("c", "a", 0, [TextDelta(0, "x", 1)]).pack()["events"]
    assert packed == {"event": "delta", "index": 0, "text": "x", "generated_tokens": 1}
