"""Fewer messages for a reader that is behind: what piled up while the last message was written goes out as one.

A message costs far more than the text in it, so this is what carries the load when there is much; a reader that keeps up
gets every delta on its own and without delay.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator
from typing import TypeVar

from flywheel_proto.v1 import generation_pb2 as pb

from flywheel_server.engines.base import TextDelta
from flywheel_server.messages import GenerationResponseSample
from flywheel_server.translation import delta_to_proto, last_delta_to_proto

T = TypeVar("T")


async def in_piles(events: AsyncIterator[T]) -> AsyncGenerator[list[T], None]:
    """Yields all events that have come since it yielded last, at least one; raises what `events` raises after them."""
    pile: list[T] = []
    more = asyncio.Event()

    async def collect() -> None:
        async for event in events:
            pile.append(event)
            more.set()

    collecting = asyncio.create_task(collect())
    collecting.add_done_callback(lambda _: more.set())
    try:
        while pile or not collecting.done():
            await more.wait()
            more.clear()
            if pile:
                taken = pile.copy()
                pile.clear()
                yield taken
        await collecting
    finally:
        collecting.cancel()
        await asyncio.gather(collecting, return_exceptions=True)


class DeltaMerger:
    """Makes the messages of a call from its events: each text once, and of one pile one message for each sample."""

    def __init__(self) -> None:
        self._sent: dict[int, int] = {}

    def merge(self, pile: Iterable[TextDelta | GenerationResponseSample]) -> Iterator[pb.GenerationDelta]:
        """Yields the messages for the events that have piled up, the sample whose event came first before the others."""
        merged: dict[int, TextDelta | GenerationResponseSample] = {}
        for event in pile:
            before = merged.get(event.index)
            if isinstance(event, TextDelta) and before is not None:
                merged[event.index] = TextDelta(event.index, before.text + event.text, event.generated_tokens)
            else:
                merged[event.index] = event
        for index, event in merged.items():
            sent = self._sent.get(index, 0)
            if isinstance(event, TextDelta):
                self._sent[index] = sent + len(event.text)
                yield delta_to_proto(event)
            else:
                yield last_delta_to_proto(event, event.text[sent:])
