"""Admits a call to the engine: checks the quotas of its caller first, and then queues the call for slots of the engine."""

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import Protocol

from flywheel_server import admission
from flywheel_server.access.callers import Caller
from flywheel_server.access.quotas import Quotas, Reservation, Usage
from flywheel_server.admission import DEFAULT_SERVICE_TIME, Admission
from flywheel_server.engines.base import EngineModel
from flywheel_server.messages import GenerationRequest


class Place(Protocol):
    """A call's place in the queue and, once the call is admitted, its slots in the engine; see `admission.Place`."""

    async def joined(self) -> None:
        """Returns when the call has its quota and its place; raises the errors of `acquire`. For a call that needs no slots."""

    async def admitted(self, context_tokens: int, time_remaining: float | None = None) -> None:
        """Returns when there are slots for the call and so many free tokens of context; raises the errors of `acquire`."""

    def call_if_evicted(self, callback: Callable[[Exception], None]) -> None:
        """Calls back with the error if the call loses its place before it is admitted."""


class AdmissionControl(Protocol):
    """Enforces the quotas of callers, and makes calls wait until the engine has slots for them."""

    def set_capacity(self, model: EngineModel) -> None:
        """Caps concurrency at what the engine works on at a time with this model."""

    def acquire(
        self, request: GenerationRequest, caller: Caller, time_remaining: float | None
    ) -> AbstractAsyncContextManager[tuple[Usage, Place]]:
        """Returns a context that reserves quota and a place in the queue, and releases both at its end.

        The caller of this method records the tokens that the call uses in the `Usage`. If the context ends without an error,
        the time since admission counts as a service time.

        Raises, on entering the context or later from `Place.admitted`:
            QuotaExceededError: The quotas of the caller do not allow the call now.
            DeadlineExceededError: The wait would last longer than `time_remaining` (seconds; None if there is no deadline).
            ServerFullError: The queue is full, or a call of a higher priority has evicted this one.
        """


class LocalAdmissionControl:
    """The admission control of a server with a single process, whose queue is `queue`."""

    def __init__(self, queue: Admission) -> None:
        self.queue = queue
        self._quotas = quotas_for(queue)
        self._model: EngineModel | None = None

    def set_capacity(self, model: EngineModel) -> None:
        """See `AdmissionControl.set_capacity`."""
        self._model = model
        self.queue.set_capacity(model.slots, model.shared_context_tokens)

    def acquire(self, request: GenerationRequest, caller: Caller, time_remaining: float | None) -> "LocalAcquisition":
        """See `AdmissionControl.acquire`."""
        slots = request.num_samples if self._model is None else self._model.slots_of(request)
        return LocalAcquisition(
            Reservation(self._quotas, caller, request, slots),
            partial(self.queue.join, slots, caller, time_remaining),
        )


class LocalAcquisition:
    """The context of one call: its reservation of quota, and its place in the queue."""

    def __init__(self, reservation: Reservation, join_queue: Callable[[], admission.Place]) -> None:
        self._reservation = reservation
        self._join_queue = join_queue

    async def __aenter__(self) -> tuple[Usage, Place]:
        usage = self._reservation.__enter__()
        try:
            self._place = self._join_queue()
        except BaseException:
            self._reservation.__exit__()
            raise
        return usage, self._place

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self._place.release(finished=kind is None)
        finally:
            self._reservation.__exit__()


def quotas_for(queue: Admission) -> Quotas:
    """Returns quotas that estimate retry delays by the service times that the queue measures."""
    return Quotas(lambda caller: queue.service_times.of(caller) or DEFAULT_SERVICE_TIME)
