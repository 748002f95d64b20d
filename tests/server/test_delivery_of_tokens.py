"""How tokens with their probabilities, seeds, and the length of the prompt become messages, whether or not they are merged."""

import threading
from collections.abc import Sequence
from typing import Any

import pytest
from flywheel_proto.v1 import generation_pb2 as pb
from flywheel_server import service
from flywheel_server.delivery import BYTES_PER_LOGPROB, MAX_LOGPROBS_ON_LOOP, DeltaBuffer, Part, ReaderPolicy, SampleBuffer
from flywheel_server.engines.base import TextDelta
from flywheel_server.engines.scripted import ScriptedEngine
from flywheel_server.errors import SlowReaderError
from flywheel_server.messages import GenerationResponseSample, LikelyToken, Token
from flywheel_server.translation import response_to_proto, sample_to_proto

from tests.cpu_time import check_cpu_time
from tests.server.test_delivery import Reader, Source, delivered, settled
from tests.serving import serving

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
            messages.extend(part.message() for part in buffer.take())
    buffer.add(finished(4))
    messages.extend(part.message() for part in buffer.take())
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
    messages = [part.message() for part in buffer.take()]
    assert [(message.index, ids(message)) for message in messages] == [(0, [0, 1, 2, 3]), (1, [3, 4, 5])]


def test_a_sample_that_comes_whole_has_all_of_its_tokens() -> None:
    buffer = DeltaBuffer()
    buffer.prompt_tokens = 7
    buffer.add(finished(4))
    (part,) = buffer.take()
    message = part.message()
    assert (ids(message), message.seed, message.prompt_tokens) == ([0, 1, 2, 3, 4], 5, 7)


def test_each_sample_tells_the_length_of_the_prompt_in_its_first_delta() -> None:
    buffer = DeltaBuffer()
    buffer.prompt_tokens = 7
    buffer.add(delta(0, index=0))
    assert [part.message().prompt_tokens for part in buffer.take()] == [7]
    buffer.add(delta(1, index=0))
    buffer.add(delta(0, index=1))
    messages = [part.message() for part in buffer.take()]
    assert [(message.index, message.prompt_tokens) for message in messages] == [(0, 0), (1, 7)]


def test_tokens_count_as_text_that_waits() -> None:
    for buffer, text in ((DeltaBuffer(), "abcd"), (SampleBuffer(), "abcd")):
        buffer.add(finished(4))
        assert buffer.size == len(text) + 5 * 2 * BYTES_PER_LOGPROB
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


async def test_messages_with_many_probabilities_are_made_in_a_thread() -> None:
    """16,000 tokens with 20 probabilities each take 0.3 s, for which all other calls would wait on the event loop."""
    made_in: list[bool] = []

    class Recording(SampleBuffer):
        def take(self) -> Sequence[Any]:
            return [RecordingPart(part) for part in super().take()]

    class RecordingPart:
        def __init__(self, part: Part) -> None:
            self._part = part
            self.tokens = part.tokens

        def message(self) -> pb.GenerationResponseSample:
            made_in.append(threading.current_thread() is threading.main_thread())
            message: pb.GenerationResponseSample = self._part.message()
            return message

    few = finished(9)
    many = few.model_copy(update={"index": 1, "tokens": few.tokens * MAX_LOGPROBS_ON_LOOP})
    reader = Reader()
    reader.may_read(2)
    await delivered(Source(few, many), Recording(), reader, ReaderPolicy(2**20, "wait", 60))
    assert made_in == [True, False]
    assert [len(message.tokens) for message in reader.read] == [len(few.tokens), len(many.tokens)]


async def test_an_answer_with_many_probabilities_is_made_in_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    made_in: list[bool] = []

    def recorded(*arguments: Any) -> pb.GenerationResponse:
        made_in.append(threading.current_thread() is threading.main_thread())
        return response_to_proto(*arguments)

    monkeypatch.setattr(service, "response_to_proto", recorded)
    async with serving(ScriptedEngine()) as target:
        for max_tokens in (1, MAX_LOGPROBS_ON_LOOP // 16):
            request = pb.GenerationRequest(text="x", max_tokens=max_tokens, num_samples=2, logprobs=20)
            answer = await target.stub.GenerateAll(request)
            assert [len(sample.tokens) for sample in answer.responses] == [max_tokens] * 2
    assert made_in == [True, False]


def test_many_tokens_are_merged_in_a_time_that_grows_with_their_number() -> None:
    """To copy all tokens for each delta takes more than a second."""

    def merge() -> None:
        buffer = DeltaBuffer()
        for number in range(20_000):
            buffer.add(TextDelta(0, "a", number, TOKENS[:1]))
        assert len(buffer.take()[0].message().tokens) == 20_000

    check_cpu_time(0.3, merge)
