"""An engine that plays a script instead of running a model: for tests, benchmarks, and trying out a client.

It can be slow, fail at any point, hang, and cut characters in two. It keeps every promise of a real engine.
"""

import asyncio
import codecs
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from flywheel_server.engines.base import (
    Engine,
    EngineError,
    EngineFailedError,
    EngineModel,
    EngineOverloadedError,
    EngineStats,
    EngineUnavailableError,
    PreparedRequest,
    PromptToken,
    PromptTooLongError,
    Sink,
    Started,
)
from flywheel_server.engines.capacity import Capacity
from flywheel_server.engines.samples import GrowingSample
from flywheel_server.engines.seeds import first_seed, seed_of_sample
from flywheel_server.engines.stepping import StepScheduler
from flywheel_server.engines.uninterrupted import wait_until_done
from flywheel_server.messages import FLYWHEEL_FIELDS, GenerationRequest, LikelyToken, Token

SUPPORTED_FIELDS: Final = FLYWHEEL_FIELDS | {
    "messages",
    "prompt_token_ids",
    "seed",
    "min_p",
    "choices",
    "logprobs",
    "time_limit",
}
"""The fields of a request that the engine honours.

The token that is played is always the likeliest one, which min_p never excludes. A script cannot follow a logit_bias, a
repetition_penalty, a json_schema or a regex.
"""

Count = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]

_FAILURES: Final[dict[str, Callable[[str], EngineError]]] = {
    "failed": EngineFailedError,
    "overloaded": EngineOverloadedError,
    "unavailable": EngineUnavailableError,
}


class Script(BaseModel):
    """What the engine plays. A token is `bytes_per_token` bytes of UTF-8; its id is its position in the script's text."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    text: Annotated[str, Field(min_length=1)] = "The llama 🦙 is a domesticated South American camelid. "
    """The text of every sample, repeated until the sample ends."""
    texts: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Texts of which the seed of a sample picks one: the text at the index seed modulo the number of texts. By default, every
    sample plays `text`."""
    plays_prompt: bool = False
    """Whether a sample repeats the prompt instead, so that a caller can tell its own text from that of other callers."""
    bytes_per_token: Annotated[int, Field(ge=1)] = 4
    """Bytes in a token; small tokens cut multi-byte characters in two."""
    prompt_delay: Seconds = 0
    """Seconds to read the prompt."""
    token_delay: Seconds = 0
    """Seconds between two steps, each of which makes a token of each sample; 0 makes a step in every third iteration of the
    event loop."""
    end_after: Count | None = None
    """Tokens after which the model itself ends sample 0; by default, it goes on to max_tokens."""
    stagger: Count = 0
    """How many tokens later than the sample before it each further sample ends."""
    fail_in_queue: bool = False
    """Whether to fail before `Started` is emitted."""
    fail_after: Count | None = None
    """Tokens after which to fail; 0 fails while the prompt is read."""
    failure: Literal["failed", "overloaded", "unavailable"] = "failed"
    """How to fail."""
    fail_on: str = ""
    """Only requests whose prompt contains this text fail; the default, an empty text, is in every prompt."""
    hang_after: Count | None = None
    """Tokens after which the generation hangs: it makes no further token, and does not end."""
    die_after: Count | None = None
    """Calls after which the engine is dead: all further calls and the check fail until the engine is started again."""
    slots: Annotated[int, Field(ge=1)] = 512
    """How many generations run at the same time; further ones wait."""
    context_tokens: Annotated[int, Field(ge=1)] = 8192
    """Maximum number of tokens in the prompt and the generated text together."""
    shared_context_tokens: Annotated[int, Field(ge=1)] | None = None
    """Tokens of context that all generations share; by default, each generation has a context of its own."""
    tokenizers: Count = 0
    """How many prompts are tokenized at the same time; with 0, tokenizing takes no time."""
    tokenize_delay: Seconds = 0
    """Seconds to tokenize a prompt. A cancel does not interrupt that."""

    def pieces(self, text: str) -> list[str]:
        """Returns the text that each token adds: the characters that the token completes, which may be none."""
        decoder = codecs.getincrementaldecoder("utf-8")()
        return [decoder.decode(token) for token in self.tokens(text)]

    def tokens(self, text: str) -> list[bytes]:
        """Returns the bytes of each token of a text."""
        encoded, size = text.encode(), self.bytes_per_token
        return [encoded[start : start + size] for start in range(0, len(encoded), size)]

    def error(self) -> EngineError:
        """Returns the error to fail with."""
        return _FAILURES[self.failure]("the script says so")


