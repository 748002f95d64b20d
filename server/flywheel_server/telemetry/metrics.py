"""Counts and measures calls, for Prometheus.

If the semantic conventions of OpenTelemetry for RPC and for generative AI have a name, it is used. Labels have few values,
whatever callers send.
"""

from collections.abc import Sequence
from typing import Final

from flywheel_proto._service_name import SERVICE_NAME
from grpc import StatusCode
from prometheus_client import CollectorRegistry

from flywheel_server.grpc_types import Metadata
from flywheel_server.telemetry.calls import CallRecord
from flywheel_server.telemetry.instruments import Counter, Histogram

MAX_CALLERS: Final = 100
"""Callers that are counted by name. Further ones are counted together, as `OTHER_CALLERS`."""

MAX_CALLER_LENGTH: Final = 128
"""Characters of a caller's name that the label has."""

OTHER_CALLERS: Final = "_other"

# The buckets that the conventions recommend, with lower ones for small models, and with higher ones because an engine that is
# scaled to zero may take minutes to start.
CALL_BUCKETS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
FIRST_TOKEN_BUCKETS: Final = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0),
)
TOKEN_BUCKETS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
REQUEST_BUCKETS: Final = (
    *(0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56),
    *(5.12, 10.24, 20.48, 40.96, 81.92, 163.84, 327.68, 655.36),
)
USAGE_BUCKETS: Final = (1.0, 4.0, 16.0, 64.0, 256.0, 1024.0, 4096.0, 16384.0, 65536.0, 262144.0, 1048576.0)
WAIT_BUCKETS: Final = (0.0001, 0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)

FAULTS: Final = frozenset({StatusCode.INTERNAL, StatusCode.UNKNOWN, StatusCode.FAILED_PRECONDITION})
"""The statuses of faults of the engine, the server, or its set-up, whenever they come."""

_OPERATION: Final = ("gen_ai_operation_name", "gen_ai_request_model")


