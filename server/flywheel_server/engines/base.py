"""The protocol between the service and an engine: its methods, its events, its errors.

The errors, each of which has its row in `flywheel_server.errors`:

    EngineError
      EngineUnavailableError    starting, stopped, or out of reach; may be tried again later
      EngineOverloadedError     cannot take more work now; may be tried again later
      EngineFailedError         broke while it worked on the request
      EngineTimeoutError        took longer than its deployment allows
      EngineSetupError          is not where the settings say, or may not be used from here
      PromptTooLongError        prompt and max_tokens exceed the context
      UnsupportedFieldError     cannot honour a field of this request
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, Self

from flywheel_server.messages import GenerationRequest, GenerationResponseSample


@dataclass(frozen=True, slots=True)
class Started:
    """The engine has begun to work on the request, which waited until now. The first event of every generation.

    `prompt_tokens` is how many it is going to read, or 0 where it does not know yet.
    """

    prompt_tokens: int = 0


@dataclass(slots=True)  # not frozen, which would take four times as long to make, and there is one for each token
class TextDelta:
    """The next piece of a sample's text: whole characters, never empty, never part of a stop sequence that ended it."""

    index: int
    text: str
    generated_tokens: int


@dataclass(frozen=True, slots=True)
class PreparedRequest:
    """A request that an engine is ready to work on.

    Attributes:
        request: The request.
        prompt: The ids of the prompt's tokens, as the model reads them; empty if the prompt is tokenized elsewhere or later.
        context_tokens: Tokens of the engine's shared context that the request holds while it is worked on.
    """

    request: GenerationRequest
    prompt: Sequence[int] = ()
    context_tokens: int = 0


# A finished sample is its own event; its `text` is all of it, whether or not the engine sent deltas before.
Event = Started | TextDelta | GenerationResponseSample


class Sink(Protocol):
    """Where an engine puts the events of one generation. It belongs to the thread of the event loop."""

    @property
    def is_full(self) -> bool:
        """Whether the reader of the events is behind. An engine that can pause a generation pauses it for that time."""

    def emit(self, event: Event) -> None:
        """Take the next event, without waiting.

        Raises `EngineFailedError` if the event is not one that may come next. The engine lets that end the generation.
        """


PromptFormat = Literal["raw", "chat"]
"""How a model reads the text of a request: as it is, or as a user's message in its chat template."""


@dataclass(frozen=True, slots=True)
class EngineModel:
    """What an engine runs.

    Attributes:
        name: The model.
        engine: The engine.
        context_tokens: What bounds prompt and generated text together.
        penalizes_prompt: Whether penalties count the prompt too.
        prompt_format: How it reads a prompt.
        slots: Samples that it works on at a time; None where it takes as many as come.
        shared_context_tokens: Tokens of context that all samples share which it works on at a time; None if each has its own.
        tokenizers: Prompts that it tokenizes at a time in this process; 0 if `prepare` takes no time.
    """

    name: str
    engine: str
    context_tokens: int
    penalizes_prompt: bool
    prompt_format: PromptFormat
    slots: int | None = None
    shared_context_tokens: int | None = None
    tokenizers: int = 0


@dataclass(frozen=True, slots=True)
class EngineStats:
    """How busy an engine is: requests, or parts of them, that wait in it from all its callers, and how many runners it has."""

    backlog: int
    num_total_runners: int


class EngineError(Exception):
    """The base of what an engine may raise. Its text is for the server's log; callers see what `errors` makes of it.

    Engines may run on other machines, so each error can be pickled: `args` is what it is made of.
    """


class EngineUnavailableError(EngineError):
    """The engine is starting, stopped, or out of reach. `retry_delay` (seconds) is when to try again."""

    def __init__(self, message: str, retry_delay: float = 1.0) -> None:
        super().__init__(message, retry_delay)
        self.retry_delay = retry_delay

    def __str__(self) -> str:
        return str(self.args[0])


