"""The events of a generation as plain data, for the queue that brings them from another container.

Plain data, rather than pickled objects of ours, because the two containers may run different versions of this package.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flywheel_server.engines.base import EngineFailedError, Event, Started, TextDelta
from flywheel_server.messages import GenerationResponseSample, Int32


class _Started(BaseModel):
    event: Literal["started"]
    prompt_tokens: Int32 = 0


class _Delta(BaseModel):
    model_config = ConfigDict(strict=True)

    event: Literal["delta"]
    index: Int32
    text: str
    generated_tokens: Int32


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
    """Some events of a call that were sent together; or a sign of life of a container, which is of no call.

    Attributes:
        call: The id that the caller gave the call.
        attempt: An id of this run of the call: Modal runs one again whose container it has lost.
        number: How many piles of this attempt at the call were sent before.
        events: What happened, in its order.
        container: An id of the container that sent the pile; empty if the container is of a version that tells none.
        ended: Whether the attempt has failed, so that its error can be asked for at once.
        leaving: Whether the container is about to end, and all attempts in it with it.
        function_call: Modal's id of the call, with which it can be cancelled; empty if the container does not tell it.
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
        """Returns a pile that says only that the container lives, or that it is about to end. Older gateways pass over it."""
        return cls("", "", 0, [], container, leaving=leaving)

    def pack(self) -> dict[str, Any]:
        """Returns the pile as plain data."""
        packed = {
            "call": self.call,
            "attempt": self.attempt,
            "number": self.number,
            "events": [_packed(event) for event in self.events],
            "container": self.container,
        }
        further = {name: getattr(self, name) for name in ("ended", "leaving", "function_call")}
        return packed | {name: value for name, value in further.items() if value}

    @classmethod
    def unpack(cls, data: Any) -> Self:  # noqa: ANN401 - what has come is to be found out
        """Returns the pile that the data stands for; raises `EngineFailedError` where it is something else."""
        try:
            pile = _EventBatch.model_validate(data)
        except ValidationError as error:
            # Without the input, which holds text of the model.
            problems = error.errors(include_url=False, include_input=False, include_context=False)
            raise EngineFailedError(f"the class sent what is no pile of events: {problems}") from None
        events = [_unpacked(event) for event in pile.events]
        return cls(pile.call, pile.attempt, pile.number, events, pile.container, pile.ended, pile.leaving, pile.function_call)


class Receipt(BaseModel):
    """What the method returns when it has sent all: in how many piles, of which attempt."""

    model_config = ConfigDict(strict=True, frozen=True)

    attempt: str
    piles: Int32


def _packed(event: Event) -> dict[str, Any]:
    match event:
        case Started():
            return {"event": "started", "prompt_tokens": event.prompt_tokens}
        case TextDelta():
            return {
                "event": "delta",
                "index": event.index,
                "text": event.text,
                "generated_tokens": event.generated_tokens,
            }
        case GenerationResponseSample():
            return {"event": "sample", "sample": event.model_dump()}


def _unpacked(event: _Started | _Delta | _Sample) -> Event:
    match event:
        case _Started():
            return Started(event.prompt_tokens)
        case _Delta():
            return TextDelta(event.index, event.text, event.generated_tokens)
        case _Sample():
            return event.sample
