"""The class on Modal: looked up by its name, kept, and looked up again if it may have been deployed again.

What happens if a request that looks the class up (ClassGet, FunctionGet, FunctionBindParams) fails with a status, after the
retries of Modal's own client:

    status                              at the first look-up                   later
    NOT_FOUND, PERMISSION_DENIED,       3 tries, then FAILED_PRECONDITION      the class is kept, and Modal's answer to the
    UNAUTHENTICATED, INVALID_ARGUMENT,                                         call decides
    OUT_OF_RANGE, UNIMPLEMENTED
    FAILED_PRECONDITION, ABORTED        3 tries, then UNAVAILABLE              the class is kept
    RESOURCE_EXHAUSTED                  RESOURCE_EXHAUSTED                     the class is kept
    CANCELLED, UNKNOWN,                 UNAVAILABLE                            the class is kept
    DEADLINE_EXCEEDED, INTERNAL,
    UNAVAILABLE, errors of the
    transport
    ALREADY_EXISTS, DATA_LOSS           INTERNAL                               the class is kept

If the request for how busy the class is (FunctionGetCurrentStats) fails, or has no answer within `STATS_TIMEOUT`, GetStats ends
with the status that the same error has in `flywheel_server.errors`. The class is then looked up again in the background, to see
whether it can be reached; see `RemoteClass.is_reachable`.
"""

import asyncio
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import modal
import structlog

from flywheel_server import running_time
from flywheel_server.engines.base import EngineError, EngineOverloadedError, EngineStats, EngineUnavailableError
from flywheel_server.engines.modal.errors import ErrorTranslator, Target
from flywheel_server.engines.modal.reachability import Reachability
from flywheel_server.engines.modal.remote_fields import (
    CONTRACT_FIELDS,
    TRACE_ARGUMENT,
    fields_of,
    further_fields,
    unsupported,
)
from flywheel_server.engines.modal.retries import retry_refused
from flywheel_server.engines.modal.waits import cancel_and_wait, modal_result, retrieve_error, start_in_background
from flywheel_server.messages import GenerationRequest

log = structlog.stdlib.get_logger(__name__)

Method: TypeAlias = modal.Function[..., Any, Any]

STATS_TIMEOUT: Final = 5.0
"""Seconds that Modal may take to tell how busy the class is."""

PROBE_TIMEOUT: Final = 15.0
"""Seconds that Modal may take to find the class in the background, to see whether the class can be reached."""

LOOKUP_TIMEOUT: Final = 5.0
"""Seconds that Modal may take to look up the class again, while calls wait."""

LOOKUP_INTERVAL: Final = 60.0
"""Seconds after which the class is looked up again, in the background. It may have been deployed again, with other methods."""


@dataclass(frozen=True, slots=True)
class Methods:
    """The methods of the class as of its last look-up.

    Attributes:
        generate: Returns all samples.
        generate_deltas: Streams events through a queue; None if the class has no such method.
        tokenize: Returns the tokens of a prompt; None if the class has no such method.
        fields: The fields of a request that `generate_deltas` takes, or `generate` if there is no `generate_deltas`.
    """

    generate: Method
    generate_deltas: Method | None
    tokenize: Method | None
    fields: frozenset[str]

    def unsupported_fields(self, request: GenerationRequest) -> list[str]:
        """Returns the fields that are set in the request and that the class does not take."""
        return [name for name in further_fields(request) if name not in self.fields]


