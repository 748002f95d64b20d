"""The class on Modal: found by its name, kept, and found anew when there is doubt about it.

What becomes of a request that looks the class up (ClassGet, FunctionGet, FunctionBindParams), by the status that it fails with,
once Modal's client has given up repeating it:

    status                              no class was found yet                 one was found before
    NOT_FOUND, PERMISSION_DENIED,       3 tries, then FAILED_PRECONDITION      it is kept, and Modal's answer to the call
    UNAUTHENTICATED, INVALID_ARGUMENT,                                         decides
    OUT_OF_RANGE, UNIMPLEMENTED
    FAILED_PRECONDITION, ABORTED        3 tries, then UNAVAILABLE              it is kept
    RESOURCE_EXHAUSTED                  RESOURCE_EXHAUSTED                     it is kept
    CANCELLED, UNKNOWN,                 UNAVAILABLE                            it is kept
    DEADLINE_EXCEEDED, INTERNAL,
    UNAVAILABLE, errors of the
    transport
    ALREADY_EXISTS, DATA_LOSS           INTERNAL                               it is kept

And of one that asks how busy it is (FunctionGetCurrentStats): GetStats ends with the status that the same error has in
`flywheel_server.errors`, and so if there is no answer within `STATS_TIMEOUT`. The class is then looked up anew, which tells
whether it can be reached: see `RemoteClass.is_reachable`.
"""

import asyncio
import contextvars
from collections.abc import Callable, Coroutine
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import modal
import structlog

from flywheel_server.engines.base import EngineError, EngineOverloadedError, EngineStats, EngineUnavailableError
from flywheel_server.engines.modal.errors import Target
from flywheel_server.engines.modal.reachability import Reachability
from flywheel_server.engines.modal.remote_fields import further_fields, signature_of, unsupported
from flywheel_server.engines.modal.retries import retry_refused
from flywheel_server.engines.modal.waits import modal_result
from flywheel_server.messages import GenerationRequest

log = structlog.stdlib.get_logger(__name__)

Method: TypeAlias = modal.Function[..., Any, Any]

STATS_TIMEOUT: Final = 5.0
"""Seconds that Modal has to say how busy the class is."""

PROBE_TIMEOUT: Final = 15.0
"""Seconds that Modal has to find the class, when that is only done to see whether it can be reached."""

LOOKUP_TIMEOUT: Final = 5.0
"""Seconds that Modal has to find a class anew that was found before. Calls wait for it."""


@dataclass(frozen=True, slots=True)
class Methods:
    """The methods of the class as it was found, as far as it has them, and the arguments of the one that generates."""

    generate: Method
    generate_deltas: Method | None
    signature: frozenset[str] | None

    def refused(self, request: GenerationRequest) -> str | None:
        """Returns a field that is set in the request and that the class is known not to take; None if there is none."""
        return next((name for name in further_fields(request) if self.signature and name not in self.signature), None)


class RemoteClass:
    """A class on Modal, which is looked up at the first call, and again if Modal refuses to call it.

    Arguments:
        target: Its name.
        options: Those for its containers; None for those of its deployment.
        errors: Turns whatever comes from Modal into errors of `engines.base`.
    """

    def __init__(
        self, target: Target, options: dict[str, Any] | None, errors: Callable[[], AbstractContextManager[None]]
    ) -> None:
        self._target = target
        self._options = options
        self._errors = errors
        self._methods: Methods | None = None
        self._doubted = False
        self._looking_up = asyncio.Lock()
        self._reach = Reachability()
        self._asking: asyncio.Task[EngineStats] | None = None
        self._probing: asyncio.Task[None] | None = None

    async def close(self) -> None:
        """Ends what goes on in the background."""
        tasks = [task for task in (self._asking, self._probing) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def methods(self) -> Methods:
        """Returns the methods of the class; raises `EngineError` if it cannot be found and was not found before."""
        async with self._looking_up:
            if self._methods is None:
                try:
                    with self._errors():
                        self._methods = await retry_refused(self._look_up)
                except EngineError:
                    self._reach.failed()
                    raise
            elif self._doubted:
                self._doubted = False
                try:
                    with self._errors():
                        async with asyncio.timeout(LOOKUP_TIMEOUT):
                            self._methods = await self._look_up()
                except EngineError as error:
                    log.warning("class not looked up anew", error=str(error))
            return self._methods

    async def methods_for(self, request: GenerationRequest) -> Methods:
        """Returns the methods; raises `UnsupportedFieldError` if the class is known not to take a field of the request."""
        methods = await self.methods()
        if methods.refused(request):
            # It may have been deployed anew since it was found.
            self._doubt(methods)
            methods = await self.methods()
        if field := methods.refused(request):
            raise unsupported(field)
        return methods

    async def spawn(self, method: str, arguments: dict[str, Any]) -> modal.FunctionCall[Any]:
        """Calls the method of this name; raises `EngineError`."""
        tried: Methods | None = None

        async def once() -> modal.FunctionCall[Any]:
            nonlocal tried
            if tried is not None:
                self._doubt(tried)
            tried = await self.methods()
            function: Method | None = getattr(tried, method)
            if function is None:
                raise EngineUnavailableError(f"the class was deployed anew, without {method}")
            return await modal_result(function.spawn.aio(**arguments))

        with self._errors():
            call = await retry_refused(once)
        self._reach.succeeded()
        return call

    async def stats(self) -> EngineStats:
        """Returns what Modal says of the class; raises `EngineError`."""
        if self._asking is None:
            self._asking = _background(self._ask())
            self._asking.add_done_callback(self._asked)
        return await asyncio.shield(self._asking)

    def is_reachable(self) -> bool:
        """Returns whether calls can be made, as far as that is known."""
        return bool(self._reach)

    def _doubt(self, methods: Methods) -> None:
        if methods is self._methods:
            self._doubted = True

    async def _look_up(self) -> Methods:
        environment = self._target.environment or None
        found = modal.Cls.from_name(self._target.app, self._target.class_name, environment_name=environment)
        await modal_result(found.hydrate.aio())
        if self._options is not None:
            found = found.with_options(**self._options)
        instance = found()
        generate = await modal_result(instance.generate.hydrate.aio())
        try:
            # No request any more: Modal has said which methods there are.
            generate_deltas = await modal_result(instance.generate_deltas.hydrate.aio())
        except modal.exception.NotFoundError:
            generate_deltas = None
        self._reach.succeeded()
        return Methods(generate, generate_deltas, await signature_of(generate_deltas or generate))

    async def _ask(self) -> EngineStats:
        methods = await self.methods()
        try:
            with self._errors():
                async with asyncio.timeout(STATS_TIMEOUT):
                    stats = await modal_result(methods.generate.get_current_stats.aio())
        except EngineError:
            if self._probing is None or self._probing.done():
                self._probing = _background(self._probe())
            raise
        self._reach.succeeded()
        return EngineStats(backlog=stats.backlog, num_total_runners=stats.num_total_runners)

    def _asked(self, asking: asyncio.Task[EngineStats]) -> None:
        self._asking = None
        if not asking.cancelled():
            asking.exception()  # for asyncio, if nobody waits for it any more

    async def _probe(self) -> None:
        """Looks the class up anew, to see whether it can be reached."""
        try:
            with self._errors():
                async with asyncio.timeout(PROBE_TIMEOUT):
                    self._methods = await self._look_up()
        except EngineOverloadedError:
            pass  # Modal can be reached, and does not say more
        except EngineError:
            self._reach.failed()


def _background(work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    """Starts work that is done in no call's context, so that what it logs is of none."""
    return asyncio.create_task(work, context=contextvars.Context())
