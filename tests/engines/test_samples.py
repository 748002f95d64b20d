"""Stop sequences: the text that passes does not depend on how it is cut, and no more text is held back than necessary."""

import codecs
from itertools import pairwise

from flywheel_server.engines.base import Event, TextDelta
from flywheel_server.engines.samples import GrowingSample, StopGate
from flywheel_server.messages import GenerationResponseSample, Token
from hypothesis import given
from hypothesis import strategies as st

# Few letters, so that texts and stop sequences overlap in every way.
texts = st.text(alphabet="abé", max_size=40)
stops = st.lists(st.text(alphabet="abé", min_size=1, max_size=5), max_size=4)


def pieces_of(text: str, cuts: list[int]) -> list[str]:
    bounds = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    return [text[start:end] for start, end in pairwise(bounds)]


def first_stop(text: str, stop: list[str]) -> tuple[str, str]:
    """Returns the text that must pass, and the stop sequence that is found, by trying one character after the other."""
    for end in range(len(text) + 1):
        complete = [sequence for sequence in stop if text[:end].endswith(sequence)]
        if complete:
            longest = max(complete, key=len)
            return text[: end - len(longest)], longest
    return text, ""


@given(texts, stops, st.lists(st.integers(0, 40), max_size=8))
def test_the_text_that_passes_does_not_depend_on_the_pieces(text: str, stop: list[str], cuts: list[int]) -> None:
    gate = StopGate(stop)
    passed = ""
    for piece in pieces_of(text, cuts):
        passed += gate.feed(piece)
        if gate.matched:
            break
    passed += gate.flush()
    assert (passed, gate.matched) == first_stop(text, stop)


@given(texts, stops)
def test_only_text_that_may_still_become_a_stop_sequence_is_held_back(text: str, stop: list[str]) -> None:
    gate = StopGate(stop)
    passed, seen = "", ""
    for character in text:
        seen += character
        passed += gate.feed(character)
        if gate.matched:
            return
        held = seen[len(passed) :]
        assert seen == passed + held
        assert not held or any(sequence.startswith(held) for sequence in stop)
        longer_ends = (seen[start:] for start in range(len(passed)))
        assert not any(sequence.startswith(end) for end in longer_ends for sequence in stop), "too little was held back"


def test_a_growing_sample_sends_each_character_once() -> None:
    events: list[Event] = []
    sample = GrowingSample(index=2, prompt_tokens=5, stop=["END"], emit=events.append)
    for number, text in enumerate(["a E", "N", "", "x"], start=1):
        sample.add(text, number)
    sample.end("length", 5)
    assert [(event.text, event.generated_tokens) for event in events if isinstance(event, TextDelta)] == [("a ", 1), ("ENx", 4)]
    finished = events[-1]
    assert isinstance(finished, GenerationResponseSample)
    assert (finished.index, finished.text, finished.prompt_tokens, finished.generated_tokens) == (2, "a ENx", 5, 5)
    assert sample.finished


@given(st.lists(st.text(alphabet="abé", max_size=4), max_size=8), stops, st.integers(1, 3), st.booleans())
def test_deltas_carry_the_tokens_of_their_text(pieces: list[str], stop: list[str], size: int, ends: bool) -> None:
    """Tokens may end within a character and within a held-back text, and may be empty."""
    events: list[Event] = []
    sample = GrowingSample(0, 1, stop, events.append)
    given_tokens: list[Token] = []
    for number, piece in enumerate(pieces):
        encoded = piece.encode()
        parts = [encoded[start : start + size] for start in range(0, len(encoded), size)] or [b""]
        tokens = [Token(number, part, -1.0) for part in parts]
        sample.add(piece, number + 1, tokens)
        given_tokens += tokens
        if sample.finished:
            break
    if not sample.finished:
        last = [Token(99, b"", -1.0)] if ends else []
        sample.end("stop" if ends else "length", 9, last)
        given_tokens += last
    *deltas, finished = events
    assert isinstance(finished, GenerationResponseSample)
    assert [*finished.tokens] == given_tokens
    text = carried = b""
    told: list[Token] = []
    for delta in deltas:
        assert isinstance(delta, TextDelta)
        told += delta.tokens
        text += delta.text.encode()
        carried += b"".join(token.text for token in delta.tokens)
        assert text.startswith(carried), "no token comes before its text"
    assert told == given_tokens[: len(told)], "in order, and none twice"


BYTES = st.lists(st.sampled_from([b"a", b"b", "é".encode(), b"\xc3", b"\xa9", b"\xff", b"\xf0\x9f", b"\xa6\x99", b"\xe2\x82a"]))


@given(BYTES, stops, st.booleans())
def test_tokens_that_are_no_utf8_come_with_their_replacement(texts_of_tokens: list[bytes], stop: list[str], ends: bool) -> None:
    events: list[Event] = []
    sample = GrowingSample(0, 1, stop, events.append)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for number, text in enumerate(texts_of_tokens):
        if not sample.finished:
            sample.add(decoder.decode(text), number + 1, (Token(number, text, -1.0),))
    if not sample.finished and ends:
        sample.end("length", len(texts_of_tokens))
    deltas = [event for event in events if isinstance(event, TextDelta)]
    sent, told = "", b""
    carried = 0
    for delta in deltas:
        sent += delta.text
        told += b"".join(token.text for token in delta.tokens)
        carried += len(delta.tokens)
        assert sent.startswith(told.decode(errors="replace")), "no token comes before its text"
        more = b"".join(texts_of_tokens[: carried + 1])
        is_whole = more != told and not codecs.utf_8_decode(more, "replace", False)[1] < len(more)
        assert not is_whole or not sent.startswith(more.decode(errors="replace")), "and none after it"
