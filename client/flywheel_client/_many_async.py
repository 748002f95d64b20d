"""The results of `generate_many`, for asyncio."""

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator
from types import TracebackType
from typing import Any, Final, Self, TypeVar, Unpack

from flywheel_proto.v1 import generation_pb2

from flywheel_client._calls_async import retrieve
from flywheel_client._errors import FlywheelError
from flywheel_client._many import BasePromptResults
from flywheel_client._request import GenerationFields, Prompt
from flywheel_client._results import PromptResult, Response, response_from

T = TypeVar("T")

Answer = Callable[[generation_pb2.GenerationRequest], Awaitable[generation_pb2.GenerationResponse]]

_END: Final = object()
"""Takes the place of a prompt after the last one."""


class AsyncPromptResults(BasePromptResults):
    """Yields the results of `generate_many` as they come, with the positions of their prompts.

    Prompts are read, and calls begin, only while a task waits for the next result. All running calls are cancelled on the
    server when an `async with` block ends, by `aclose()`, by an exception or cancellation that interrupts the wait for the next
    result, and when the last reference to this object is gone.
    """

    def __init__(
        self,
        answer: Answer,
        prompts: Iterable[Prompt] | AsyncIterable[Prompt],
        concurrency: int,
        **fields: Unpack[GenerationFields],
    ) -> None:
        super().__init__(prompts, concurrency, **fields)
        self._loop = asyncio.get_running_loop()
        self._answer = answer
        self._prompts = aiter(prompts) if isinstance(prompts, AsyncIterable) else iter(prompts)
        self._running: dict[asyncio.Task[Response | FlywheelError], int] = {}
        self._reading: asyncio.Task[object] | None = None
        self._ended = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> PromptResult:
        if asyncio.get_running_loop() is not self._loop:
            raise RuntimeError("the results belong to another event loop")
        try:
            while not self._ended:
                if self._reading is None and not self._all_read and len(self._running) < self._concurrency:
                    self._reading = self._task(_next_prompt(self._prompts))
                if not (tasks := self._tasks()):
                    break
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                if self._ended:
                    break
                if self._reading in done:
                    self._begin_next()
                    continue
                finished = next(task for task in self._running if task in done)
                return PromptResult(self._running.pop(finished), finished.result())
            raise StopAsyncIteration
        except BaseException:
            await self.aclose()
            raise

    async def aclose(self) -> None:
        """Cancels all running calls, waits until they have ended, and ends the iteration."""
        self._ended = True
        if tasks := self._tasks():
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    def __del__(self) -> None:
        # The garbage collector may run in any thread. A loop that is closed has ended its tasks.
        if not self._ended and not self._loop.is_closed():
            for task in self._tasks():
                self._loop.call_soon_threadsafe(task.cancel)

    def _tasks(self) -> list[asyncio.Task[Any]]:
        """Returns all running tasks."""
        return [*self._running, *([] if self._reading is None else [self._reading])]

    def _task(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = self._loop.create_task(work)
        task.add_done_callback(retrieve)
        return task

    def _begin_next(self) -> None:
        """Begins the call for the prompt that was read, unless there was none."""
        reading, self._reading = self._reading, None
        prompt: Any = reading.result() if reading else _END
        if prompt is _END:
            self._all_read = True
            return
        position = self._prompts_read
        self._running[self._task(_outcome(self._answer, self._request_for(prompt)))] = position


async def _next_prompt(prompts: Iterator[Prompt] | AsyncIterator[Prompt]) -> object:
    return await anext(prompts, _END) if isinstance(prompts, AsyncIterator) else next(prompts, _END)


async def _outcome(answer: Answer, request: generation_pb2.GenerationRequest) -> Response | FlywheelError:
    try:
        return response_from(await answer(request))
    except FlywheelError as error:
        return error
