"""The messages of the contract as pydantic models: what a request may hold, and what an engine answers.

They mirror `GenerationRequest`, `GenerationResponseSample` and `GenerationResponse` of MK1 Flywheel. The ranges are the ones in
the comments of `proto/flywheel/v1/generation.proto`.
"""

from base64 import b64decode, b64encode
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    PlainSerializer,
    ValidationInfo,
    model_validator,
)

from flywheel_server.int32 import INT32_MAX

MAX_EOS_TOKEN_IDS: Final = 64
MAX_STOP_SEQUENCES: Final = 16
MAX_STOP_BYTES: Final = 256
MAX_MESSAGES: Final = 256
MAX_ROLE_CHARACTERS: Final = 32
MAX_LOGIT_BIAS: Final = 300
MAX_CONSTRAINT_BYTES: Final = 2**16
MAX_CHOICES: Final = 1000
MAX_LOGPROBS: Final = 20
MIN_PRIORITY: Final = -1000
MAX_VIOLATIONS: Final = 32
"""How many violations a refused request is told of."""

FLYWHEEL_FIELDS: Final = frozenset(
    {
        "text",
        "max_tokens",
        "eos_token_ids",
        "max_input_tokens",
        "num_samples",
        "stop",
        "temperature",
        "top_k",
        "top_p",
        "presence_penalty",
        "frequency_penalty",
    }
)
"""The fields of MK1 Flywheel's `generate`."""
SERVER_FIELDS: Final = frozenset({"priority"})
"""The fields that the server itself honours, with every engine."""

BYTES_PER_TOKEN: Final = 4
"""An estimate of the bytes of text in a token."""

PROMPT_FIELDS: Final = ("text", "messages", "prompt_token_ids")
"""The fields of which a request has exactly one."""
CONSTRAINT_FIELDS: Final = ("json_schema", "regex", "choices")
"""The fields of which a request has at most one."""
_EXCLUSIVE: Final = frozenset({*PROMPT_FIELDS, *CONSTRAINT_FIELDS} - {"text"})


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """The limits of a request that differ between deployments: the contract names them, settings and model set them.

    `supported_fields` are the fields that the engine honours.
    """

    max_text_bytes: int
    max_num_samples: int
    context_tokens: int
    supported_fields: frozenset[str] = FLYWHEEL_FIELDS


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """A field of a request that is out of range: its path, such as `stop[1]`, and what it must be, in words."""

    field: str
    description: str


class InvalidRequestError(ValueError):
    """Some fields of a request are out of range, or are not supported.

    Attributes:
        violations: Every violation that is known.
        unsupported: The names of the fields among them that the engine does not honour.
        unchecked: The fields that only the engine can check, as a request of their own; None if there are none.
    """

    def __init__(
        self,
        violations: Sequence[FieldViolation],
        unsupported: Sequence[str] = (),
        unchecked: "GenerationRequest | None" = None,
    ) -> None:
        super().__init__("; ".join(f"{each.field} {each.description}" for each in violations[:MAX_VIOLATIONS]))
        self.violations = violations
        self.unsupported = unsupported
        self.unchecked = unchecked


def _utf8(minimum: int, maximum: int) -> AfterValidator:
    """Checks the length of a text in bytes of UTF-8."""

    def check(text: str | None) -> str | None:
        if text is not None and not minimum <= len(text.encode()) <= maximum:
            raise ValueError("length in bytes")
        return text

    return AfterValidator(check)


def _together(count: Callable[[Any], int], limit: int | str) -> AfterValidator:
    """Checks the sum of a number for each element against a limit; a limit of `RequestLimits` is given by its name."""

    def check(elements: Sequence[Any] | None, info: ValidationInfo) -> Sequence[Any] | None:
        most = limit if isinstance(limit, int) else getattr(info.context, limit, None)
        if most is not None and sum(map(count, elements or ())) > most:
            raise ValueError(limit)
        return elements

    return AfterValidator(check)


def _distinct(texts: tuple[str, ...] | None) -> tuple[str, ...] | None:
    if texts is not None and len({*texts}) < len(texts):
        raise ValueError("distinct")
    return texts


