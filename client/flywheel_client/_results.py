"""The results of calls: the messages of the contract as frozen dataclasses, with the same fields.

`flywheel/v1/generation.proto` defines each field. Times are seconds since the epoch, by the server's clock.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from operator import attrgetter
from typing import Any, Final, TypeVar

from flywheel_proto.v1 import generation_pb2

ResultT = TypeVar("ResultT")


@dataclass(frozen=True, slots=True)
class Sample:
    """A finished continuation of the prompt: its whole text, without the prompt."""

    text: str
    generated_tokens: int
    finished: float
    finish_reason: str
    index: int
    prompt_tokens: int
    stop_sequence: str


@dataclass(frozen=True, slots=True)
class Delta:
    """The next piece of the text of the sample `index`.

    `generated_tokens` counts the tokens of this sample so far. Only the last delta of a sample has a `finish_reason`, and only
    this delta sets `finished`, `prompt_tokens` and `stop_sequence`. In all other deltas they are 0 or empty.
    """

    index: int
    text: str
    generated_tokens: int
    finished: float
    finish_reason: str
    prompt_tokens: int
    stop_sequence: str


@dataclass(frozen=True, slots=True)
class Response:
    """All samples of a request, in the order of their index."""

    created: float
    finished: float
    num_samples: int
    responses: tuple[Sample, ...]
    prompt: str
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of a request; lengths are bytes of UTF-8."""

    max_text_bytes: int
    max_num_samples: int
    max_eos_token_ids: int
    max_stop_sequences: int
    max_stop_bytes: int


@dataclass(frozen=True, slots=True)
class Defaults:
    """The values of unset fields of a request, for the fields whose default is not zero."""

    num_samples: int
    temperature: float
    top_k: int
    top_p: float


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


@dataclass(frozen=True, slots=True)
class Stats:
    """How busy the service is: first the requests and runners of the engine, then the calls of this server."""

    backlog: int
    num_total_runners: int
    active: int
    queued: int


def _result_reader(kind: type[ResultT]) -> Callable[[Any], ResultT]:
    """Returns a function that makes a result from a message by copying the fields."""
    values = attrgetter(*(each.name for each in fields(kind)))  # type: ignore[arg-type]
    return lambda message: kind(*values(message))


sample_from: Final[Callable[[generation_pb2.GenerationResponseSample], Sample]] = _result_reader(Sample)
delta_from: Final[Callable[[generation_pb2.GenerationDelta], Delta]] = _result_reader(Delta)
stats_from: Final[Callable[[generation_pb2.Stats], Stats]] = _result_reader(Stats)
_limits_from: Final[Callable[[generation_pb2.Limits], Limits]] = _result_reader(Limits)
_defaults_from: Final[Callable[[generation_pb2.Defaults], Defaults]] = _result_reader(Defaults)


def response_from(message: generation_pb2.GenerationResponse) -> Response:
    """Returns the response that a message holds."""
    return Response(
        created=message.created,
        finished=message.finished,
        num_samples=message.num_samples,
        responses=tuple(map(sample_from, message.responses)),
        prompt=message.prompt,
        prompt_tokens=message.prompt_tokens,
    )


def model_from(message: generation_pb2.Model) -> Model:
    """Returns the model that a message describes."""
    return Model(
        name=message.name,
        engine=message.engine,
        context_tokens=message.context_tokens,
        limits=_limits_from(message.limits),
        defaults=_defaults_from(message.defaults),
        penalizes_prompt=message.penalizes_prompt,
        prompt_format=message.prompt_format,
    )
