"""Records what happens to each call, once, for all that reports on calls: metrics, traces and the log.

A call notes times and counts in its record while it runs, which costs as much as setting an attribute. Observers read the
record when the call ends. Without observers, there are no records.
"""

import asyncio
import re
import time
from collections.abc import Mapping, Sequence
from contextvars import Context, ContextVar
from functools import lru_cache
from typing import TYPE_CHECKING, Final, Literal, Protocol
from urllib.parse import unquote

import grpc

from flywheel_server.grpc_types import GrpcContext, Metadata

if TYPE_CHECKING:
    from flywheel_server.messages import GenerationRequest, GenerationResponseSample

Phase = Literal["request", "queue", "prompt", "decode"]
"""What a call waits for: its request to arrive and be checked, its place in the engine, its first text, or its last."""


_TCP_PEER: Final = re.compile(r"ipv[46]:(.+):(\d+)")
"""The peer of a call over TCP, as gRPC gives it: the address of IPv6 is in brackets, which are percent-encoded."""

MAX_ADDRESS_CHARACTERS: Final = 256
"""Maximum length of an address that is reported."""


class CallRecord:
    """What is known of a call. All times are in seconds of `time.perf_counter`; None until they have come.

    Attributes:
        method: The method, such as `flywheel.v1.GenerationService/Generate`.
        request_id: The id of the request; see `x-request-id`.
        peer: The address of the caller, as gRPC gives it.
        caller: The name of the caller; empty until it is known, or if the server does not distinguish callers.
        trace_id: The id of the call's trace; empty if nobody can see the trace.
        began: When the call arrived.
        began_ns: The same, in nanoseconds since the epoch.
        queued_at: When the generation joined the queue.
        admitted_at: When the generation got its slots in the engine.
        started_at: When the engine began to work on the generation.
        first_output_at: When the first text or sample came from the engine.
        ended_at: When the call ended.
        operation: What the call generates, as the semantic conventions name it: chat or text_completion. Empty for a call that
            generates nothing, and until the request is known to be valid.
        model: The name of the engine's model; empty until the request is known to be valid.
        request: The request; None for a call without a prompt, or if the request is not valid.
        num_samples: How many samples were asked for; 0 for a call that generates nothing.
        samples: For each sample that has finished: when it did, how many tokens it has, and its `finish_reason`.
        token_seconds: For each finished sample of several tokens whose text was streamed: the seconds for each token after the
            first.
        texts: The texts of the finished samples; None unless an observer has asked for them, with an empty list.
        prompt_tokens: The number of tokens in the prompt; 0 if it is not known.
        generated_tokens: The number of tokens generated so far, of all samples; set when the generation ends.
        code: The status of the call; None while it runs. CANCELLED if the caller has gone.
        reason: The reason in the ErrorInfo of the status; empty if there is none.
        retry_delay: The seconds in the RetryInfo of the status; None if there is none.
        is_logged: Whether the log has a line that says how the call ended.
    """

    __slots__ = (
        "_first_deltas",
        "admitted_at",
        "began",
        "began_ns",
        "caller",
        "code",
        "ended_at",
        "first_output_at",
        "generated_tokens",
        "is_logged",
        "method",
        "model",
        "num_samples",
        "operation",
        "peer",
        "prompt_tokens",
        "queued_at",
        "reason",
        "request",
        "request_id",
        "retry_delay",
        "samples",
        "started_at",
        "texts",
        "token_seconds",
        "trace_id",
    )

    def __init__(self, method: str, request_id: str, peer: str) -> None:
        self.method = method
        self.request_id = request_id
        self.peer = peer
        self.caller = ""
        self.trace_id = ""
        self.began = time.perf_counter()
        self.began_ns = time.time_ns()
        self.queued_at: float | None = None
        self.admitted_at: float | None = None
        self.started_at: float | None = None
        self.first_output_at: float | None = None
        self.ended_at: float | None = None
        self.operation: Literal["", "chat", "text_completion"] = ""
        self.request: GenerationRequest | None = None
        self.model = ""
        self.num_samples = 0
        self._first_deltas: dict[int, float] = {}
        """When each sample that is not finished had its first text, by the sample's index."""
        self.samples: list[tuple[float, int, str]] = []
        self.token_seconds: list[float] = []
        self.texts: list[str] | None = None
        self.prompt_tokens = 0
        self.generated_tokens = 0
        self.code: grpc.StatusCode | None = None
        self.reason = ""
        self.retry_delay: float | None = None
        self.is_logged = False

    def peer_address(self) -> Mapping[str, str | int]:
        """Returns the address and the port of the caller by the names of OpenTelemetry; only the address if it is no TCP."""
        return _peer_address(self.peer)

    def note_first_output(self, index: int, *, is_streamed: bool) -> None:
        """Notes the first output of the sample with this index: a delta, if it is streamed, and otherwise the whole sample."""
        now = time.perf_counter()
        if self.first_output_at is None:
            self.first_output_at = now
        if is_streamed:
            self._first_deltas[index] = now

    def note_sample(self, sample: "GenerationResponseSample") -> None:
        """Notes that a sample has finished."""
        now, tokens = time.perf_counter(), sample.generated_tokens
        self.samples.append((now, tokens, sample.finish_reason))
        # Samples need not start together: an engine may have too few slots, and with a seed they run one after the other.
        began = self._first_deltas.pop(sample.index, None)
        if began is not None and tokens > 1:
            self.token_seconds.append((now - began) / (tokens - 1))
        if self.texts is not None:
            self.texts.append(sample.text)

    def seconds(self) -> dict[str, float]:
        """Returns how long the call took, was in the queue, and waited for its first output, by the names in the log."""
        end = self.ended_at or time.perf_counter()
        seconds = {"seconds": round(end - self.began, 4)}
        if self.queued_at is not None:
            seconds["queue_seconds"] = round((self.admitted_at or end) - self.queued_at, 4)
        if self.first_output_at is not None:
            seconds["first_output_seconds"] = round(self.first_output_at - self.began, 4)
        return seconds

    @property
    def phase(self) -> Phase:
        """How far the call has come."""
        if self.queued_at is None:
            return "request"
        if self.admitted_at is None:
            return "queue"
        return "prompt" if self.first_output_at is None else "decode"


