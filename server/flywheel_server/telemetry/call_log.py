"""Logs a line for each call, or for a share of them, and for each slow call: what it was, how it ended, where its time went."""

import random
from typing import Any

from flywheel_server.grpc_types import Metadata
from flywheel_server.logs import EventLogger
from flywheel_server.telemetry.calls import CallRecord, Phase

log = EventLogger(__name__)


class CallLog:
    """Logs the end of calls, unless the log has a line that says how the call ended.

    Arguments:
        share: The share of calls that are logged, from 0 to 1.
        slow_seconds: Seconds without output after which a call of the engine is slow, and is always logged; 0 means never.
    """

    def __init__(self, share: float, slow_seconds: float) -> None:
        self._share = share
        self._slow_seconds = slow_seconds

    def begin(self, call: CallRecord, metadata: Metadata) -> None:
        """Does nothing: the record has all that a line needs."""

    def end(self, call: CallRecord) -> None:
        """Logs the call, if it is slow or is drawn."""
        if call.is_logged:
            return
        if self._is_slow(call):
            phases = _phases_until_output(call)
            log.write("warning", {**_fields(call), "slow_phase": max(phases, key=phases.__getitem__)})
        elif random.random() < self._share:  # noqa: S311 - no secret
            log.write("info", _fields(call))

    def _is_slow(self, call: CallRecord) -> bool:
        # Only a call of the engine: a stream of health lasts for as long as its caller likes.
        if not self._slow_seconds or call.queued_at is None:
            return False
        return (call.first_output_at or call.ended_at or call.began) - call.began > self._slow_seconds


def _fields(call: CallRecord) -> dict[str, Any]:
    """Returns the fields of a line. Dotted names are those of OpenTelemetry."""
    fields: dict[str, Any] = {
        "event": "call finished",
        "request_id": call.request_id,
        "rpc.method": call.method,
        "rpc.response.status_code": call.code.name if call.code else "",
        **(call.peer_address() if call.peer else {}),
        **call.seconds(),
    }
    if call.caller:
        fields["caller"] = call.caller
    if call.trace_id:
        fields["trace_id"] = call.trace_id
    if call.reason:
        fields["reason"] = call.reason
    if call.queued_at is not None:
        fields["gen_ai.request.model"] = call.model
        fields["gen_ai.usage.input_tokens"] = call.prompt_tokens
        fields["gen_ai.usage.output_tokens"] = call.generated_tokens
    return fields


def _phases_until_output(call: CallRecord) -> dict[Phase, float]:
    """Returns the seconds of each phase that the call has reached, without the time after its first output."""
    begins: tuple[tuple[Phase, float | None], ...] = (
        ("request", call.began),
        ("queue", call.queued_at),
        ("prompt", call.admitted_at),
    )
    reached = [(phase, begin) for phase, begin in begins if begin is not None]
    ends = [*(begin for _, begin in reached[1:]), call.first_output_at or call.ended_at or call.began]
    return {phase: end - begin for (phase, begin), end in zip(reached, ends, strict=True)}
