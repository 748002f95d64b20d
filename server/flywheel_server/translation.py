"""Translates between protobuf and the server's own messages: pure functions, one for each direction and message."""

from collections.abc import Sequence
from typing import Any, Final

from flywheel_proto.v1 import generation_pb2 as pb

from flywheel_server.engines.base import EngineModel, EngineStats
from flywheel_server.messages import (
    MAX_EOS_TOKEN_IDS,
    MAX_STOP_BYTES,
    MAX_STOP_SEQUENCES,
    GenerationRequest,
    GenerationResponseSample,
    RequestLimits,
)

_MAX_ELEMENTS: Final = {"eos_token_ids": MAX_EOS_TOKEN_IDS, "stop": MAX_STOP_SEQUENCES}
"""The most elements of each repeated field. A message may have millions: one more than the most is enough to refuse it."""


def request_from_proto(message: pb.GenerationRequest, limits: RequestLimits) -> GenerationRequest:
    """Returns the checked request, with defaults for unset fields. Raises `InvalidRequestError` with every violation."""
    # ListFields has a field with presence if it is set, and any other field if it is not zero. It is cheaper than
    # MessageToDict, and than asking for each field.
    fields: dict[str, Any] = {}
    for field, value in message.ListFields():
        limit = _MAX_ELEMENTS.get(field.name)
        fields[field.name] = value if limit is None else tuple(value[: limit + 1])
    return GenerationRequest.within(limits, fields)


# There is a message for each call and each token. To fill it field by field costs less than keyword arguments.


def sample_to_proto(sample: GenerationResponseSample) -> pb.GenerationResponseSample:
    """Returns the sample as a message."""
    message = pb.GenerationResponseSample()
    _fill_sample(message, sample)
    return message


def _fill_sample(message: pb.GenerationResponseSample, sample: GenerationResponseSample) -> None:
    message.text = sample.text
    message.generated_tokens = sample.generated_tokens
    message.finished = sample.finished
    message.finish_reason = sample.finish_reason
    message.index = sample.index
    message.prompt_tokens = sample.prompt_tokens
    message.stop_sequence = sample.stop_sequence


def response_to_proto(
    request: GenerationRequest, created: float, samples: Sequence[GenerationResponseSample]
) -> pb.GenerationResponse:
    """Returns the response to a request that was accepted at `created`, with its samples in any order, as a message.

    The fields are those of `GenerationResponse.of`. To make that model first would cost more than the message.
    """
    message = pb.GenerationResponse()
    message.created = created
    message.finished = max([sample.finished for sample in samples])
    message.num_samples = len(samples)
    message.prompt = request.text
    message.prompt_tokens = samples[0].prompt_tokens
    for sample in sorted(samples, key=lambda sample: sample.index):
        _fill_sample(message.responses.add(), sample)
    return message


def delta_to_proto(index: int, text: str, generated_tokens: int) -> pb.GenerationDelta:
    """Returns a delta as a message."""
    message = pb.GenerationDelta()
    message.index = index
    message.text = text
    message.generated_tokens = generated_tokens
    return message


def last_delta_to_proto(sample: GenerationResponseSample, text: str) -> pb.GenerationDelta:
    """Returns the last delta of a sample. `text` is the part of the sample that was not sent yet."""
    message = delta_to_proto(sample.index, text, sample.generated_tokens)
    message.finished = sample.finished
    message.finish_reason = sample.finish_reason
    message.prompt_tokens = sample.prompt_tokens
    message.stop_sequence = sample.stop_sequence
    return message


def model_to_proto(model: EngineModel, limits: RequestLimits) -> pb.Model:
    """Returns the model, the limits of a request to it, and the defaults of unset fields as a message."""
    fields = GenerationRequest.model_fields
    return pb.Model(
        name=model.name,
        engine=model.engine,
        context_tokens=model.context_tokens,
        limits=pb.Limits(
            max_text_bytes=limits.max_text_bytes,
            max_num_samples=limits.max_num_samples,
            max_eos_token_ids=MAX_EOS_TOKEN_IDS,
            max_stop_sequences=MAX_STOP_SEQUENCES,
            max_stop_bytes=MAX_STOP_BYTES,
        ),
        defaults=pb.Defaults(**{stated.name: fields[stated.name].default for stated in pb.Defaults.DESCRIPTOR.fields}),
        penalizes_prompt=model.penalizes_prompt,
        prompt_format=model.prompt_format,
    )


def stats_to_proto(stats: EngineStats, active: int, queued: int) -> pb.Stats:
    """Returns the statistics of the engine and of this server's generation calls as a message."""
    return pb.Stats(backlog=stats.backlog, num_total_runners=stats.num_total_runners, active=active, queued=queued)
