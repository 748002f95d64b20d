"""Between protobuf and the server's own messages and events: pure functions, one per direction and message."""

from collections.abc import Sequence

from flywheel_proto.v1 import generation_pb2 as pb
from flywheel_server.engines.base import EngineModel, SampleFinished, TextDelta
from flywheel_server.messages import (
    MAX_EOS_TOKEN_IDS,
    MAX_STOP_BYTES,
    MAX_STOP_SEQUENCES,
    GenerationRequest,
    GenerationResponse,
    GenerationResponseSample,
    RequestLimits,
)

_PRESENCE = ("num_samples", "temperature", "top_k", "top_p")


def request_from_proto(message: pb.GenerationRequest, limits: RequestLimits) -> GenerationRequest:
    """Returns the checked request, unset fields at their defaults; raises `InvalidRequestError` with every violation."""
    fields = {
        "text": message.text,
        "max_tokens": message.max_tokens,
        "eos_token_ids": tuple(message.eos_token_ids),
        "max_input_tokens": message.max_input_tokens,
        "stop": tuple(message.stop),
        "presence_penalty": message.presence_penalty,
        "frequency_penalty": message.frequency_penalty,
    }
    fields |= {name: getattr(message, name) for name in _PRESENCE if message.HasField(name)}
    return GenerationRequest.within(limits, fields)
