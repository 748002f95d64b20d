"""How tokens with their probabilities, seeds, and the length of the prompt become messages, whether or not they are merged."""

import pytest
from flywheel_proto.v1 import generation_pb2 as pb
from flywheel_server.delivery import BYTES_PER_LOGPROB, DeltaBuffer, ReaderPolicy, SampleBuffer
from flywheel_server.engines.base import TextDelta
from flywheel_server.errors import SlowReaderError
from flywheel_server.messages import GenerationResponseSample, LikelyToken, Token
from flywheel_server.translation import sample_to_proto

from tests.cpu_time import check_cpu_time
from tests.server.test_delivery import Reader, Source, delivered, settled

TEXT = "abcdefghij"
TOKENS = tuple(Token(number, letter.encode(), -0.5, (LikelyToken(9, b"x", -1.0),)) for number, letter in enumerate(TEXT))


def delta(number: int, index: int = 0) -> TextDelta:
    """Returns the delta with this token."""
    return TextDelta(index, TEXT[number], number + 1, (TOKENS[number],))


def finished(tokens: int, index: int = 0) -> GenerationResponseSample:
    """Returns the sample of so many tokens, and of one that ended it."""
    return GenerationResponseSample(
        text=TEXT[:tokens],
        generated_tokens=tokens + 1,
        finished=1.0,
        finish_reason="stop",
        index=index,
        prompt_tokens=7,
        seed=5,
        tokens=TOKENS[: tokens + 1],
    )


def ids(message: pb.GenerationDelta | pb.GenerationResponseSample) -> list[int]:
    return [token.id for token in message.tokens]


@pytest.mark.parametrize("taken_after", [{1, 2, 3, 4}, {2}, {1, 3}, set()])
def test_each_token_is_sent_once_however_deltas_are_merged(taken_after: set[int]) -> None:
    buffer = DeltaBuffer()
    buffer.prompt_tokens = 7
    messages: list[pb.GenerationDelta] = []
    for number in range(4):
        buffer.add(delta(number))
        if number + 1 in taken_after:
            messages.extend(buffer.take())
    buffer.add(finished(4))
    messages.extend(buffer.take())
    assert "".join(message.text for message in messages) == "abcd"
    assert [token for message in messages for token in ids(message)] == [0, 1, 2, 3, 4]
    assert all(bytes(token.text) in message.text.encode() for message in messages[:-1] for token in message.tokens)
    assert messages[0].tokens[0] == pb.Token(
        id=0, text=b"a", logprob=-0.5, likeliest=[pb.LikelyToken(id=9, text=b"x", logprob=-1.0)]
    )
    lengths = [message.prompt_tokens for message in messages]
    assert (lengths[0], lengths[-1]) == (7, 7)
    assert not any(lengths[1:-1])
    assert [message.seed for message in messages] == [0] * (len(messages) - 1) + [5]


def test_the_tokens_of_several_samples_are_told_apart() -> None:
    buffer = DeltaBuffer()
    for number in range(3):
        buffer.add(delta(number, index=0))
        buffer.add(delta(number + 3, index=1))
    buffer.add(finished(3))
    assert [(message.index, ids(message)) for message in buffer.take()] == [(0, [0, 1, 2, 3]), (1, [3, 4, 5])]


def test_a_sample_that_comes_whole_has_all_of_its_tokens() -> None:
    buffer = DeltaBuffer()
    buffer.prompt_tokens = 7
    buffer.add(finished(4))
    (message,) = buffer.take()
    assert (ids(message), message.seed, message.prompt_tokens) == ([0, 1, 2, 3, 4], 5, 7)


def test_each_sample_tells_the_length_of_the_prompt_in_its_first_delta() -> None:
    buffer = DeltaBuffer()
    buffer.prompt_tokens = 7
    buffer.add(delta(0, index=0))
    assert [message.prompt_tokens for message in buffer.take()] == [7]
    buffer.add(delta(1, index=0))
    buffer.add(delta(0, index=1))
    assert [(message.index, message.prompt_tokens) for message in buffer.take()] == [(0, 0), (1, 7)]


def test_tokens_count_as_text_that_waits() -> None:
    for buffer, text in ((DeltaBuffer(), "abcd"), (SampleBuffer(), "abcd")):
        buffer.add(finished(4))
        assert buffer.size == len(text) + 5 * 2 * (BYTES_PER_LOGPROB + 1)
        buffer.take()
        assert buffer.size == 0
    size = sample_to_proto(finished(9)).ByteSize()
    buffer = SampleBuffer()
    buffer.add(finished(9))
    assert 0.5 < buffer.size / size < 2, "about what the message has"


async def test_a_reader_that_is_behind_is_noticed_by_tokens_too() -> None:
    reader = Reader()
    source = Source(*(delta(number) for number in range(10)), finished(9))
    waiting = ReaderPolicy(max_bytes=100, when_full="wait", timeout=60)
    delivering = delivered(source, DeltaBuffer(), reader, waiting)
    await settled()
    assert source.taken < 10, "ten bytes of text alone would fit"
    reader.may_read(20)
    await delivering
    assert [token for message in reader.read for token in ids(message)] == [*range(10)]
    with pytest.raises(SlowReaderError):
        await delivered(Source(*(delta(number) for number in range(10))), DeltaBuffer(), Reader(), ReaderPolicy(100, "end", 60))


def test_many_tokens_are_merged_in_a_time_that_grows_with_their_number() -> None:
    """To copy all tokens for each delta takes more than a second."""

    def merge() -> None:
        buffer = DeltaBuffer()
        for number in range(20_000):
            buffer.add(TextDelta(0, "a", number, TOKENS[:1]))
        assert len(buffer.take()[0].tokens) == 20_000

    check_cpu_time(0.3, merge)
