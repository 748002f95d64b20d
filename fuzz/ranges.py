"""The ranges of the contract, written down apart from the server: fuzzing and tests compare the server with them."""

import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from flywheel_proto.v1 import generation_pb2 as pb
from flywheel_server.messages import RequestLimits

INT32_MAX: Final = 2**31 - 1
FLOAT_MAX: Final = (2 - 2**-23) * 2**127
FLOAT_MIN: Final = 2**-149
"""The highest finite float of 32 bits, and the lowest above 0."""

PROMPTS: Final = ("text", "messages", "prompt_token_ids")
"""The fields of which a request has exactly one."""
CONSTRAINTS: Final = ("json_schema", "regex", "choices")
"""The fields of which a message has only the last, because they are a oneof."""


@dataclass(frozen=True)
class Integers:
    """Whole numbers of 32 bits, from `lowest` to `highest`."""

    lowest: int
    highest: int = INT32_MAX

    def accepts(self, value: Any) -> bool:  # noqa: ANN401 - the value of any field
        """Returns whether the value is in the range."""
        return bool(self.lowest <= value <= self.highest)

    def wrong(self) -> list[tuple[str, Any]]:
        """Returns values out of the range, each with the end of its path in a violation: such as `[1]`, or nothing."""
        return [("", value) for value in (self.lowest - 1, self.highest + 1) if value <= INT32_MAX]


@dataclass(frozen=True)
class Floats:
    """Finite numbers from `lowest` to `highest`, of 32 bits if those are."""

    lowest: float
    highest: float = FLOAT_MAX

    def accepts(self, value: Any) -> bool:  # noqa: ANN401 - the value of any field
        """Returns whether the value is in the range."""
        return bool(self.lowest <= value <= self.highest)

    def wrong(self) -> list[tuple[str, Any]]:
        """Returns values out of the range; see `Integers.wrong`."""
        values = (0.0, self.lowest - 0.1, self.highest + 0.01, math.nan, math.inf, -math.inf)
        return [("", value) for value in values if not self.accepts(value)]


