"""Makes calls and times them.

The calls use the generated stubs on the client's own channels, without retries and without the client's results. A retry would
hide a refusal, and add its delay to the latency. Making a result from each delta would take time of the bench, and not of the
server. The channels give the calls the same TLS, keys and addresses as the other subcommands.
"""

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import grpc.aio
from flywheel_proto.v1 import generation_pb2, generation_pb2_grpc

from flywheel_client._bench.measurements import Measurements
from flywheel_client._channel import Connection
from flywheel_client._errors import FlywheelError, error_from_call, unknown_status

Method = Literal["GenerateDeltas", "Generate", "GenerateAll"]

INCOMPLETE: Final = "INCOMPLETE"
"""The reason of a call that ended with OK, but without all its samples."""

LATE_SHARE: Final = 0.95
"""A call that ran for this share of its timeout has used it up. Servers refuse a call early if its time cannot suffice."""

clock = time.perf_counter


@dataclass(slots=True)
class SampleProgress:
    """The part of a sample that has arrived. Times are of `clock`."""

    first: float
    last: float
    tokens_at_first: int
    tokens: int
    longest_pause: float = 0.0


@dataclass(slots=True)
class CallProgress:
    """The part of a call that has arrived. Times are of `clock`."""

    due: float
    sent: float
    first: float | None = None
    finished_samples: int = 0
    prompt_tokens: int = 0
    samples: dict[int, SampleProgress] = field(default_factory=dict)


@asynccontextmanager
async def open_channels(connection: Connection, count: int) -> AsyncIterator[list[grpc.aio.Channel]]:
    """Opens so many channels, each with a connection of its own, and closes them at the end."""
    async with AsyncExitStack() as stack:
        channels = []
        for _ in range(count):
            # A server that is NOT_SERVING gets the calls too, so that the report has its own reason to refuse them.
            channel = connection.open_async(any_health=True)
            stack.push_async_callback(channel.close)
            channels.append(channel)
        yield channels


class Caller:
    """Makes calls of a method with the requests, in turn on each connection.

    Args:
        connection: The options of calls.
        channels: A channel for each connection.
        method: The method to call.
        requests: The requests, which are sent in turn.
        timeout: The seconds that each call may take.
    """

    def __init__(
        self,
        connection: Connection,
        channels: Sequence[grpc.aio.Channel],
        method: Method,
        requests: Sequence[generation_pb2.GenerationRequest],
        timeout: float,
    ) -> None:
        self.timeout = timeout
        self._connection = connection
        self._requests = requests
        self._methods = [getattr(generation_pb2_grpc.GenerationServiceStub(channel), method) for channel in channels]
        self._read = {"GenerateDeltas": _read_deltas, "Generate": _read_samples, "GenerateAll": _read_response}[method]
        self._calls = 0

    def recording(self, measurements: Measurements, begun: float) -> "RecordingCaller":
        """Returns the part of the caller that records its calls, for a run that began at this time of `clock`."""
        return RecordingCaller(self, measurements, begun)

    def begin(self) -> tuple[Any, generation_pb2.GenerationRequest, str]:
        """Begins the next call. Returns it with its request and its request id."""
        number = self._calls
        self._calls += 1
        request = self._requests[number % len(self._requests)]
        options = self._connection.call_options(self.timeout)
        method = self._methods[number % len(self._methods)]
        call = method(request, timeout=options.timeout, metadata=options.metadata, wait_for_ready=options.wait_for_ready)
        return call, request, options.request_id

    @property
    def read(self) -> Callable[[Any, CallProgress, "RecordingCaller"], Awaitable[None]]:
        """The function that reads the answer of a call to its end."""
        return self._read