class Metrics:
    """Observes calls, and counts them; see `CallObserver`.

    Attributes:
        registry: All metrics of this process. Other collectors may be registered. They are read on the event
            loop, and in the thread of `OtlpMetrics`.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._call_duration = self._histogram(
            "rpc_server_call_duration_seconds",
            "Duration of each call, from its arrival to its status.",
            CALL_BUCKETS,
            ("rpc_method", "rpc_response_status_code", "rpc_system_name"),
        )
        self._request_duration = self._histogram(
            "gen_ai_server_request_duration_seconds",
            "Duration of each call that generates and whose request is valid.",
            REQUEST_BUCKETS,
            (*_OPERATION, "error_type"),
        )
        self._first_token = self._histogram(
            "gen_ai_server_time_to_first_token_seconds",
            "Time from the arrival of a call to the first output of its engine.",
            FIRST_TOKEN_BUCKETS,
            _OPERATION,
        )
        self._token_time = self._histogram(
            "gen_ai_server_time_per_output_token_seconds",
            "Time for each token of a sample after its first output, from engines that stream.",
            TOKEN_BUCKETS,
            _OPERATION,
        )
        self._usage = self._histogram(
            "gen_ai_client_token_usage",
            "Tokens of each call that the engine has started.",
            USAGE_BUCKETS,
            ("gen_ai_token_type", "gen_ai_request_model"),
        )
        self._queue_wait = self._histogram(
            "flywheel_queue_wait_seconds", "Time from joining the queue to having slots in the engine.", WAIT_BUCKETS
        )
        self._refused = self._counter(
            "flywheel_calls_refused", "Calls that were refused before the engine began on them.", ("reason",)
        )
        self._failed = self._counter(
            "flywheel_calls_failed",
            "Calls that failed through a fault of the engine or its set-up, or that the server ended after their start.",
            ("reason",),
        )
        self._cancelled = self._counter(
            "flywheel_calls_cancelled", "Calls that their caller or their deadline ended, by what they waited for.", ("phase",)
        )
        self._slow_readers = self._counter("flywheel_slow_readers", "Calls that ended because they were read too slowly.")
        self._retries_asked = self._counter("flywheel_retries_asked", "Statuses that ask for a retry.", ("reason",))
        self._prompt_tokens = self._counter("flywheel_prompt_tokens", "Tokens of prompts that the engine has started on.")
        self._generated_tokens = self._counter("flywheel_generated_tokens", "Tokens that were generated, of ended calls.")
        self._caller_calls = self._counter("flywheel_caller_calls", "Calls of each named caller.", ("caller",))
        self._caller_tokens = self._counter("flywheel_caller_tokens", "Tokens of each named caller.", ("caller", "type"))
        self._callers: dict[str, str] = {}
        """The label of each caller that is counted by name."""

    def _histogram(self, name: str, documentation: str, buckets: Sequence[float], labels: Sequence[str] = ()) -> Histogram:
        histogram = Histogram(name, documentation, buckets, labels)
        self.registry.register(histogram)
        return histogram

    def _counter(self, name: str, documentation: str, labels: Sequence[str] = ()) -> Counter:
        counter = Counter(name, documentation, labels)
        self.registry.register(counter)
        return counter

    def begin(self, call: CallRecord, metadata: Metadata) -> None:
        """Does nothing: a call is counted when it ends."""

    def end(self, call: CallRecord) -> None:
        """Counts a call."""
        code = call.code or StatusCode.CANCELLED
        duration = _seconds(call.began, call.ended_at)
        self._call_duration.observe(duration, (call.method, code.name, "grpc"))
        if not call.method.startswith(SERVICE_NAME):
            return
        reason = call.reason or code.name
        if code is not StatusCode.OK:
            self._count_failure(call, code, reason)
        if call.operation:
            error_type = "" if code is StatusCode.OK else reason
            self._request_duration.observe(duration, (call.operation, call.model, error_type))
            self._measure_generation(call)
        if call.caller:
            self._caller_calls.add(1, (self._label(call.caller),))

    def _count_failure(self, call: CallRecord, code: StatusCode, reason: str) -> None:
        if code is StatusCode.CANCELLED or reason in {"IN_QUEUE", "IN_GENERATION"}:
            self._cancelled.add(1, (call.phase,))
        elif reason == "SLOW_READER":
            self._slow_readers.add()
        elif call.started_at is None and code not in FAULTS:
            self._refused.add(1, (reason,))
        else:
            self._failed.add(1, (reason,))
        if call.retry_delay is not None:
            self._retries_asked.add(1, (reason,))

    def _measure_generation(self, call: CallRecord) -> None:
        if call.queued_at is not None and call.admitted_at is not None:
            self._queue_wait.observe(_seconds(call.queued_at, call.admitted_at))
        if call.started_at is None:
            return
        operation = (call.operation, call.model)
        if call.first_output_at is not None:
            self._first_token.observe(_seconds(call.began, call.first_output_at), operation)
            for seconds in call.token_seconds:
                self._token_time.observe(seconds, operation)
        self._count_tokens(call)

    def _count_tokens(self, call: CallRecord) -> None:
        self._prompt_tokens.add(call.prompt_tokens)
        self._generated_tokens.add(call.generated_tokens)
        self._usage.observe(call.prompt_tokens, ("input", call.model))
        self._usage.observe(call.generated_tokens, ("output", call.model))
        if call.caller:
            label = self._label(call.caller)
            self._caller_tokens.add(call.prompt_tokens, (label, "input"))
            self._caller_tokens.add(call.generated_tokens, (label, "output"))

    def _label(self, caller: str) -> str:
        """Returns the label for a caller, so that there are few labels, and short ones."""
        label = self._callers.get(caller)
        if label is None:
            if len(self._callers) == MAX_CALLERS:
                return OTHER_CALLERS
            is_long = len(caller) > MAX_CALLER_LENGTH
            label = caller[: MAX_CALLER_LENGTH - 1] + "…" if is_long else caller
            # A name may have halves of surrogate pairs, which no text format can have.
            label = self._callers[caller] = label.encode(errors="replace").decode()
        return label


def _seconds(start: float, end: float | None) -> float:
    return 0.0 if end is None else end - start
