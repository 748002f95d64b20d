"""The wire format between a container and a gateway: batches of events as plain data, which go through a `modal.Queue`.

They are plain data and not pickled objects, because the container and the gateway may run different versions of this package.
A token is sent once: the tokens of a sample are sent with its deltas, and the finished sample has the tokens that no delta had.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, TypeAdapter, ValidationError

from flywheel_server.engines.base import EngineFailedError, Event, Started, TextDelta
from flywheel_server.messages import GenerationResponseSample, Int32, Token

_TOKENS: Final = TypeAdapter(tuple[Token, ...])


class _Started(BaseModel):
    event: Literal["started"]
    prompt_tokens: Int32 = 0


class _Delta(BaseModel):
    model_config = ConfigDict(strict=True)

    event: Literal["delta"]
    index: Int32
    text: str
    generated_tokens: Int32
    tokens: Annotated[Sequence[Token], PlainValidator(_TOKENS.validate_python)] = ()


class _Sample(BaseModel):
    model_config = ConfigDict(strict=True)

    event: Literal["sample"]
    sample: GenerationResponseSample


class _EventBatch(BaseModel):
    model_config = ConfigDict(strict=True)

    call: str
    attempt: str
    number: Int32
    events: list[Annotated[_Started | _Delta | _Sample, Field(discriminator="event")]]
    container: str = ""
    ended: bool = False
    leaving: bool = False
    function_call: str = ""


@dataclass(frozen=True, slots=True)
class EventBatch:
    """Events of one call that were sent together, or a heartbeat of a container, which belongs to no call.

    Attributes:
        call: The id that the gateway gave the call.
        attempt: The id of this run of the call. If Modal loses a container, it runs the container's calls again.
        number: How many batches of this attempt were sent before.
        events: The events, in order.
        container: The id of the container that sent the batch; empty if the container has a version without such ids.
        ended: Whether the attempt has failed, so that the gateway asks Modal for its error at once.
        leaving: Whether the container is about to end, which ends all attempts in it.
        function_call: Modal's id of the call, which is needed to cancel it; empty if the container does not send it.
    """

    call: str
    attempt: str
    number: int
    events: list[Event]
    container: str = ""
    ended: bool = False
    leaving: bool = False
    function_call: str = ""

    @classmethod
    def heartbeat(cls, container: str, *, leaving: bool = False) -> Self:
        """Returns a batch that says only that the container is alive or about to end. Older gateways ignore it."""
        return cls("", "", 0, [], container, leaving=leaving)

    def pack(self) -> dict[str, Any]:
        """Returns the batch as plain data, without the optional attributes that are not set."""
        packed = {
            "call": self.call,
            "attempt": self.attempt,
            "number": self.number,
            "events": [_packed(event) for event in self.events],
            "container": self.container,
        }
        optional = {name: getattr(self, name) for name in ("ended", "leaving", "function_call")}
        return packed | {name: value for name, value in optional.items() if value}

    @classmethod
    def unpack(cls, data: Any) -> Self:  # noqa: ANN401 - validated here
        """Returns the batch in the plain data; raises `EngineFailedError` if the data are not a batch."""
        try:
            batch = _EventBatch.model_validate(data)
        except ValidationError as error:
            # The message leaves out the input, which contains generated text.
            problems = error.errors(include_url=False, include_input=False, include_context=False)
            raise EngineFailedError(f"the class sent what is no batch of events: {problems}") from None
        return cls(**{**dict(batch), "events": [_unpacked(event) for event in batch.events]})


class Receipt(BaseModel):
    """What the method returns once it has sent all events.

    Attributes:
        attempt: The id of the attempt that has sent them.
        piles: How many batches the attempt has sent. The name is part of the wire format.
    """

    model_config = ConfigDict(strict=True, frozen=True)

    attempt: str
    piles: Int32


def _packed(event: Event) -> dict[str, Any]:
    match event:
        case Started():
            return {"event": "started", "prompt_tokens": event.prompt_tokens}
        case TextDelta():
            packed = {"event": "delta", "index": event.index, "text": event.text, "generated_tokens": event.generated_tokens}
            return packed | {"tokens": _TOKENS.dump_python(tuple(event.tokens), mode="json")} if event.tokens else packed
        case GenerationResponseSample():
            return {"event": "sample", "sample": event.model_dump(mode="json")}


def _unpacked(event: _Started | _Delta | _Sample) -> Event:
    match event:
        case _Started():
            return Started(event.prompt_tokens)
        case _Delta():
            return TextDelta(event.index, event.text, event.generated_tokens, event.tokens)
        case _Sample():
            return event.sample
