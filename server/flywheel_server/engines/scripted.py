"""An engine that plays a script instead of running a model: for tests, benchmarks, and trying out a client.

It can be slow, fail at any point, hang, and cut characters in two. It keeps every promise of a real engine.
"""

import asyncio
import codecs
from collections.abc import Callable, Sequence
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
    PromptTooLongError,
    Sink,
    Started,
)
from flywheel_server.engines.capacity import Capacity
from flywheel_server.engines.samples import GrowingSample
from flywheel_server.engines.stepping import StepScheduler
from flywheel_server.engines.uninterrupted import wait_until_done
from flywheel_server.messages import GenerationRequest

Count = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(ge=0)]

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
        encoded, size = text.encode(), self.bytes_per_token
        decoder = codecs.getincrementaldecoder("utf-8")()
        return [decoder.decode(encoded[start : start + size]) for start in range(0, len(encoded), size)]

    def error(self) -> EngineError:
        """Returns the error to fail with."""
        return _FAILURES[self.failure]("the script says so")


class _ScriptedGeneration:
    """The generation of one request, as the script has it; see `SteppedGeneration`."""

    def __init__(self, script: Script, pieces: Sequence[str], prepared: PreparedRequest, sink: Sink) -> None:
        request = prepared.request
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._script = script
        self._request = request
        self._sink = sink
        self._unfinished = {
            index: GrowingSample(index, len(prepared.prompt), request.stop, sink.emit) for index in range(request.num_samples)
        }
        self._pieces = pieces
        self._fail_after = script.fail_after if script.fail_on in request.text else None
        self._generated = 0
        self._fail_if_due()

    @property
    def is_paused(self) -> bool:
        """Whether the reader of the events is behind."""
        return self._sink.is_full

    def step(self) -> bool:
        """Makes a token of each unfinished sample."""
        if self._generated == self._script.hang_after:
            return False
        self._make_token()
        if not self._unfinished:
            if not self.done.done():
                self.done.set_result(None)
            return False
        self._fail_if_due()
        return True

    def _make_token(self) -> None:
        token_id = self._generated % len(self._pieces)
        self._generated += 1
        for index, sample in list(self._unfinished.items()):
            if token_id in self._request.eos_token_ids or self._ends(index):
                sample.end("stop", self._generated)
            else:
                sample.add(self._pieces[token_id], self._generated)
                if self._generated == self._request.max_tokens and not sample.finished:
                    sample.end("length", self._generated)
            if sample.finished:
                del self._unfinished[index]

    def _ends(self, index: int) -> bool:
        """Returns whether the script ends the sample with this token."""
        end_after = self._script.end_after
        return end_after is not None and self._generated == end_after + index * self._script.stagger + 1

    def _fail_if_due(self) -> None:
        if self._generated == self._fail_after:
            raise self._script.error()


class ScriptedEngine(Engine):
    """Plays a `Script` for every request: a step makes the next token of all samples of all requests."""

    def __init__(self, script: Script | None = None) -> None:
        self.script = script or Script()
        self.running = 0
        """How many generations are running: neither queued nor ended."""
        self._calls = 0
        self._capacity = Capacity(slots=self.script.slots, tokens=0)
        self._steps = StepScheduler(self.script.token_delay)
        self._pieces = self.script.pieces(self.script.text)

    async def __aenter__(self) -> Self:
        self._calls = 0
        return self

    async def prepare(self, request: GenerationRequest) -> PreparedRequest:
        """Returns the request with the tokens of its prompt; see `Engine.prepare`."""
        if self.script.tokenizers:
            await wait_until_done(asyncio.ensure_future(asyncio.sleep(self.script.tokenize_delay)))
        prompt_tokens = -(-len(request.text.encode()) // self.script.bytes_per_token)
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
        if self.script.fail_in_queue and self.script.fail_on in prepared.request.text:
            raise self.script.error()
        async with self._capacity.reserve(slots=1, tokens=0):
            self.running += 1
            try:
                sink.emit(Started(len(prepared.prompt)))
                if self.script.prompt_delay:
                    await asyncio.sleep(self.script.prompt_delay)
                pieces = self.script.pieces(prepared.request.text) if self.script.plays_prompt else self._pieces
                await self._steps.run(_ScriptedGeneration(self.script, pieces, prepared, sink))
            finally:
                self.running -= 1

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
        )