class RemoteClass:
    """A class on Modal, which is looked up at the first call, and again every minute, or if Modal refuses to call it.

    Arguments:
        target: The name of the class.
        options: The options of its containers; None for the options of its deployment.
        errors: Translates errors of Modal.
    """

    def __init__(self, target: Target, options: dict[str, Any] | None, errors: ErrorTranslator) -> None:
        self._target = target
        self._options = options
        self._errors = errors
        self._methods: Methods | None = None
        self._looked_up_at = 0.0
        self._is_stale = False
        self._lookup_lock = asyncio.Lock()
        self._reachability = Reachability()
        self._stats_request: asyncio.Task[EngineStats] | None = None
        self._probing: asyncio.Task[None] | None = None

    async def close(self) -> None:
        """Cancels the requests in the background."""
        await cancel_and_wait(self._stats_request, self._probing)

    async def methods(self) -> Methods:
        """Returns the methods of the class, which is looked up if necessary; raises `EngineError` if it was never found."""
        async with self._lookup_lock:
            if self._methods is None:
                try:
                    with self._errors():
                        self._methods = await retry_refused(self._look_up)
                except EngineError:
                    self._reachability.note_failure()
                    raise
            elif self._is_stale:
                self._is_stale = False
                try:
                    with self._errors():
                        async with asyncio.timeout(LOOKUP_TIMEOUT):
                            self._methods = await self._look_up()
                except EngineError as error:
                    log.warning("class not looked up anew", error=str(error))
            return self._methods

    async def methods_for(self, request: GenerationRequest) -> Methods:
        """Does what `methods` does; raises `UnsupportedFieldError` if the class does not take a field of the request."""
        methods = await self.methods()
        if methods.unsupported_fields(request):
            # The class may have been deployed again since its last look-up.
            self._mark_stale(methods)
            methods = await self.methods()
        if error := unsupported(methods.unsupported_fields(request)):
            raise error
        return methods

    @property
    def supported_fields(self) -> frozenset[str]:
        """The fields of a request that the class takes; all fields of the contract until the class was found."""
        return self._methods.fields & CONTRACT_FIELDS if self._methods else CONTRACT_FIELDS

    async def spawn(self, method: str, arguments: dict[str, Any], trace: dict[str, str]) -> modal.FunctionCall[Any]:
        """Spawns a call of the method with this name; raises `EngineError`.

        The headers of the trace are sent if there are some, and the class takes them.
        """
        tried: Methods | None = None

        async def spawn_once() -> modal.FunctionCall[Any]:
            nonlocal tried
            if tried is not None:
                self._mark_stale(tried)
            tried = await self.methods()
            function: Method | None = getattr(tried, method)
            if function is None:
                raise EngineUnavailableError(f"the class was deployed anew, without {method}")
            sent = {TRACE_ARGUMENT: trace} if trace and TRACE_ARGUMENT in tried.fields else {}
            return await modal_result(function.spawn.aio(**arguments, **sent))

        with self._errors():
            call = await retry_refused(spawn_once)
        self._reachability.note_success()
        return call

    async def stats(self) -> EngineStats:
        """Returns how busy the class is, according to Modal; raises `EngineError`. Concurrent callers share one request."""
        if self._stats_request is None or self._stats_request.done():
            self._stats_request = start_in_background(self._request_stats())
            self._stats_request.add_done_callback(retrieve_error)
        return await asyncio.shield(self._stats_request)

    def is_reachable(self) -> bool:
        """Returns whether calls can be made, as far as the last requests tell; see `Reachability`."""
        return self._reachability.is_reachable

    def look_up_again(self) -> None:
        """Has the class looked up again for the next call."""
        self._is_stale = True

    def _mark_stale(self, methods: Methods) -> None:
        """Has the class looked up again for the next call, unless that has been done since these methods were returned."""
        if methods is self._methods:
            self._is_stale = True

    async def _look_up(self) -> Methods:
        environment = self._target.environment or None
        found = modal.Cls.from_name(self._target.app, self._target.class_name, environment_name=environment)
        await modal_result(found.hydrate.aio())
        if self._options is not None:
            found = found.with_options(**self._options)
        instance = found()
        generate = await modal_result(instance.generate.hydrate.aio())
        generate_deltas = await _found(instance, "generate_deltas")
        tokenize = await _found(instance, "tokenize")
        self._reachability.note_success()
        self._looked_up_at = running_time.now()
        return Methods(generate, generate_deltas, tokenize, await fields_of(generate_deltas or generate))

    async def _request_stats(self) -> EngineStats:
        methods = await self.methods()
        try:
            with self._errors():
                async with asyncio.timeout(STATS_TIMEOUT):
                    stats = await modal_result(methods.generate.get_current_stats.aio())
        except EngineError:
            self._start_probe()
            raise
        self._reachability.note_success()
        if running_time.now() - self._looked_up_at > LOOKUP_INTERVAL:
            self._start_probe()
        return EngineStats(backlog=stats.backlog, num_total_runners=stats.num_total_runners)

    def _start_probe(self) -> None:
        if self._probing is None or self._probing.done():
            self._probing = start_in_background(self._probe())

    async def _probe(self) -> None:
        """Looks the class up again, to see whether it can be reached, and which methods and fields it has now."""
        try:
            with self._errors():
                async with asyncio.timeout(PROBE_TIMEOUT):
                    self._methods = await self._look_up()
        except EngineOverloadedError:
            pass  # Modal can be reached, but does not tell whether the class can be
        except EngineError:
            self._reachability.note_failure()


async def _found(instance: Any, name: str) -> Method | None:  # noqa: ANN401 - Modal makes the attributes
    """Returns the method with this name, or None if the class has none. Makes no request: Modal has told the methods."""
    try:
        method: Method = getattr(instance, name)
        return await modal_result(method.hydrate.aio())
    except modal.exception.NotFoundError:
        return None
