"""What stands between a call and the engine: first the quotas of the caller, then the queue for room in the engine."""

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from flywheel_server import admission
from flywheel_server.access.callers import Caller
from flywheel_server.access.quotas import Holding, Quotas, Usage
from flywheel_server.admission import DEFAULT_SERVICE_TIME, Admission
from flywheel_server.engines.base import EngineModel
from flywheel_server.messages import GenerationRequest


class Place(Protocol):
    """A call's place in the queue, and then its room in the engine; see `admission.Place`."""

    async def admitted(self, context_tokens: int, time_remaining: float | None = None) -> None:
        """Returns when there is room for the call and for so many tokens of context, or raises what ends the wait."""

    def call_if_lost(self, callback: Callable[[Exception], None]) -> None:
        """Calls back with the error if the place is lost before the call is admitted."""


class AdmissionControl(Protocol):
    """Holds callers to their quotas, and then has calls wait until there is room for them."""

    def set_capacity(self, model: EngineModel) -> None:
        """Lets in no more at a time than the engine works on with this model."""

    def entered(
        self, request: GenerationRequest, caller: Caller, time_remaining: float | None
    ) -> AbstractAsyncContextManager[tuple[Usage, Place]]:
        """Holds a share of the caller's quotas and a place in the queue for the length of the context.

        What the call uses is to be told to `Usage`. If the context ends without an error, the time that the call had room
        counts as a service time.

        Raises, from here or later from `Place.admitted`:
            QuotaExceededError: The caller has no room for the call now.
            DeadlineExceededError: The wait would last longer than `time_remaining` (seconds; None is no bound).
            ServerFullError: Too many wait.
        """


class LocalAdmissionControl:
    """The admission control of a server that is one process."""

    def __init__(self, own: Admission) -> None:
        self._admission = own
        self._quotas = quotas_for(own)

    def set_capacity(self, model: EngineModel) -> None:
        """See `AdmissionControl.set_capacity`."""
        self._admission.set_capacity(model.slots, model.shared_context_tokens)

    def entered(self, request: GenerationRequest, caller: Caller, time_remaining: float | None) -> "LocalEntry":
        """See `AdmissionControl.entered`. Raises its errors at once, except for a place that is lost later."""
        return LocalEntry(
            self._quotas.held(caller, request),
            self._admission.queue(request.num_samples, caller, time_remaining),
        )


class LocalEntry:
    """A call's share of the quotas and its place in the queue, both for the length of the context."""

    def __init__(self, holding: Holding, place: admission.Place) -> None:
        self._holding = holding
        self._place = place

    async def __aenter__(self) -> tuple[Usage, Place]:
        usage = self._holding.__enter__()
        try:
            self._place.enter()
        except BaseException:
            self._holding.__exit__()
            raise
        return usage, self._place

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self._place.leave(finished=kind is None)
        finally:
            self._holding.__exit__()


def quotas_for(queue: Admission) -> Quotas:
    """Returns quotas that estimate retry delays by the service times of the calls that pass through the queue."""
    return Quotas(lambda caller: queue.service_times.of(caller) or DEFAULT_SERVICE_TIME)
