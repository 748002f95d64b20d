"""Events come through the queue as they went in, and nothing else does."""

from typing import Any

import pytest
from flywheel_server.engines.base import EngineFailedError, Event, Started, TextDelta
from flywheel_server.engines.remote_events import pack, unpack
from flywheel_server.messages import GenerationResponseSample

SAMPLE = GenerationResponseSample(
    text="é 🦙", generated_tokens=3, finished=1.5, finish_reason="stop", index=1, prompt_tokens=7, stop_sequence="."
)
EVENTS: list[Event] = [Started(), TextDelta(0, "é", 1), TextDelta(1, " ", 2), SAMPLE]


def plain(data: Any) -> bool:
    match data:
        case list():
            return all(map(plain, data))
        case dict():
            return all(isinstance(key, str) and plain(value) for key, value in data.items())
        case _:
            return type(data) in {str, int, float}


def test_there_and_back() -> None:
    packed = pack(EVENTS)
    assert plain(packed)
    assert unpack(packed) == EVENTS


@pytest.mark.parametrize(
    "data",
    [
        None,
        "started",
        [None],
        [{"event": "ended"}],
        [{"event": "delta", "index": 0, "text": b"x", "generated_tokens": 1}],
        [{"event": "delta", "index": "0", "text": "SECRET", "generated_tokens": 1}],
        [{"event": "delta", "index": -1, "text": "SECRET", "generated_tokens": 1}],
        [{"event": "sample", "sample": {"text": "SECRET"}}],
    ],
)
def test_anything_else_is_refused_without_its_text(data: Any) -> None:
    with pytest.raises(EngineFailedError) as caught:
        unpack(data)
    assert "SECRET" not in str(caught.value)
    assert caught.value.__context__ is None or caught.value.__suppress_context__
