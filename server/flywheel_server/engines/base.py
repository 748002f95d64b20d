"""The protocol between the service and an engine: the engine's methods, events and errors.

An engine of your own imports all of them from `flywheel_server`, and these helpers, which other engines use too:

    GrowingSample    turns pieces of text into the events of one sample: finds stop sequences, joins the text, ends the sample
    StopGate         finds stop sequences across pieces of text; for an engine that makes its own events
    Capacity         a fair queue for slots and for tokens of context that concurrent generations share

The service validates requests, keeps deadlines, limits concurrency and merges deltas. It cancels `generate` to stop the work.
`pytest tests/conformance --address HOST:PORT` checks the promises of the contract on a server that runs your engine.

An engine raises the subclasses of `EngineError`. `flywheel_server.errors` has the gRPC status of each.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, Self

from flywheel_server.messages import (
    FLYWHEEL_FIELDS,
    FieldViolation,
    GenerationRequest,
    GenerationResponseSample,
    Token,
    TokenBytes,
)


@dataclass(frozen=True, slots=True)
class Started:
    """Says that the engine has begun to work on the request. It is the first event of every generation.

    `prompt_tokens` is the number of prompt tokens that the engine will read, or 0 if the engine does not know it yet.
    """

    prompt_tokens: int = 0


@dataclass(slots=True)  # not frozen: a frozen one takes four times as long to make, and each token makes one
class TextDelta:
    """Carries the next piece of a sample's text: whole characters, never empty, without the stop sequence that ends the sample.

    `generated_tokens` counts the sample's tokens so far. `tokens` are the tokens of the text, if the request asks for them; a
    token whose text is divided between two deltas comes with the later one.
    """

    index: int
    text: str
    generated_tokens: int
    tokens: Sequence[Token] = ()


@dataclass(frozen=True, slots=True)
class PreparedRequest:
    """Holds a request that an engine is ready to work on.

    Attributes:
        prompt: The token ids of the prompt, as the model reads them; empty if the prompt is tokenized elsewhere or later.
        context_tokens: Tokens of the engine's shared context that the request holds while the engine works on it; see
            `EngineModel.shared_context_tokens`.
        grammar: The constraint of the request, in the form in which the engine uses it; empty if there is none.
        starts_per_step: How many samples of the request may start in one step of the engine, which builds the constraint for
            each of them while other callers wait; None if any number may.
    """

    request: GenerationRequest
    prompt: Sequence[int] = ()
    context_tokens: int = 0
    grammar: str = ""
    starts_per_step: int | None = None


# A finished sample is an event too. Its `text` is the whole text of the sample, whether or not deltas came before.
OutputEvent = TextDelta | GenerationResponseSample
Event = Started | OutputEvent


class Sink(Protocol):
    """Takes the events of one generation. Only the thread of the event loop may use it."""

    @property
    def is_full(self) -> bool:
        """Whether the reader of the events is behind. An engine that can pause a generation pauses it while this is true."""

    def emit(self, event: Event) -> None:
        """Takes the next event, without waiting.

        Raises `EngineFailedError` if this event may not come next. The engine lets the error end the generation.
        """


PromptFormat = Literal["raw", "chat"]
"""How a model reads the text of a request: as it is, or as a user's message in the model's chat template."""


@dataclass(frozen=True, slots=True)
class EngineModel:
    """Describes what an engine runs.

    Attributes:
        name: The name of the model.
        engine: The name of the engine.
        context_tokens: The most tokens that prompt and generated text may have together.
        penalizes_prompt: Whether penalties count the tokens of the prompt too.
        prompt_format: How the model reads a prompt.
        slots: The number of samples that the engine works on at a time; None if there is no limit.
        shared_context_tokens: Tokens of context that all samples in the engine share; None if each sample has its own context.
        tokenizers: The number of prompts that `prepare` tokenizes at a time; 0 if `prepare` takes no time.
        supported_fields: The fields of a request that the engine honours. The service refuses all others by name, so the engine
            never sees them.
        exact_seeds: Whether a request with a seed gives exactly the same samples each time.
        slots_for_seed: The slots that a request with a seed takes, however many samples it has; None if it takes a slot for
            each sample, as other requests do.
    """

    name: str
    engine: str
    context_tokens: int
    penalizes_prompt: bool
    prompt_format: PromptFormat
    slots: int | None = None
    shared_context_tokens: int | None = None
    tokenizers: int = 0
    supported_fields: frozenset[str] = FLYWHEEL_FIELDS
    exact_seeds: bool = False
    slots_for_seed: int | None = None

    def slots_of(self, request: GenerationRequest) -> int:
        """Returns how many slots a request takes."""
        if request.seed is not None and self.slots_for_seed is not None:
            return self.slots_for_seed
        return request.num_samples


@dataclass(frozen=True, slots=True)
class PromptToken:
    """A token of a prompt: its id and its bytes."""

    id: int
    text: TokenBytes


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Says how busy an engine is.

    Attributes:
        backlog: Requests, or parts of requests, that wait in the engine, from all of its callers.
        num_total_runners: The number of runners that the engine has: containers, or 1 for an engine within the server.
        cached_prompt_tokens: Tokens of prompts that the engine has found in its cache so far, and did not read again; None if
            the engine does not count them. The number never falls, even if the engine is stopped and started again.
    """

    backlog: int
    num_total_runners: int
    cached_prompt_tokens: int | None = None


class EngineError(Exception):
    """The base class of all errors that an engine raises.

    The text of an error is for the server's log. Callers see the message that `flywheel_server.errors` has for its class.

    Each error can be pickled, because engines may run on other machines: `args` holds the arguments of the constructor.
    """