def _at_most(limit: str) -> AfterValidator:
    """Checks a number, a length in elements, or in bytes of UTF-8, against a limit of `RequestLimits`, given by its name."""

    def check(value: Any, info: ValidationInfo) -> Any:  # noqa: ANN401 - as generic as pydantic's validators
        size = len(value.encode()) if isinstance(value, str) else len(value) if isinstance(value, tuple) else value
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


_TEXT_WORDS: Final = "not be empty and have at most {max_text_bytes} bytes in UTF-8"
_CONSTRAINT_LENGTH: Final = _utf8(1, MAX_CONSTRAINT_BYTES)
_CONSTRAINT_WORDS: Final = f"not be empty and have at most {MAX_CONSTRAINT_BYTES} bytes in UTF-8"
_BIAS_WORDS: Final = "have an id of at least 0 and a value of -100 to 100"
_ROLE: Final = r"^[a-z]+(_[a-z]+)*$"


class Message(BaseModel):
    """One message of a conversation."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    role: Annotated[
        str,
        Field(pattern=_ROLE, max_length=MAX_ROLE_CHARACTERS),
        Must(f"be lower-case letters with single underscores between them, at most {MAX_ROLE_CHARACTERS} characters"),
    ]
    content: Annotated[str, Must("be a text")] = ""


class GenerationRequest(BaseModel):
    """A prompt and how to continue it. Fields, units and defaults are as in the contract.

    Each field has its range, and then the words for a value out of that range.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    text: Annotated[str, _at_most("max_text_bytes"), Must(_TEXT_WORDS)] = ""
    max_tokens: Annotated[
        int, Field(ge=1, le=INT32_MAX), _at_most("context_tokens"), Must("be 1 to {context_tokens}, the model's context")
    ]
    eos_token_ids: Annotated[
        tuple[TokenId, ...], Field(max_length=MAX_EOS_TOKEN_IDS), Must(f"be at most {MAX_EOS_TOKEN_IDS} token ids")
    ] = ()
    max_input_tokens: Annotated[Int32, Must("be at least 0, where 0 keeps the whole prompt")] = 0
    num_samples: Annotated[int, Field(ge=1, le=INT32_MAX), _at_most("max_num_samples"), Must("be 1 to {max_num_samples}")] = 1
    stop: Annotated[
        tuple[StopSequence, ...],
        Field(max_length=MAX_STOP_SEQUENCES),
        Must(f"be at most {MAX_STOP_SEQUENCES} texts"),
    ] = ()
    temperature: Annotated[float, Field(ge=0.0, allow_inf_nan=False), Must("be finite and at least 0, where 0 is greedy")] = 1.0
    top_k: Annotated[Int32, Must("be at least 0, where 0 does not restrict")] = 50
    top_p: Annotated[float, Field(gt=0.0, le=1.0, allow_inf_nan=False), Must("be greater than 0 and at most 1")] = 1.0
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    messages: Annotated[
        tuple[Message, ...],
        Field(max_length=MAX_MESSAGES),
        _together(lambda message: len(message.content.encode()), "max_text_bytes"),
        Must(f"be at most {MAX_MESSAGES} messages, whose contents together have at most {{max_text_bytes}} bytes in UTF-8"),
    ] = ()
    prompt_token_ids: Annotated[
        tuple[TokenId, ...],
        FailFast(),  # there may be so many ids that it takes too long to describe each wrong one
        _at_most("context_tokens"),
        Must("be at most {context_tokens} token ids, the model's context"),
    ] = ()
    seed: Annotated[Int32 | None, Must(f"be 0 to {INT32_MAX}")] = None
    min_p: Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False), Must("be 0 to 1, where 0 does not restrict")] = 0.0
    repetition_penalty: Annotated[
        float, Field(gt=0.0, allow_inf_nan=False), Must("be finite and greater than 0, where 1 changes nothing")
    ] = 1.0
    logit_bias: Annotated[
        dict[Int32, Annotated[float, Field(ge=-100.0, le=100.0, allow_inf_nan=False), Must(_BIAS_WORDS)]],
        Field(max_length=MAX_LOGIT_BIAS),
        Must(f"be at most {MAX_LOGIT_BIAS} token ids"),
    ] = Field(default_factory=dict)  # of a dictionary as the default, pydantic would make a deep copy for each request
    json_schema: Annotated[str | None, _CONSTRAINT_LENGTH, Must(_CONSTRAINT_WORDS)] = None
    regex: Annotated[str | None, _CONSTRAINT_LENGTH, Must(_CONSTRAINT_WORDS)] = None
    choices: Annotated[
        tuple[Annotated[str, Field(min_length=1), Must("not be empty")], ...] | None,
        Field(min_length=1, max_length=MAX_CHOICES),
        _together(lambda text: len(text.encode()), MAX_CONSTRAINT_BYTES),
        AfterValidator(_distinct),
        Must(f"be 1 to {MAX_CHOICES} texts, no two the same, together at most {MAX_CONSTRAINT_BYTES} bytes in UTF-8"),
    ] = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS), Must(f"be 0 to {MAX_LOGPROBS}, where 0 returns no tokens")] = 0
    time_limit: Annotated[
        float, Field(ge=0.0, allow_inf_nan=False), Must("be finite and at least 0 seconds, where 0 sets no limit")
    ] = 0.0
    priority: Annotated[int, Field(ge=MIN_PRIORITY, le=0), Must(f"be {MIN_PRIORITY} to 0")] = 0

    @property
    def prompt_field(self) -> str:
        """The name of the field that has the prompt."""
        return next(name for name in PROMPT_FIELDS if getattr(self, name))

    @property
    def prompt_bytes(self) -> int:
        """The length of the prompt's texts in bytes of UTF-8; of token ids, an estimate of their text's length."""
        if self.prompt_token_ids:
            return BYTES_PER_TOKEN * len(self.prompt_token_ids)
        return len(self.text.encode()) + sum(len(message.content.encode()) for message in self.messages)

    @model_validator(mode="after")
    def _check_combination(self) -> Self:
        # Nothing can be wrong with a text alone, which most requests have.
        is_text_alone = self.text and _EXCLUSIVE.isdisjoint(self.model_fields_set)
        if not is_text_alone and (violations := wrong_combinations(self.__dict__)):
            raise ValueError(str(InvalidRequestError(violations)))
        return self