@lru_cache(maxsize=1024)  # the calls of a connection have the same peer
def _peer_address(peer: str) -> Mapping[str, str | int]:
    found = _TCP_PEER.fullmatch(peer)
    if found is None:
        return {"network.peer.address": peer[:MAX_ADDRESS_CHARACTERS]}
    return {"network.peer.address": unquote(found[1]).strip("[]"), "network.peer.port": int(found[2])}


UNKNOWN_METHOD: Final = "_OTHER"
"""The method in the record of a call whose method does not exist. (A stranger chose its name.)"""

current_call: Final[ContextVar[CallRecord | None]] = ContextVar("current_call", default=None)
"""The record of the call that runs in this context; None if nobody observes calls."""


REPORT_INTERVAL: Final = 0.05
"""Seconds after which a call that ended well is reported at the latest."""

MAX_UNREPORTED: Final = 32
"""Calls that are reported together at most, so that the event loop is not held up."""


class CallObserver(Protocol):
    """Reports on calls. Both methods run on the event loop, and must not block or raise."""

    def begin(self, call: CallRecord, metadata: Metadata) -> None:
        """Takes note of a call that has arrived, with this metadata. Runs in the context of the call."""

    def end(self, call: CallRecord) -> None:
        """Reports a call that ended at most `REPORT_INTERVAL` ago. Its record changes no more. Runs in no call's context."""


class Calls:
    """Makes the records of calls, and shows them to observers.

    Calls that ended well are shown together. If each were shown at its end, the code of the observers would each time have to
    come back into the processor's caches, which takes longer than to run it.
    """

    def __init__(self, observers: Sequence[CallObserver]) -> None:
        self._observers = observers
        self._unreported: list[CallRecord] = []
        self._context = Context()

    def begin(self, method: str, request_id: str, context: GrpcContext, metadata: Metadata) -> CallRecord | None:
        """Returns the record of a call that has arrived, which becomes the `current_call`; None if there are no observers."""
        if not self._observers:
            return None
        call = CallRecord(method, request_id, context.peer())
        self._show(call, metadata)
        return call

    def _show(self, call: CallRecord, metadata: Metadata) -> None:
        current_call.set(call)
        for observer in self._observers:
            observer.begin(call, metadata)

    def unknown_method(self, request_id: str, metadata: Metadata) -> None:
        """Records a call of a method that does not exist, which gRPC ends by itself, as a call of `_OTHER` without a peer."""
        if self._observers:
            call = CallRecord(UNKNOWN_METHOD, request_id, "")
            call.code = grpc.StatusCode.UNIMPLEMENTED
            self._show(call, metadata)
            self.end(call)

    def end(self, call: CallRecord) -> None:
        """Notes the end of a call. A call without a status was cancelled."""
        call.ended_at = time.perf_counter()
        call.code = call.code or grpc.StatusCode.CANCELLED
        self._unreported.append(call)
        if call.code is not grpc.StatusCode.OK or len(self._unreported) >= MAX_UNREPORTED:
            self.report()
        elif len(self._unreported) == 1:
            asyncio.get_running_loop().call_later(REPORT_INTERVAL, self.report)

    def report(self) -> None:
        """Shows observers now all calls that have ended."""
        self._context.run(self._report)

    def _report(self) -> None:
        ended, self._unreported = self._unreported, []
        for observer in self._observers:
            for call in ended:
                observer.end(call)
        for call in ended:
            # They may be large, and timers of the call may keep its context, and so the record, for a while.
            call.request = call.texts = None
