"""Makes a call, and tells whether the contract allows its answer to the bytes of its request."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import grpc
import grpc.aio
from flywheel_proto.v1 import generation_pb2 as pb
from flywheel_server.errors import UnknownFieldError
from flywheel_server.messages import MAX_VIOLATIONS, FieldViolation, GenerationRequest, InvalidRequestError
from flywheel_server.violations import name_of
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo
from google.rpc.status_pb2 import Status

from fuzz.http2 import SERVICE
from fuzz.targets import LIMITS, verdict

GENERATING: Final = ("Generate", "GenerateDeltas", "GenerateAll")
OTHERS: Final = {"GetModel": pb.GetModelRequest, "GetStats": pb.GetStatsRequest, "Tokenize": pb.TokenizeRequest}


@dataclass(frozen=True)
class Answer:
    """How a call ended.

    Attributes:
        code: Its status code.
        status: The details of its status.
        request_ids: How many request ids its metadata have.
        messages: The serialized messages that came before the end.
    """

    code: grpc.StatusCode
    status: Status
    request_ids: int
    messages: Sequence[bytes]

    def is_for(self, method: str, data: bytes) -> bool:
        """Returns whether the contract allows this answer to a request of these bytes."""
        if self.request_ids != 1:
            return False
        found = verdict(data, OTHERS.get(method, pb.GenerationRequest))
        if isinstance(found, InvalidRequestError):
            return self._is_invalid() and self._names(found)
        if isinstance(found, Exception):
            reason = "UNKNOWN_FIELD" if isinstance(found, UnknownFieldError) else "MALFORMED_REQUEST"
            return self._is_invalid() and self._reason() == reason
        if self.code is grpc.StatusCode.OK:
            return method in OTHERS or (found is not None and _keeps_promises(found, _samples(method, self.messages)))
        if self.code is grpc.StatusCode.UNIMPLEMENTED:
            return method == "Tokenize" and self._reason() == "UNSUPPORTED_METHOD"
        # Only the engine can say that a prompt is too long, or that it refuses a field.
        return self._is_invalid() and 1 <= len(self._violations()) <= MAX_VIOLATIONS

    def _names(self, found: InvalidRequestError) -> bool:
        """Returns whether the answer names each wrong field, and nothing that is not wrong.

        Of a field that the engine does not support, the answer says only that. And the engine may find more in what it checks.
        """
        told = self._violations()
        if {*map(name_of, found.violations)} - {name_of(each) for each in told}:
            return False
        unsupported = {
            each.field for each in told if self._reason() == "UNSUPPORTED_FIELD" and each.description.startswith("is not")
        }
        checked = found.unchecked.model_fields_set if found.unchecked else set()
        return all(each in found.violations or name_of(each) in unsupported | checked for each in told)

    def _is_invalid(self) -> bool:
        return self.code is grpc.StatusCode.INVALID_ARGUMENT and self.status.code == self.code.value[0]

    def _reason(self) -> str:
        info = ErrorInfo()
        return next((info.reason for detail in self.status.details if detail.Unpack(info)), "")

    def _violations(self) -> list[FieldViolation]:
        bad = BadRequest()
        found = next((bad.field_violations for detail in self.status.details if detail.Unpack(bad)), ())
        return [FieldViolation(violation.field, violation.description) for violation in found]

    def __str__(self) -> str:
        return f"{self.code.name}, {self.request_ids} request ids, {self.status}, {len(self.messages)} messages"


async def answer(channel: grpc.aio.Channel, method: str, data: bytes, metadata: Any) -> Answer:  # noqa: ANN401 - grpc's
    """Calls the method with these bytes as its request, and returns its answer."""
    messages: list[bytes] = []
    if method in ("Generate", "GenerateDeltas"):
        call: Any = channel.unary_stream(SERVICE + method, bytes, bytes)(data, metadata=metadata)
        reading = call.read
    else:
        call = channel.unary_unary(SERVICE + method, bytes, bytes)(data, metadata=metadata)
        reading = None
    try:
        if reading is None:
            messages.append(await call)
        else:
            while (message := await reading()) is not grpc.aio.EOF:
                messages.append(message)
    except grpc.aio.AioRpcError:
        pass  # the code of the call says it too
    trailing = tuple(await call.trailing_metadata() or ())
    initial = tuple(await call.initial_metadata() or ())
    details = next((value for key, value in trailing if key == "grpc-status-details-bin"), b"")
    request_ids = sum(key == "x-request-id" for key, _ in (*initial, *trailing))
    return Answer(await call.code(), Status.FromString(details), request_ids, messages)


def _keeps_promises(request: GenerationRequest, samples: Sequence[pb.GenerationResponseSample] | None) -> bool:
    """Returns whether these samples keep the promises of the contract. None stands for an answer without samples."""
    if samples is None or sorted(sample.index for sample in samples) != list(range(request.num_samples)):
        return False
    return all(_is_kept(request, sample) for sample in samples)


def _is_kept(request: GenerationRequest, sample: pb.GenerationResponseSample) -> bool:
    tokens = sample.generated_tokens
    return (
        (tokens == request.max_tokens if sample.finish_reason == "length" else sample.finish_reason in {"stop", "time"})
        and (tokens > 0 or sample.finish_reason == "time")
        and tokens <= request.max_tokens
        and 0 < sample.prompt_tokens <= (request.max_input_tokens or LIMITS.context_tokens)
        and sample.prompt_tokens + request.max_tokens <= LIMITS.context_tokens
        and sample.stop_sequence in ("", *request.stop)
        and not any(stop in sample.text for stop in request.stop)
    )


def _samples(method: str, messages: Sequence[bytes]) -> list[pb.GenerationResponseSample] | None:
    """Returns the samples in the answer of a generating method; None if the messages are not as the contract says."""
    if method == "Generate":
        return [pb.GenerationResponseSample.FromString(message) for message in messages]
    if method == "GenerateDeltas":
        return _joined(pb.GenerationDelta.FromString(message) for message in messages)
    (response,) = (pb.GenerationResponse.FromString(message) for message in messages)
    samples = list(response.responses)
    is_whole = response.num_samples == len(samples) and all(
        sample.prompt_tokens == response.prompt_tokens for sample in samples
    )
    return samples if is_whole and [sample.index for sample in samples] == list(range(len(samples))) else None


def _joined(deltas: Iterable[pb.GenerationDelta]) -> list[pb.GenerationResponseSample] | None:
    of_index: dict[int, list[pb.GenerationDelta]] = defaultdict(list)
    for delta in deltas:
        of_index[delta.index].append(delta)
    samples = []
    for index, (*early, last) in of_index.items():
        if not all(delta.text and not delta.finish_reason for delta in early):
            return None
        counts = [delta.generated_tokens for delta in (*early, last)]
        if counts != sorted(counts):
            return None
        samples.append(
            pb.GenerationResponseSample(
                index=index,
                text="".join(delta.text for delta in (*early, last)),
                generated_tokens=last.generated_tokens,
                finish_reason=last.finish_reason,
                prompt_tokens=last.prompt_tokens,
                stop_sequence=last.stop_sequence,
            )
        )
    return samples