@dataclass(frozen=True, slots=True)
class _Track:
    """What a sample plays: the tokens of a text, over and over or, for a text that the caller chose, once.

    Attributes:
        pieces: The text that each token adds.
        tokens: The bytes of each token.
        ends: Whether the sample ends after the text.
    """

    pieces: list[str]
    tokens: list[bytes]
    ends: bool

    @classmethod
    def of(cls, script: Script, text: str, *, ends: bool = False) -> Self:
        """Returns the track of a text."""
        return cls(script.pieces(text), script.tokens(text), ends)

    def token(self, token_id: int, likeliest: int) -> Token:
        """Returns a token of the text, or with the id after the last of them, the token that ends the text.

        Its probability is 1/2. The probabilities of the next likely tokens are 1/4, 1/8 and so on: they are the tokens that
        follow in the text, and then tokens with higher ids, which have the bytes of the text once more.
        """
        tokens = [*self.tokens, b""]
        ids = [(token_id + rank) % len(tokens) if rank < len(tokens) else rank for rank in range(likeliest)]
        likely = [LikelyToken(each, tokens[each % len(tokens)], rank * math.log(0.5)) for rank, each in enumerate(ids, start=1)]
        return Token(token_id, tokens[token_id], math.log(0.5), tuple(likely))


class _ScriptedGeneration:
    """The generation of one request, as the script has it; see `SteppedGeneration`.

    Arguments:
        script: The script.
        tracks: What the samples play: the seed of each sample picks one.
        prepared: The request.
        sink: Takes the events.
        ends_at: When the request's time limit ends all samples, on the clock of the event loop.
    """

    def __init__(self, script: Script, tracks: Sequence[_Track], prepared: PreparedRequest, sink: Sink, ends_at: float) -> None:
        loop = asyncio.get_running_loop()
        request = prepared.request
        self.done: asyncio.Future[None] = loop.create_future()
        self._script = script
        self._eos_token_ids = frozenset(request.eos_token_ids)
        self._choices = request.choices
        self._max_tokens = request.max_tokens
        self._logprobs = request.logprobs
        self._sink = sink
        self._now = loop.time
        self._ends_at = ends_at
        self._unfinished: dict[int, tuple[GrowingSample, _Track, float]] = {}
        """For each unfinished sample its track, and the number of tokens after which the model itself ends the sample."""
        first = first_seed(request)
        for index in range(request.num_samples):
            seed = seed_of_sample(first, index)
            sample = GrowingSample(index, len(prepared.prompt), request.stop, sink.emit, seed=seed)
            track = tracks[seed % len(tracks)]
            self._unfinished[index] = (sample, track, self._length(index, track))
        self._fail_after = script.fail_after if script.fail_on in _prompt_of(request) else None
        self._generated = 0
        self._fail_if_due()

    @property
    def is_paused(self) -> bool:
        """Whether the reader of the events is behind, and there is time to wait for the reader."""
        return self._sink.is_full and self._now() < self._ends_at

    def step(self) -> bool:
        """Makes a token of each unfinished sample."""
        if self._generated == self._script.hang_after:
            return False
        if self._now() >= self._ends_at:
            for sample, _, _ in self._unfinished.values():
                sample.end("time", self._generated)
            self._unfinished.clear()
        else:
            self._make_token()
        if not self._unfinished:
            if not self.done.done():
                self.done.set_result(None)
            return False
        self._fail_if_due()
        return True

    def _make_token(self) -> None:
        made = self._generated
        self._generated += 1
        for index, (sample, track, length) in list(self._unfinished.items()):
            token_id = made % len(track.pieces)
            if made >= length:
                sample.end("stop", self._generated, self._tokens(track, len(track.pieces)))
            elif token_id in self._eos_token_ids and self._may_end(track, token_id):
                sample.end("stop", self._generated, self._tokens(track, token_id))
            else:
                tokens = self._tokens(track, token_id) if self._logprobs else ()
                sample.add(track.pieces[token_id], self._generated, tokens)
                if self._generated == self._max_tokens and not sample.finished:
                    sample.end("length", self._generated)
            if sample.finished:
                del self._unfinished[index]

    def _may_end(self, track: _Track, token_id: int) -> bool:
        """Returns whether an end token of the request ends the sample here. A text that is no choice yet goes on."""
        return self._choices is None or "".join(track.pieces[:token_id]) in self._choices

    def _tokens(self, track: _Track, token_id: int) -> Sequence[Token]:
        """Returns the token, if the request asks for tokens."""
        return (track.token(token_id, self._logprobs),) if self._logprobs else ()

    def _length(self, index: int, track: _Track) -> float:
        """Returns after how many tokens the model itself ends the sample."""
        if track.ends:
            return len(track.pieces)
        end_after = self._script.end_after
        return math.inf if end_after is None else end_after + index * self._script.stagger

    def _fail_if_due(self) -> None:
        if self._generated == self._fail_after:
            raise self._script.error()