class _TryAgainError(EngineError):
    def __init__(self, message: str, retry_delay: float = 1.0) -> None:
        super().__init__(message, retry_delay)
        self.retry_delay = retry_delay

    def __str__(self) -> str:
        return str(self.args[0])


class EngineUnavailableError(_TryAgainError):
    """The engine is starting, stopped, or out of reach. Callers may try again after `retry_delay` seconds."""


class EngineOverloadedError(_TryAgainError):
    """The engine cannot take more work. Callers may try again after `retry_delay` seconds."""


class EngineFailedError(EngineError):
    """The engine broke while it worked on the request."""


class EngineTimeoutError(EngineError):
    """The engine ended the work because it took longer than the `seconds` that the deployment allows."""

    def __init__(self, seconds: float) -> None:
        super().__init__(seconds)
        self.seconds = seconds

    def __str__(self) -> str:
        return f"the engine ended the work after {self.seconds:g} s"


class EngineSetupError(EngineError):
    """The engine is not where the settings say, or may not be used from here. Somebody has to change the deployment.

    `problem` tells the caller what is wrong. `facts` name what was looked for, and the `setting` to check.
    """

    def __init__(self, problem: str, facts: dict[str, str]) -> None:
        super().__init__(problem, facts)
        self.problem = problem
        self.facts = facts

    def __str__(self) -> str:
        return self.problem


class PromptTooLongError(EngineError):
    """Prompt and max_tokens exceed the context. All numbers are in tokens.

    The service sets `field`, the field with the prompt, and `is_generation`: whether the request has more than a prompt.

    An engine may stop counting once it is clear that a prompt is too long. It then gives `counted_tokens`, the number that it
    counted, and `prompt_tokens` is the least that the prompt can have.
    """

    def __init__(self, prompt_tokens: int, max_tokens: int, context_tokens: int, counted_tokens: int | None = None) -> None:
        super().__init__(prompt_tokens, max_tokens, context_tokens, counted_tokens)
        self.field = "text"
        self.is_generation = True
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
    """The engine cannot honour a field of this request. `reason` tells the caller why. `further` names more such fields."""

    def __init__(self, field: str, reason: str, further: Sequence[str] = ()) -> None:
        # An older version, which knows no further fields, can unpickle an error without any.
        super().__init__(field, reason, *([further] if further else []))
        self.field = field
        self.reason = reason
        self.further = further

    def __str__(self) -> str:
        return f"{', '.join([self.field, *self.further])}: {self.reason}"


class InvalidFieldError(EngineError):
    """The engine refuses the value of a field, given by its path. `description` tells the caller what is wrong.

    `further` are other violations of the same request.
    """

    def __init__(self, field: str, description: str, further: Sequence[FieldViolation] = ()) -> None:
        # Pickled, an error has `further` only among its attributes, so that an older version can unpickle it.
        super().__init__(field, description)
        self.field = field
        self.description = description
        self.further = further

    @classmethod
    def of(cls, violations: Sequence[FieldViolation]) -> Self:
        """Returns the error for at least one violation."""
        first, *further = violations
        return cls(first.field, first.description, further)

    @property
    def violations(self) -> list[FieldViolation]:
        """All violations."""
        return [FieldViolation(self.field, self.description), *self.further]

    def __str__(self) -> str:
        return f"{self.field} {self.description}"


class UnsupportedMethodError(EngineError):
    """The engine does not support a method of the contract, for example `Tokenize`."""


class Engine(Protocol):
    """The methods that the service needs of an engine. An engine runs from `__aenter__` to `__aexit__`, on one event loop.

    The service may start an engine again after it has stopped it.

    A class that inherits from this one need not define the methods that are not abstract. They fit an engine that works in this
    process, has nothing to start or stop, and has no queue.
    """

    async def __aenter__(self) -> Self:
        """Starts the engine, and returns when the engine can work. Raises `EngineError` if it cannot start."""
        return self

    async def __aexit__(self, *exception: object) -> None:
        """Stops the engine, with all the work that it still does."""
        return None  # noqa: RET501 - for mypy, a method of a protocol that has no body is abstract

    @abstractmethod
    async def prepare(self, request: GenerationRequest) -> PreparedRequest:
        """Returns the request as `generate` takes it. Raises `EngineError`, for example for a prompt that is too long.

        If it is cancelled, it stops as soon as it can, and returns only when no thread works on the request any more.
        """

    @abstractmethod
    async def generate(self, prepared: PreparedRequest, sink: Sink) -> None:
        """Emits `Started`, then deltas and exactly one `GenerationResponseSample` for each index. Raises `EngineError`.

        Returns when all samples have finished. If it is cancelled, it stops the work, whether the request is in the queue, the
        prompt is being read, or text is being generated. The sink ignores events that come after that.
        """

    @abstractmethod
    async def check(self) -> None:
        """Returns once the engine has shown that it works, by generating a token. Raises `EngineError` if it does not work.

        An engine on other machines may return at once instead, so that a check does not start a machine that nobody needs.
        """

    async def tokenize(self, prepared: PreparedRequest) -> Sequence[PromptToken]:  # noqa: ARG002 - for engines that can
        """Returns the tokens of a prompt. Raises `UnsupportedMethodError` if the engine cannot tell them."""
        raise UnsupportedMethodError("Tokenize")

    async def stats(self) -> EngineStats:
        """Returns how busy the engine is. Raises `EngineError` if the engine cannot tell."""
        return EngineStats(backlog=0, num_total_runners=1)

    def is_reachable(self) -> bool:
        """Returns whether the engine takes calls although `stats` fails or takes too long. If not, the engine is unhealthy."""
        return False

    @abstractmethod
    def model(self) -> EngineModel:
        """Returns what the engine runs. The service calls it once the engine has started."""
