"""However events pile up before a reader, what it gets is the same text."""

import random
from typing import Any

from flywheel_server.delivery import DeltaBuffer
from flywheel_server.engines.base import TextDelta
from flywheel_server.engines.samples import GrowingSample
from hypothesis import given
from hypothesis import strategies as st

PIECES = st.lists(st.text(alphabet="ab🦙é", max_size=4), max_size=6)


@given(
    pieces=st.lists(PIECES, min_size=1, max_size=4),
    stop=st.lists(st.text(alphabet="ab🦙", min_size=1, max_size=3), max_size=2),
    order=st.randoms(use_true_random=False),
    takes=st.lists(st.booleans(), min_size=40, max_size=40),
)
def test_the_deltas_of_a_sample_are_its_text(
    pieces: list[list[str]], stop: list[str], order: random.Random, takes: list[bool]
) -> None:
    turns = [index for index, some in enumerate(pieces) for _ in range(len(some) + 1)]
    order.shuffle(turns)
    buffer = DeltaBuffer()
    finished: dict[int, str] = {}

    def emit(event: Any) -> None:
        buffer.add(event)
        if not isinstance(event, TextDelta):
            finished[event.index] = event.text

    samples = [GrowingSample(index, 1, stop, emit) for index in range(len(pieces))]
    received = [part.message() for part in buffer.take()]
    generated = [0] * len(pieces)
    for turn, index in enumerate(turns):
        if samples[index].finished:
            continue
        number = generated[index]
        generated[index] += 1
        if number < len(pieces[index]):
            samples[index].add(pieces[index][number], number + 1)
        else:
            samples[index].end("length", number + 1)
        if takes[turn]:
            size = buffer.size
            pile = [part.message() for part in buffer.take()]
            assert size == sum(len(delta.text.encode()) for delta in pile)
            assert len({delta.index for delta in pile}) == len(pile), "one message for each sample"
            received += pile
    received += [part.message() for part in buffer.take()]
    assert buffer.size == 0
    for index in range(len(pieces)):
        deltas = [delta for delta in received if delta.index == index]
        assert "".join(delta.text for delta in deltas) == finished[index]
        assert [bool(delta.finish_reason) for delta in deltas] == [False] * (len(deltas) - 1) + [True]
        assert all(delta.text for delta in deltas[:-1])
        counts = [delta.generated_tokens for delta in deltas]
        assert counts == sorted(counts)
