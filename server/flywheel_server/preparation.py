"""Schedules the tokenization of prompts, which comes before admission."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from flywheel_server.access.callers import Caller
from flywheel_server.access.quotas import Usage
from flywheel_server.engines.base import Engine, EngineError, PreparedRequest, PromptTooLongError
from flywheel_server.messages import BYTES_PER_TOKEN, GenerationRequest


@dataclass(eq=False, slots=True)
class _Waiter:
    caller: Caller
    may_start: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Preparation:
    """Tokenizes prompts on the engine's threads, by priority, and with one thread at a time for each caller.

    A thread cannot be interrupted. So a call keeps its thread and its reserved quota until the thread is free, even if the call
    ends before. Otherwise, a caller could use any number of threads by cancelling its calls.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._threads = 0
        self._waiters: dict[_Waiter, None] = {}
        self._callers_with_thread: set[str] = set()

    def set_threads(self, threads: int) -> None:
        """Sets how many prompts are tokenized at a time; 0 if tokenization takes no time and needs no thread."""
        self._threads = threads
        self._assign_threads()

    async def prepare(self, request: GenerationRequest, caller: Caller, usage: Usage) -> PreparedRequest:
        """Returns the request, prepared by the engine, and counts the tokens of its prompt. Raises `EngineError`."""
        if not self._threads:
            return await self._engine.prepare(request)
        work = asyncio.create_task(self._work(request, caller, usage))
        # asyncio logs an exception that is never retrieved, and a call that has ended does not retrieve it.
        work.add_done_callback(lambda done: done.cancelled() or done.exception())
        usage.extend_until_done(work)
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            work.cancel()
            raise

    async def _work(self, request: GenerationRequest, caller: Caller, usage: Usage) -> PreparedRequest:
        async with self._thread_for(caller):
            usage.set_prompt_tokens(-(-request.prompt_bytes // BYTES_PER_TOKEN))
            try:
                prepared = await self._engine.prepare(request)
            except EngineError as error:
                usage.set_prompt_tokens(error.counted_tokens if isinstance(error, PromptTooLongError) else 0)
                raise
            usage.set_prompt_tokens(len(prepared.prompt))
            return prepared

    @asynccontextmanager
    async def _thread_for(self, caller: Caller) -> AsyncIterator[None]:
        waiter = _Waiter(caller)
        self._waiters[waiter] = None
        try:
            self._assign_threads()
            await waiter.may_start
            yield
        finally:
            if waiter in self._waiters:
                del self._waiters[waiter]
            else:
                self._callers_with_thread.remove(caller.name)
            self._assign_threads()

    def _assign_threads(self) -> None:
        while len(self._callers_with_thread) < self._threads:
            candidates = [waiter for waiter in self._waiters if waiter.caller.name not in self._callers_with_thread]
            if not candidates:
                return
            # `max` returns the first of several with the highest priority.
            waiter = max(candidates, key=lambda candidate: candidate.caller.priority)
            del self._waiters[waiter]
            self._callers_with_thread.add(waiter.caller.name)
            if not waiter.may_start.done():
                waiter.may_start.set_result(None)