def _prompt_of(request: GenerationRequest) -> str:
    """Returns the prompt as one text, which is empty if the prompt is token ids."""
    return request.text or "".join(message.content for message in request.messages)


class ScriptedEngine(Engine):
    """Plays a `Script` for every request: a step makes the next token of all samples of all requests."""

    def __init__(self, script: Script | None = None) -> None:
        self.script = script or Script()
        self.running = 0
        """How many generations are running: neither queued nor ended."""
        self._calls = 0
        self._capacity = Capacity(slots=self.script.slots, tokens=0)
        self._steps = StepScheduler(self.script.token_delay)
        self._tracks = [_Track.of(self.script, text) for text in self.script.texts or (self.script.text,)]

    async def __aenter__(self) -> Self:
        self._calls = 0
        return self

    async def prepare(self, request: GenerationRequest) -> PreparedRequest:
        """Returns the request with the tokens of its prompt; see `Engine.prepare`."""
        if self.script.tokenizers:
            await wait_until_done(asyncio.ensure_future(asyncio.sleep(self.script.tokenize_delay)))
        prompt_tokens = len(request.prompt_token_ids or self.script.tokens(_prompt_of(request)))
        if request.max_input_tokens:
            prompt_tokens = min(prompt_tokens, request.max_input_tokens)
        if prompt_tokens + request.max_tokens > self.script.context_tokens:
            raise PromptTooLongError(prompt_tokens, request.max_tokens, self.script.context_tokens)
        needed = prompt_tokens + request.num_samples * request.max_tokens
        return PreparedRequest(request, range(prompt_tokens), min(needed, self.script.shared_context_tokens or needed))

    async def generate(self, prepared: PreparedRequest, sink: Sink) -> None:
        """Emits the events of the script; see `Engine.generate`."""
        self._calls += 1
        self._raise_if_dead()
        request = prepared.request
        if self.script.fail_in_queue and self.script.fail_on in _prompt_of(request):
            raise self.script.error()
        async with self._capacity.reserve(slots=1, tokens=0):
            self.running += 1
            try:
                sink.emit(Started(len(prepared.prompt)))
                ends_at = asyncio.get_running_loop().time() + (request.time_limit or math.inf)
                if self.script.prompt_delay:
                    await asyncio.sleep(min(self.script.prompt_delay, request.time_limit or math.inf))
                await self._steps.run(_ScriptedGeneration(self.script, self._tracks_for(request), prepared, sink, ends_at))
            finally:
                self.running -= 1

    def _tracks_for(self, request: GenerationRequest) -> Sequence[_Track]:
        """Returns what the samples of the request may play."""
        if request.choices:
            return [_Track.of(self.script, choice, ends=True) for choice in request.choices]
        if self.script.plays_prompt and (prompt := _prompt_of(request)):
            return [_Track.of(self.script, prompt)]
        return self._tracks

    async def tokenize(self, prepared: PreparedRequest) -> Sequence[PromptToken]:
        """Returns the tokens of the prompt; see `Engine.tokenize`."""
        return [PromptToken(*each) for each in enumerate(self.script.tokens(_prompt_of(prepared.request)))]

    def _raise_if_dead(self) -> None:
        if self.script.die_after is not None and self._calls > self.script.die_after:
            raise EngineFailedError("the engine is dead")

    async def check(self) -> None:
        """Raises `EngineFailedError` if the engine is dead. Other failures of the script are for its callers only."""
        self._raise_if_dead()

    async def stats(self) -> EngineStats:
        """Returns how many generations wait for a slot."""
        return EngineStats(backlog=self._capacity.waiting, num_total_runners=1)

    def model(self) -> EngineModel:
        """Returns the script's limits."""
        return EngineModel(
            name="script",
            engine="scripted",
            context_tokens=self.script.context_tokens,
            penalizes_prompt=False,
            prompt_format="raw",
            shared_context_tokens=self.script.shared_context_tokens,
            tokenizers=self.script.tokenizers,
            supported_fields=SUPPORTED_FIELDS,
            exact_seeds=True,
        )
