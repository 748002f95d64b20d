"""The results of calls: the messages of the contract as frozen dataclasses, with the same fields.

`flywheel/v1/generation.proto` defines each field. Times are seconds since the epoch, by the server's clock.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from operator import attrgetter
from typing import Any, Final, TypeVar

from flywheel_proto.v1 import generation_pb2

from flywheel_client._errors import FlywheelError

ResultT = TypeVar("ResultT")


@dataclass(frozen=True, slots=True)
class LikelyToken:
    """One of the likeliest tokens at a place of a text: its bytes, and the natural logarithm of its probability."""

    id: int
    text: bytes
    logprob: float


@dataclass(frozen=True, slots=True)
class Token:
    """A generated token: its bytes, the natural logarithm of its probability, and the likeliest tokens at this place.

    The bytes may be a part of a character. The probability is the model's own, before temperature and other settings.
    """

    id: int
    text: bytes
    logprob: float
    likeliest: tuple[LikelyToken, ...] = ()


@dataclass(frozen=True, slots=True)
class Sample:
    """A finished continuation of the prompt: its whole text, without the prompt.

    There are `tokens` only if the request has `logprobs`. `seed` repeats the sample, as far as `Model.exact_seeds` promises.
    """

    text: str
    generated_tokens: int
    finished: float
    finish_reason: str
    index: int
    prompt_tokens: int
    stop_sequence: str
    seed: int = 0
    tokens: tuple[Token, ...] = ()


@dataclass(frozen=True, slots=True)
class Delta:
    """The next piece of the text of the sample `index`.

    `generated_tokens` counts the tokens of this sample so far. Only the last delta of a sample has a `finish_reason`, and only
    this delta sets `finished`, `stop_sequence` and `seed`. In all other deltas they are 0 or empty. Only the first and the last
    delta set `prompt_tokens`. There are `tokens`, of the text of this delta, only if the request has `logprobs`.
    """

    index: int
    text: str
    generated_tokens: int
    finished: float
    finish_reason: str
    prompt_tokens: int
    stop_sequence: str
    seed: int = 0
    tokens: tuple[Token, ...] = ()


@dataclass(frozen=True, slots=True)
class Response:
    """All samples of a request, in the order of their index. `prompt` is empty unless the prompt was sent as a text."""

    created: float
    finished: float
    num_samples: int
    responses: tuple[Sample, ...]
    prompt: str
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class PromptResult:
    """The outcome of one prompt of `generate_many`: a response, or the error of a call that failed.

    `position` is the place of the prompt among the prompts, from 0 on.
    """

    position: int
    outcome: Response | FlywheelError

    @property
    def response(self) -> Response:
        """The response; raises the `FlywheelError` of a call that failed."""
        if isinstance(self.outcome, FlywheelError):
            raise self.outcome
        return self.outcome

    @property
    def error(self) -> FlywheelError | None:
        """The error of a call that failed, else None."""
        return self.outcome if isinstance(self.outcome, FlywheelError) else None


@dataclass(frozen=True, slots=True)
class PromptToken:
    """A token of a prompt, with its bytes, which may be a part of a character."""

    id: int
    text: bytes


@dataclass(frozen=True, slots=True)
class Tokens:
    """The tokens of a prompt, as a generation with this prompt reads them."""

    prompt_tokens: int
    tokens: tuple[PromptToken, ...]


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of a request; lengths are bytes of UTF-8. A server that is older than a limit leaves it at 0."""

    max_text_bytes: int
    max_num_samples: int
    max_eos_token_ids: int
    max_stop_sequences: int
    max_stop_bytes: int
    max_messages: int = 0
    max_logit_bias: int = 0
    max_constraint_bytes: int = 0
    max_choices: int = 0
    max_logprobs: int = 0


@dataclass(frozen=True, slots=True)
class Defaults:
    """The values of unset fields of a request, for the fields whose default is not zero.

    A server that is older than a field leaves its default at 0.
    """

    num_samples: int
    temperature: float
    top_k: int
    top_p: float
    repetition_penalty: float = 0.0


@dataclass(frozen=True, slots=True)
class Model:
    """The model, the engine that runs it, the limits of a request and the defaults of unset fields."""

    name: str
    engine: str
    context_tokens: int
    limits: Limits
    defaults: Defaults
    penalizes_prompt: bool
    prompt_format: str
    supported_fields: tuple[str, ...] = ()
    """The fields of a request that the server supports; it refuses a request with any other field, by name.

    Empty if the server is older than this list. Such a server ignores every field that is newer than `frequency_penalty`, such
    as `messages` or `json_schema`. The client sends the request anyway, because asking costs a call. So ask once, before you
    rely on such a field: `if "json_schema" not in client.model().supported_fields: …`.
    """
    exact_seeds: bool = False
    """Whether samples of a request with a seed are exactly repeatable on this server."""


@dataclass(frozen=True, slots=True)
class Stats:
    """How busy the service is: first the requests and runners of the engine, then the calls of this server."""

    backlog: int
    num_total_runners: int
    active: int
    queued: int


def _result_reader(kind: type[ResultT], **readers: Callable[[Any], object]) -> Callable[[Any], ResultT]:
    """Returns a function that makes a result from a message by copying the fields.

    Args:
        kind: The class of the result.
        readers: Functions that make the values of fields that cannot be copied, by the names of the fields.
    """
    names = [each.name for each in fields(kind)]  # type: ignore[arg-type]
    values = attrgetter(*names)
    places = [(names.index(name), reader) for name, reader in readers.items()]

    def read(message: Any) -> ResultT:  # noqa: ANN401 - a message of the contract
        made = list(values(message))
        for place, reader in places:
            made[place] = reader(made[place])
        return kind(*made)

    return read


def _each(reader: Callable[[Any], ResultT]) -> Callable[[Any], tuple[ResultT, ...]]:
    return lambda messages: tuple(map(reader, messages))


_tokens_from: Final = _each(_result_reader(Token, likeliest=_each(_result_reader(LikelyToken))))
sample_from: Final[Callable[[generation_pb2.GenerationResponseSample], Sample]] = _result_reader(Sample, tokens=_tokens_from)
delta_from: Final[Callable[[generation_pb2.GenerationDelta], Delta]] = _result_reader(Delta, tokens=_tokens_from)
response_from: Final[Callable[[generation_pb2.GenerationResponse], Response]] = _result_reader(
    Response, responses=_each(sample_from)
)
tokens_from: Final[Callable[[generation_pb2.TokenizeResponse], Tokens]] = _result_reader(
    Tokens, tokens=_each(_result_reader(PromptToken))
)
stats_from: Final[Callable[[generation_pb2.Stats], Stats]] = _result_reader(Stats)
model_from: Final[Callable[[generation_pb2.Model], Model]] = _result_reader(
    Model, limits=_result_reader(Limits), defaults=_result_reader(Defaults), supported_fields=tuple
)
