"""The messages of the contract as pydantic models: what a request may hold, and what an engine answers.

They mirror `GenerationRequest`, `GenerationResponseSample` and `GenerationResponse` of MK1 Flywheel. The ranges are the ones in
the comments of `proto/flywheel/v1/generation.proto`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Final, Self, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, ValidationInfo

from flywheel_server.int32 import INT32_MAX

MAX_EOS_TOKEN_IDS: Final = 64
MAX_STOP_SEQUENCES: Final = 16
MAX_STOP_BYTES: Final = 256


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """The limits of a request that differ between deployments: the contract names them, settings and model set them."""

    max_text_bytes: int
    max_num_samples: int
    context_tokens: int


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """A field of a request that is out of range: its path, such as `stop[1]`, and what it must be, in words."""

    field: str
    description: str


class InvalidRequestError(ValueError):
    """Some fields of a request are out of range. Holds every violation."""

    def __init__(self, violations: list[FieldViolation]) -> None:
        super().__init__("; ".join(f"{violation.field} {violation.description}" for violation in violations))
        self.violations = violations


def _utf8(minimum: int, maximum: int) -> AfterValidator:
    """Checks the length of a text in bytes of UTF-8."""

    def check(text: str) -> str:
        if not minimum <= len(text.encode()) <= maximum:
            raise ValueError("length in bytes")
        return text

    return AfterValidator(check)


def _at_most(limit: str) -> AfterValidator:
    """Checks a number, or the length of a text in bytes of UTF-8, against a limit of `RequestLimits`, given by its name."""

    def check(value: Any, info: ValidationInfo) -> Any:  # noqa: ANN401 - as generic as pydantic's validators
        size = len(value.encode()) if isinstance(value, str) else value
        if info.context is not None and size > getattr(info.context, limit):
            raise ValueError(limit)
        return value

    return AfterValidator(check)


@dataclass(frozen=True, slots=True)
class Must:
    """Says for the caller what a field, or an element of a repeated field, must be or have: its range in words.

    A name in braces, such as `{max_text_bytes}`, stands for that limit of `RequestLimits`.
    """

    words: str


Int32 = Annotated[int, Field(ge=0, le=INT32_MAX)]
Penalty = Annotated[float, Field(ge=-2.0, le=2.0, allow_inf_nan=False), Must("be -2 to 2")]
TokenId = Annotated[Int32, Must("be at least 0")]
StopSequence = Annotated[str, _utf8(1, MAX_STOP_BYTES), Must(f"not be empty and have at most {MAX_STOP_BYTES} bytes in UTF-8")]


class Message(BaseModel):
    """A message of a conversation."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    role: str
    content: str


class GenerationRequest(BaseModel):
    """A prompt and how to continue it. Fields, units and defaults are as in the contract.

    Each field has its range, and then the words for a value out of that range.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    text: Annotated[
        str,
        Field(min_length=1),
        _at_most("max_text_bytes"),
        Must("not be empty and have at most {max_text_bytes} bytes in UTF-8"),
    ] = ""
    messages: Annotated[tuple[Annotated[Message, Must("be a message")], ...], Must("be messages")] = ()
    prompt_token_ids: Annotated[tuple[TokenId, ...], Must("be token ids")] = ()
    max_tokens: Annotated[
        int, Field(ge=1, le=INT32_MAX), _at_most("context_tokens"), Must("be 1 to {context_tokens}, the model's context")
    ]
    eos_token_ids: Annotated[
        tuple[TokenId, ...], Field(max_length=MAX_EOS_TOKEN_IDS), Must(f"be at most {MAX_EOS_TOKEN_IDS} token ids")
    ] = ()
    max_input_tokens: Annotated[Int32, Must("be at least 0, where 0 keeps the whole prompt")] = 0
    num_samples: Annotated[int, Field(ge=1, le=INT32_MAX), _at_most("max_num_samples"), Must("be 1 to {max_num_samples}")] = 1
    stop: Annotated[
        tuple[StopSequence, ...], Field(max_length=MAX_STOP_SEQUENCES), Must(f"be at most {MAX_STOP_SEQUENCES} texts")
    ] = ()
    temperature: Annotated[float, Field(ge=0.0, allow_inf_nan=False), Must("be finite and at least 0, where 0 is greedy")] = 1.0
    top_k: Annotated[Int32, Must("be at least 0, where 0 does not restrict")] = 50
    top_p: Annotated[float, Field(gt=0.0, le=1.0, allow_inf_nan=False), Must("be greater than 0 and at most 1")] = 1.0
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0

    @classmethod
    def within(cls, limits: RequestLimits, fields: dict[str, Any]) -> Self:
        """Returns the request with these fields, or raises `InvalidRequestError` with every violation."""
        try:
            return cls.model_validate(fields, context=limits)
        except ValidationError as error:
            violations = _violations(error, limits)
        # Not raised within `except`, because the new error would then hold on to pydantic's. The garbage collector cannot see
        # into an error of pydantic. Such an error holds the errors of our validators, and their frames hold the request.
        raise InvalidRequestError(violations)


def _words() -> Iterator[tuple[str, str]]:
    """Yields the name of each field, or `stop[]` for the elements of a repeated field, and its range in words."""
    for name, field in GenerationRequest.model_fields.items():
        described = {name: field.metadata}
        if get_origin(field.annotation) is tuple:
            described[f"{name}[]"] = get_args(field.annotation)[0].__metadata__
        for path, metadata in described.items():
            yield path, next(f"must {each.words}" for each in metadata if isinstance(each, Must))


_WORDS: Final = dict(_words())


def _violations(error: ValidationError, limits: RequestLimits) -> list[FieldViolation]:
    """Returns one violation for each field that is wrong. Of a repeated field, it names the first wrong element."""
    bounds = asdict(limits)
    violations: dict[str, FieldViolation] = {}
    for name, *index in (map(str, item["loc"]) for item in error.errors(include_url=False, include_input=False)):
        words = _WORDS[f"{name}[]" if index else name].format(**bounds)
        violations.setdefault(name, FieldViolation(f"{name}[{index[0]}]" if index else name, words))
    return list(violations.values())


class GenerationResponseSample(BaseModel):
    """One finished continuation of the prompt. The first four fields are those of Flywheel."""

    model_config = ConfigDict(frozen=True)

    text: str
    generated_tokens: Int32
    finished: float
    finish_reason: str
    index: Int32 = 0
    prompt_tokens: Int32 = 0
    stop_sequence: str = ""


class GenerationResponse(BaseModel):
    """All samples of a request, in the order of their index."""

    model_config = ConfigDict(frozen=True)

    created: float
    finished: float
    num_samples: Int32
    responses: tuple[GenerationResponseSample, ...]
    prompt: str = ""
    prompt_tokens: Int32 = 0

    @classmethod
    def of(cls, request: GenerationRequest, created: float, samples: Sequence[GenerationResponseSample]) -> Self:
        """Returns the response to a request that was accepted at `created`, with its samples in any order."""
        return cls(
            created=created,
            finished=max(sample.finished for sample in samples),
            num_samples=len(samples),
            responses=tuple(sorted(samples, key=lambda sample: sample.index)),
            prompt=request.text,
            prompt_tokens=samples[0].prompt_tokens,
        )