class RecordingCaller:
    """Makes calls and records their times and outcomes. `begun` is the beginning of the run."""

    def __init__(self, caller: Caller, measurements: Measurements, begun: float) -> None:
        self.measurements = measurements
        self.begun = begun
        self.active: dict[int, CallProgress] = {}
        """The calls that have not ended."""
        self._caller = caller

    async def call(self, due: float) -> bool:
        """Makes a call that was due at this time of `clock`. Returns whether it succeeded.

        A cancelled call stays in `active`, and counts nowhere else.
        """
        progress = CallProgress(due, clock())
        measurements = self.measurements
        measurements.sent += 1
        measurements.send_delay.add(progress.sent - due)
        measurements.timeline.at(due - self.begun).sent += 1
        key = id(progress)
        self.active[key] = progress
        call, request, request_id = self._caller.begin()
        try:
            await self._caller.read(call, progress, self)
        except (grpc.aio.AioRpcError, FlywheelError) as error:
            self._fail(progress, error_from_call(error, request_id))
        except KeyError:
            self._fail(progress, unknown_status(request_id))
        else:
            if progress.finished_samples != (request.num_samples if request.HasField("num_samples") else 1):
                message = f"the call ended with OK, but with {progress.finished_samples} finished samples"
                measurements.add_error("OK", INCOMPLETE, message, clock() - self.begun)
            else:
                self._succeed(progress)
                del self.active[key]
                return True
        del self.active[key]
        return False

    def give_up(self, due: float, progress: CallProgress | None, now: float) -> None:
        """Counts a call that has not ended by now, with its time so far. `progress` is None if the call was not sent."""
        self.measurements.lower_bounds += 1
        self.measurements.duration.add(now - due)
        if progress is None or progress.first is None:
            self._record_wait(due, now - due)

    def _succeed(self, progress: CallProgress) -> None:
        now = clock()
        measurements = self.measurements
        measurements.succeeded += 1
        measurements.prompt_tokens += progress.prompt_tokens
        measurements.duration.add(now - progress.due)
        if self._caller.read is not _read_deltas:
            measurements.timeline.at(progress.due - self.begun).waits.add(now - progress.due)
        for sample in progress.samples.values():
            later_tokens = sample.tokens - sample.tokens_at_first
            if later_tokens > 0:
                measurements.per_output_token.add((sample.last - sample.first) / later_tokens)
                measurements.longest_pause.add(sample.longest_pause)

    def _fail(self, progress: CallProgress, error: FlywheelError) -> None:
        now = clock()
        self.measurements.add_error(error.code.name, error.reason, error.message, now - self.begun)
        if error.code is grpc.StatusCode.DEADLINE_EXCEEDED and now - progress.sent >= LATE_SHARE * self._caller.timeout:
            self.give_up(progress.due, progress, now)

    def note_first(self, progress: CallProgress, now: float) -> None:
        """Records the first delta of a call."""
        progress.first = now
        self._record_wait(progress.due, now - progress.due)

    def _record_wait(self, due: float, seconds: float) -> None:
        self.measurements.timeline.at(due - self.begun).waits.add(seconds)
        if self._caller.read is _read_deltas:
            self.measurements.first_token.add(seconds)

    def add_tokens(self, tokens: int, now: float) -> None:
        """Records tokens that have arrived."""
        self.measurements.generated_tokens += tokens
        self.measurements.timeline.at(now - self.begun).tokens += tokens


async def _read_deltas(call: Any, progress: CallProgress, recorder: RecordingCaller) -> None:  # noqa: ANN401 - a call of grpc
    inter_token = recorder.measurements.inter_token
    async for delta in call:
        now = clock()
        if progress.first is None:
            recorder.note_first(progress, now)
        tokens = delta.generated_tokens
        sample = progress.samples.get(delta.index)
        if sample is None:
            progress.samples[delta.index] = SampleProgress(now, now, tokens, tokens)
            new = tokens
        else:
            pause = now - sample.last
            new = tokens - sample.tokens
            if new > 0:
                inter_token.add(pause / new, new)
            sample.longest_pause = max(sample.longest_pause, pause)
            sample.last, sample.tokens = now, tokens
        if new > 0:
            recorder.add_tokens(new, now)
        if delta.finish_reason:
            progress.finished_samples += 1
            progress.prompt_tokens = delta.prompt_tokens


async def _read_samples(call: Any, progress: CallProgress, recorder: RecordingCaller) -> None:  # noqa: ANN401 - a call of grpc
    async for sample in call:
        progress.finished_samples += 1
        progress.prompt_tokens = sample.prompt_tokens
        recorder.add_tokens(sample.generated_tokens, clock())


async def _read_response(call: Any, progress: CallProgress, recorder: RecordingCaller) -> None:  # noqa: ANN401 - a call of grpc
    response = await call
    progress.finished_samples = len(response.responses)
    progress.prompt_tokens = response.prompt_tokens
    recorder.add_tokens(sum(sample.generated_tokens for sample in response.responses), clock())
