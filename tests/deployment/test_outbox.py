"""What a container sends of the events of a call: each token once, in batches that Modal takes."""

import pickle
from typing import Any

from flywheel_server.deployment.outbox import Outbox, Sender
from flywheel_server.engines.base import Event, TextDelta
from flywheel_server.messages import GenerationResponseSample, LikelyToken, Token

MAX_ITEM_BYTES = 2**20
"""Modal's limit for an item of a queue."""

LIKELIEST = tuple(LikelyToken(number, b"\xf0\x9f\xa6", -0.123456789) for number in range(20))


async def sent(*events: Event) -> list[Event]:
    """Returns the events that are sent, and checks the size of each batch."""
    queue: Any = None
    sender = Sender(Outbox(queue, "partition", "container"), "call")
    for event in events:
        sender.emit(event)
    batches = sender.take()
    assert all(len(pickle.dumps(batch.pack())) < MAX_ITEM_BYTES for batch in batches)
    return [event for batch in batches for event in batch.events]


def tokens(count: int) -> tuple[Token, ...]:
    return tuple(Token(number, b"ab", -1.0, LIKELIEST) for number in range(count))


async def test_many_tokens_are_sent_once_and_in_several_batches() -> None:
    made = tokens(3000)
    sample = GenerationResponseSample(text="", generated_tokens=3000, finished=1.0, finish_reason="length", tokens=made)
    *deltas, last = await sent(*(TextDelta(0, "ab", token.id + 1, [token]) for token in made[:-1]), sample)
    assert len(deltas) > 1
    assert [token for delta in deltas if isinstance(delta, TextDelta) for token in delta.tokens] == [*made[:-1]]
    assert isinstance(last, GenerationResponseSample)
    assert last.tokens == made[-1:]


async def test_deltas_of_a_sample_are_merged() -> None:
    events = await sent(TextDelta(0, "a", 1), TextDelta(1, "x", 1), TextDelta(0, "b", 2), TextDelta(1, "y", 5, tokens(1)))
    assert events == [TextDelta(0, "ab", 2), TextDelta(1, "xy", 5, tokens(1))]