class EngineOverloadedError(EngineError):
    """The engine cannot take more work now. `retry_delay` (seconds) is when to try again."""

    def __init__(self, message: str, retry_delay: float = 1.0) -> None:
        super().__init__(message, retry_delay)
        self.retry_delay = retry_delay

    def __str__(self) -> str:
        return str(self.args[0])


class EngineFailedError(EngineError):
    """The engine broke while it worked on the request."""


class EngineTimeoutError(EngineError):
    """The engine ended the work because it took longer than the deployment allows, which is `seconds`."""

    def __init__(self, seconds: float) -> None:
        super().__init__(seconds)
        self.seconds = seconds

    def __str__(self) -> str:
        return f"the engine ended the work after {self.seconds:g} s"


class EngineSetupError(EngineError):
    """The engine is not where the settings say, or may not be used from here: somebody has to change the deployment.

    `problem` says so in words for the caller; `facts` name what was looked for, and the `setting` to look at.
    """

    def __init__(self, problem: str, facts: dict[str, str]) -> None:
        super().__init__(problem, facts)
        self.problem = problem
        self.facts = facts

    def __str__(self) -> str:
        return self.problem


class PromptTooLongError(EngineError):
    """Prompt and max_tokens exceed the context; all in tokens.

    If the prompt is so long that this is clear before all of its tokens are counted, `prompt_tokens` is how many it has at
    least. `counted_tokens` is how many were counted.
    """

    def __init__(self, prompt_tokens: int, max_tokens: int, context_tokens: int, counted_tokens: int | None = None) -> None:
        super().__init__(prompt_tokens, max_tokens, context_tokens, counted_tokens)
        self.prompt_tokens = prompt_tokens
        self.max_tokens = max_tokens
        self.context_tokens = context_tokens
        self.is_exact = counted_tokens is None
        self.counted_tokens = prompt_tokens if counted_tokens is None else counted_tokens

    def __str__(self) -> str:
        at_least = "" if self.is_exact else "at least "
        return (
            f"{at_least}{self.prompt_tokens} prompt tokens and max_tokens {self.max_tokens} exceed the context of "
            f"{self.context_tokens}"
        )


class UnsupportedFieldError(EngineError):
    """The engine cannot honour a field of this request. `reason` says so in words for the caller."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(field, reason)
        self.field = field
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.field}: {self.reason}"


class Engine(Protocol):
    """What the service needs of an engine. An engine runs between `__aenter__` and `__aexit__`, on one event loop."""

    async def __aenter__(self) -> Self:
        """Starts the engine: returns when it can work. Raises `EngineError` where it cannot start."""

    async def __aexit__(self, *exception: object) -> None:
        """Stops the engine and whatever it still works on."""

    async def prepare(self, request: GenerationRequest) -> PreparedRequest:
        """Returns the request as `generate` takes it; raises `EngineError`, such as for a prompt that is too long.

        Cancelled, it stops as soon as it can, and returns only when nothing works on it any more.
        """

    async def generate(self, prepared: PreparedRequest, sink: Sink) -> None:
        """Emits `Started`, then deltas and exactly one `GenerationResponseSample` for each index, or raises `EngineError`.

        Returns when all samples have finished. Cancelled, it stops the work: in the queue, while the prompt is read, or while
        text is made. Events that the engine emits after that are ignored.
        """

    async def check(self) -> None:
        """Returns when the engine has shown that it works, by producing a token; raises `EngineError` where it fails.

        An engine on other machines, which must not be woken for nothing, may leave that to the first call.
        """

    async def stats(self) -> EngineStats:
        """Returns how busy the engine is now; raises `EngineError` if that cannot be told."""

    def is_reachable(self) -> bool:
        """Returns whether calls can be made although `stats` fails or takes too long. If not, the engine is unhealthy."""

    def model(self) -> EngineModel:
        """Returns what the engine runs, once it has started."""