def wrong_combinations(fields: Mapping[str, Any], prompt_fields: Sequence[str] = PROMPT_FIELDS) -> list[FieldViolation]:
    """Returns the violations of fields that exclude each other, or of which one is required."""
    prompts = [name for name in prompt_fields if fields.get(name)]
    constraints = [name for name in CONSTRAINT_FIELDS if fields.get(name) is not None]
    violations = [] if prompts else [FieldViolation("text", f"must {_TEXT_WORDS}")]
    for given, group in ((prompts, prompt_fields), (constraints, CONSTRAINT_FIELDS)):
        if len(given) > 1:
            alone = f"must be the only one of {', '.join(group[:-1])} and {group[-1]}"
            violations += [FieldViolation(name, alone) for name in given]
    return violations


TokenBytes = Annotated[
    bytes,
    PlainSerializer(lambda text: b64encode(text).decode(), return_type=str, when_used="json"),
    BeforeValidator(lambda text: b64decode(text, validate=True) if isinstance(text, str) else text),
]
"""The bytes of a token, which need not be UTF-8. In plain data, they are a text in base64."""


@dataclass(frozen=True, slots=True)
class LikelyToken:
    """A token that may follow a text: its id, its bytes, and the natural logarithm of its probability."""

    id: int
    text: TokenBytes
    logprob: float


@dataclass(frozen=True, slots=True)
class Token:
    """A generated token: its id, its bytes, the natural logarithm of its probability, and the likeliest tokens at its place."""

    id: int
    text: TokenBytes
    logprob: float
    likeliest: tuple[LikelyToken, ...] = ()


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
    seed: Int32 = 0
    tokens: tuple[Token, ...] = ()


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
