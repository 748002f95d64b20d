"""The messages of the contract as pydantic models: what a request may hold, and what an engine answers.

They mirror `GenerationRequest`, `GenerationResponseSample` and `GenerationResponse` of MK1 Flywheel, with the ranges that
the comments in `proto/flywheel/v1/generation.proto` state.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Final, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, ValidationInfo

from flywheel_server.int32 import INT32_MAX

MAX_EOS_TOKEN_IDS: Final = 64
MAX_STOP_SEQUENCES: Final = 16
MAX_STOP_BYTES: Final = 256

_ACCEPTED: Final = {
    "text": "must not be empty and have at most {max_text_bytes} bytes in UTF-8",
    "max_tokens": "must be 1 to {context_tokens}, the model's context",
    "eos_token_ids": f"must be at most {MAX_EOS_TOKEN_IDS} token ids",
    "eos_token_ids[]": "must be at least 0",
    "max_input_tokens": "must be at least 0, where 0 keeps the whole prompt",
    "num_samples": "must be 1 to {max_num_samples}",
    "stop": f"must be at most {MAX_STOP_SEQUENCES} texts",
    "stop[]": f"must not be empty and have at most {MAX_STOP_BYTES} bytes in UTF-8",
    "temperature": "must be finite and at least 0, where 0 is greedy",
    "top_k": "must be at least 0, where 0 does not restrict",
    "top_p": "must be greater than 0 and at most 1",
    "presence_penalty": "must be -2 to 2",
    "frequency_penalty": "must be -2 to 2",
}
"""What is accepted of each field, and of each element of a repeated one, in words for the caller."""


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """The limits of a request that belong to the deployment: the contract names them, settings and model set them."""

    max_text_bytes: int
    max_num_samples: int
    context_tokens: int


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One field of a request that is not as it must be: its path, such as `stop[1]`, and what is accepted."""

    field: str
    description: str


class InvalidRequestError(ValueError):
    """A request whose fields are out of range; holds every violation."""

    def __init__(self, violations: list[FieldViolation]) -> None:
        super().__init__("; ".join(f"{violation.field} {violation.description}" for violation in violations))
        self.violations = violations


def _utf8(minimum: int, maximum: int) -> AfterValidator:
    def check(text: str) -> str:
        if not minimum <= len(text.encode()) <= maximum:
            raise ValueError("length in bytes")
        return text

    return AfterValidator(check)


def _at_most(limit: str) -> AfterValidator:
    """Checks a number, or the length of a text in bytes of UTF-8, against the named one of `RequestLimits`."""

    def check(value: Any, info: ValidationInfo) -> Any:  # noqa: ANN401 - as generic as pydantic's validators
        size = len(value.encode()) if isinstance(value, str) else value
        if info.context is not None and size > getattr(info.context, limit):
            raise ValueError(limit)
        return value

    return AfterValidator(check)


Int32 = Annotated[int, Field(ge=0, le=INT32_MAX)]
Penalty = Annotated[float, Field(ge=-2.0, le=2.0, allow_inf_nan=False)]
StopSequence = Annotated[str, _utf8(1, MAX_STOP_BYTES)]


class GenerationRequest(BaseModel):
    """A prompt and how to continue it; the fields, units and defaults are those of the contract."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    text: Annotated[str, Field(min_length=1), _at_most("max_text_bytes")]
    max_tokens: Annotated[int, Field(ge=1, le=INT32_MAX), _at_most("context_tokens")]
    eos_token_ids: tuple[Int32, ...] = Field(default=(), max_length=MAX_EOS_TOKEN_IDS)
    max_input_tokens: Int32 = 0
    num_samples: Annotated[int, Field(ge=1, le=INT32_MAX), _at_most("max_num_samples")] = 1
    stop: tuple[StopSequence, ...] = Field(default=(), max_length=MAX_STOP_SEQUENCES)
    temperature: float = Field(default=1.0, ge=0.0, allow_inf_nan=False)
    top_k: Int32 = 50
    top_p: float = Field(default=1.0, gt=0.0, le=1.0, allow_inf_nan=False)
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0

    @classmethod
    def within(cls, limits: RequestLimits, fields: dict[str, Any]) -> Self:
        """Returns the request with these fields, or raises `InvalidRequestError` with every violation."""
        try:
            return cls.model_validate(fields, context=limits)
        except ValidationError as error:
            violations = _violations(error, limits)
        # Not while that error is handled, of which it would then hold on to: an error of pydantic's is out of sight for the
        # garbage collector, and has those of our validators, whose frames lead back to it, and to the request.
        raise InvalidRequestError(violations)


def _violations(error: ValidationError, limits: RequestLimits) -> list[FieldViolation]:
    """Returns one violation for each field that is wrong; of a repeated field, the first that is wrong of its elements."""
    bounds = asdict(limits)
    violations: dict[str, FieldViolation] = {}
    for name, *index in (map(str, item["loc"]) for item in error.errors(include_url=False, include_input=False)):
        accepted = _ACCEPTED[f"{name}[]" if index else name].format(**bounds)
        violations.setdefault(name, FieldViolation(f"{name}[{index[0]}]" if index else name, accepted))
    return list(violations.values())


class GenerationResponseSample(BaseModel):
    """One finished continuation of the prompt; the first four fields are Flywheel's."""

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
        """Returns the response to a request that was accepted at `created`, with its samples in whichever order."""
        return cls(
            created=created,
            finished=max(sample.finished for sample in samples),
            num_samples=len(samples),
            responses=tuple(sorted(samples, key=lambda sample: sample.index)),
            prompt=request.text,
            prompt_tokens=samples[0].prompt_tokens,
        )