@dataclass(frozen=True)
class Texts:
    """Texts of 1 to `max_bytes` bytes in UTF-8."""

    max_bytes: int

    @property
    def lowest(self) -> str:
        """One of the shortest texts."""
        return "x"

    @property
    def highest(self) -> str:
        """One of the longest texts."""
        return "é" * (self.max_bytes // 2)

    def accepts(self, value: Any) -> bool:  # noqa: ANN401 - the value of any field
        """Returns whether the value is in the range."""
        return 1 <= len(value.encode()) <= self.max_bytes

    def wrong(self) -> list[tuple[str, Any]]:
        """Returns values out of the range; see `Integers.wrong`."""
        return [("", ""), ("", "é" * (self.max_bytes // 2 + 1))]


@dataclass(frozen=True)
class Repeated:
    """At most `max_elements` elements, each of them in its range."""

    element: Integers | Texts
    max_elements: int

    @property
    def lowest(self) -> Sequence[Any]:
        """One element, the lowest."""
        return [self.element.lowest]

    @property
    def highest(self) -> Sequence[Any]:
        """The most elements, each the highest."""
        return [self.element.highest] * self.max_elements

    def accepts(self, value: Any) -> bool:  # noqa: ANN401 - the value of any field
        """Returns whether the values are in the range."""
        return len(value) <= self.max_elements and all(map(self.element.accepts, value))

    def wrong(self) -> list[tuple[str, Any]]:
        """Returns values out of the range; see `Integers.wrong`."""
        elements = [("[1]", [self.element.lowest, wrong]) for _, wrong in self.element.wrong()]
        return [*elements, ("", [self.element.lowest] * (self.max_elements + 1))]


@dataclass(frozen=True)
class Messages:
    """At most 256 messages, whose contents together have at most `max_bytes` bytes in UTF-8."""

    max_bytes: int

    @property
    def lowest(self) -> Sequence[pb.Message]:
        """One empty message of the shortest role."""
        return [pb.Message(role="u")]

    @property
    def highest(self) -> Sequence[pb.Message]:
        """The most messages, of the longest role, with the longest content."""
        return [pb.Message(role="r" * 32)] * 255 + [pb.Message(role="user", content="é" * (self.max_bytes // 2))]

    def accepts(self, value: Iterable[pb.Message]) -> bool:
        """Returns whether the messages are in the range."""
        messages = list(value)
        roles = all(len(each.role) <= 32 and re.fullmatch("[a-z]+(_[a-z]+)*", each.role) for each in messages)
        return roles and len(messages) <= 256 and _bytes(each.content for each in messages) <= self.max_bytes

    def wrong(self) -> list[tuple[str, Any]]:
        """Returns values out of the range; see `Integers.wrong`."""
        good = pb.Message(role="user", content="x")
        roles = ["", "User", "user ", "_", "a__b", "usér", "r" * 33, "r" * 10_000, "user\n", "<|im_end|>"]
        too_long = pb.Message(role="user", content="é" * (self.max_bytes // 2))
        return [("[1].role", [good, pb.Message(role=role)]) for role in roles] + [("", [good] * 257), ("", [good, too_long])]


@dataclass(frozen=True)
class Biases:
    """At most 300 numbers from -100 to 100, by token ids."""

    lowest: Mapping[int, float]
    highest: Mapping[int, float]

    def accepts(self, value: Mapping[int, float]) -> bool:
        """Returns whether the numbers and their token ids are in the range."""
        return len(value) <= 300 and all(key >= 0 and -100 <= bias <= 100 for key, bias in value.items())

    def wrong(self) -> list[tuple[str, Any]]:
        """Returns values out of the range; see `Integers.wrong`."""
        numbers = [100.01, -100.01, math.nan, math.inf, -math.inf]
        return [
            *(("[7]", {7: number}) for number in numbers),
            ("[-1]", {-1: 0.0}),
            ("", dict.fromkeys(range(301), 0.0)),
        ]


@dataclass(frozen=True)
class Choices:
    """1 to 1000 texts that are not empty, no two the same, together of at most `max_bytes` bytes in UTF-8."""

    max_bytes: int

    @property
    def lowest(self) -> pb.Choices:
        """One text, the shortest."""
        return pb.Choices(texts=["x"])

    @property
    def highest(self) -> pb.Choices:
        """The most texts, together the longest."""
        length = self.max_bytes // 1000
        return pb.Choices(texts=[f"{number:0{length}}" for number in range(1000)])

    def accepts(self, value: pb.Choices) -> bool:
        """Returns whether the texts are in the range."""
        texts = list(value.texts)
        return 1 <= len(texts) <= 1000 and all(texts) and len({*texts}) == len(texts) and _bytes(texts) <= self.max_bytes

    def wrong(self) -> list[tuple[str, Any]]:
        """Returns values out of the range; see `Integers.wrong`."""
        several: Any = (["x", "x"], [], [str(number) for number in range(1001)], ["é" * (self.max_bytes // 2), "x"])
        return [("[1]", pb.Choices(texts=["x", ""])), *(("", pb.Choices(texts=texts)) for texts in several)]


def _bytes(texts: Iterable[str]) -> int:
    return sum(len(text.encode()) for text in texts)


Range = Integers | Floats | Texts | Repeated | Messages | Biases | Choices


def ranges(limits: RequestLimits) -> Mapping[str, Range]:
    """Returns the range of each field of a request, in a deployment with these limits."""
    return {
        "text": Texts(limits.max_text_bytes),
        "max_tokens": Integers(1, limits.context_tokens),
        "eos_token_ids": Repeated(Integers(0), max_elements=64),
        "max_input_tokens": Integers(0),
        "num_samples": Integers(1, limits.max_num_samples),
        "stop": Repeated(Texts(256), max_elements=16),
        "temperature": Floats(0),
        "top_k": Integers(0),
        "top_p": Floats(FLOAT_MIN, 1),
        "presence_penalty": Floats(-2, 2),
        "frequency_penalty": Floats(-2, 2),
        "messages": Messages(limits.max_text_bytes),
        "prompt_token_ids": Repeated(Integers(0), max_elements=limits.context_tokens),
        "seed": Integers(0),
        "min_p": Floats(0, 1),
        "repetition_penalty": Floats(FLOAT_MIN),
        "logit_bias": Biases({0: -100.0}, dict.fromkeys(range(INT32_MAX - 299, INT32_MAX + 1), 100.0)),
        "json_schema": Texts(2**16),
        "regex": Texts(2**16),
        "choices": Choices(2**16),
        "logprobs": Integers(0, 20),
        "time_limit": Floats(0, sys.float_info.max),
        "priority": Integers(-1000, 0),
    }


def lowest(fields: Mapping[str, Range]) -> dict[str, Any]:
    """Returns the lowest value of each field."""
    return {name: its.lowest for name, its in fields.items()}


def highest(fields: Mapping[str, Range]) -> dict[str, Any]:
    """Returns the highest value of each field."""
    return {name: its.highest for name, its in fields.items()}


def with_required(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields, with a prompt and `max_tokens` if they have none."""
    prompt = {} if any(name in fields for name in PROMPTS) else {"text": "x"}
    return {**prompt, "max_tokens": 1, **fields}


def is_sent(message: pb.GenerationRequest, name: str) -> bool:
    """Returns whether the message has a value for the field. A field without presence always has one, if only zero."""
    return not message.DESCRIPTOR.fields_by_name[name].has_presence or message.HasField(name)  # type: ignore[arg-type]


def wrong_fields(message: pb.GenerationRequest, its_ranges: Mapping[str, Range]) -> set[str]:
    """Returns the names of the fields for which the server must refuse a message."""
    prompts = {name for name in PROMPTS if getattr(message, name)}
    wrong = {
        name
        for name, its in its_ranges.items()
        if is_sent(message, name) and not its.accepts(getattr(message, name)) and (name != "text" or message.text)
    }
    return wrong | (prompts or {"text"} if len(prompts) != 1 else set())
