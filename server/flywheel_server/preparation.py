"""Prompts on their way into tokens, before their calls are let in."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final

from flywheel_server.access.callers import Caller
from flywheel_server.access.quotas import Usage
from flywheel_server.engines.base import Engine, EngineError, PreparedRequest, PromptTooLongError
from flywheel_server.messages import GenerationRequest

BYTES_PER_TOKEN: Final = 4
"""How much text is charged as one token if its call has ended before its tokens were counted."""


@dataclass(eq=False, slots=True)
class _Waiter:
    caller: Caller
    turn: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Preparation:
    """Has the engine tokenize prompts: by priority, as many at a time as the engine has threads, and one for each caller.

    A thread cannot be interrupted. So a call keeps its thread, and its part of its caller's quotas, until the thread is free,
    even if the call ends before. Otherwise a caller who cancels would have as many threads as it likes.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._threads = 0
        self._waiters: dict[_Waiter, None] = {}
        self._served: set[str] = set()

    def set_threads(self, threads: int) -> None:
        """Has so many prompts tokenized at a time from now on; 0 if that takes no time."""
        self._threads = threads
        self._let_in()

    async def prepare(self, request: GenerationRequest, caller: Caller, usage: Usage) -> PreparedRequest:
        """Returns the request as the engine takes it, and counts its prompt as usage; raises `EngineError`."""
        if not self._threads:
            return await self._engine.prepare(request)
        work = asyncio.create_task(self._work(request, caller, usage))
        # Asyncio logs an error that nobody retrieves, and a call that has ended does not retrieve it.
        work.add_done_callback(lambda done: done.cancelled() or done.exception())
        usage.lasts(work)
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            work.cancel()
            raise

    async def _work(self, request: GenerationRequest, caller: Caller, usage: Usage) -> PreparedRequest:
        async with self._thread_for(caller):
            usage.begin(-(-len(request.text.encode()) // BYTES_PER_TOKEN))
            try:
                prepared = await self._engine.prepare(request)
            except EngineError as error:
                usage.begin(error.counted_tokens if isinstance(error, PromptTooLongError) else 0)
                raise
            usage.begin(len(prepared.prompt))
            return prepared

    @asynccontextmanager
    async def _thread_for(self, caller: Caller) -> AsyncIterator[None]:
        waiter = _Waiter(caller)
        self._waiters[waiter] = None
        try:
            self._let_in()
            await waiter.turn
            yield
        finally:
            if waiter in self._waiters:
                del self._waiters[waiter]
            else:
                self._served.remove(caller.name)
            self._let_in()

    def _let_in(self) -> None:
        while len(self._served) < self._threads:
            candidates = [waiter for waiter in self._waiters if waiter.caller.name not in self._served]
            if not candidates:
                return
            # Of those with the highest priority, the one that came first.
            waiter = max(candidates, key=lambda candidate: candidate.caller.priority)
            del self._waiters[waiter]
            self._served.add(waiter.caller.name)
            if not waiter.turn.done():
                waiter.turn.set_result(None)
