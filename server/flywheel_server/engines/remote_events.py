"""The events of a generation as plain data, for the queue that brings them from another container.

Plain data, rather than pickled objects of ours, because the two containers may run different versions of this package.
"""

from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from flywheel_server.engines.base import EngineFailedError, Event, Started, TextDelta
from flywheel_server.messages import GenerationResponseSample, Int32


class _Started(BaseModel):
    event: Literal["started"]


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


_EVENTS: Final = TypeAdapter(list[Annotated[_Started | _Delta | _Sample, Field(discriminator="event")]])


def pack(events: list[Event]) -> list[dict[str, Any]]:
    """Returns the events as plain data."""
    return [_packed(event) for event in events]


def _packed(event: Event) -> dict[str, Any]:
    match event:
        case Started():
            return {"event": "started"}
        case TextDelta():
            return {
                "event": "delta",
                "index": event.index,
                "text": event.text,
                "generated_tokens": event.generated_tokens,
            }
        case GenerationResponseSample():
            return {"event": "sample", "sample": event.model_dump()}


def unpack(data: Any) -> list[Event]:  # noqa: ANN401 - what has come is to be found out
    """Returns the events that the data stands for; raises `EngineFailedError` where it is something else."""
    try:
        return [_unpacked(event) for event in _EVENTS.validate_python(data)]
    except ValidationError as error:
        # Without the input, which holds text of the model.
        problems = error.errors(include_url=False, include_input=False, include_context=False)
        raise EngineFailedError(f"the class sent events that are none: {problems}") from None


def _unpacked(event: _Started | _Delta | _Sample) -> Event:
    match event:
        case _Started():
            return Started()
        case _Delta():
            return TextDelta(event.index, event.text, event.generated_tokens)
        case _Sample():
            return event.sample
