"""Runs the completions of all requests on llama.cpp, within its slots and its context."""

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from flywheel_server.engines.base import EngineError, EngineFailedError, EngineUnavailableError, PreparedRequest, Sink
from flywheel_server.engines.capacity import Capacity
from flywheel_server.engines.llama_cpp.completion import Completion
from flywheel_server.engines.llama_cpp.handover import Handover
from flywheel_server.engines.llama_cpp.llama import Llama, step_tokens
from flywheel_server.engines.llama_cpp.progress import Progress
from flywheel_server.engines.llama_cpp.prompt_queue import PromptQueue
from flywheel_server.engines.llama_cpp.sample_groups import SampleGroups
from flywheel_server.engines.seeds import first_seed
from flywheel_server.engines.uninterrupted import wait_until_done
from flywheel_server.messages import GenerationRequest


class Completions:
    """The completions of an engine. `start` comes before `generate`, and `stop` after it.

    Arguments:
        slots, batch_tokens: See `Llama`.
        context_tokens: Tokens of context that all slots share.
        cache, exact_seeds: See `EmbeddedEngine`.

    Attributes:
        cached_prompt_tokens: Tokens of prompts that llama.cpp has skipped in all completions that have ended.
    """

    def __init__(self, *, slots: int, batch_tokens: int, context_tokens: int, cache: bool, exact_seeds: bool) -> None:
        self.cached_prompt_tokens = 0
        self._slots = slots
        self._context_tokens = context_tokens
        self._cache = cache
        self._exact_seeds = exact_seeds
        self._capacity = Capacity(slots, context_tokens)
        self._prompts = PromptQueue(step_tokens(batch_tokens, slots) - slots)
        self._stopping = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._running: set[Completion] = set()
        self._llama: Llama
        self._threads: ThreadPoolExecutor
        self._handover: Handover

    @property
    def waiting(self) -> int:
        """How many completions wait for capacity."""
        return self._capacity.waiting

    def start(self, llama: Llama) -> None:
        """Runs completions on this model, on the running event loop."""
        self._stopping = False
        self._llama = llama
        self._threads = ThreadPoolExecutor(self._slots, "llama.cpp complete")
        self._handover = Handover(asyncio.get_running_loop())

    async def stop(self) -> None:
        """Ends all completions after the next step of llama.cpp, and returns when they have ended."""
        self._stopping = True
        for completion in self._running:
            completion.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.to_thread(self._threads.shutdown)
        del self._llama

    async def generate(self, prepared: PreparedRequest, sink: Sink) -> None:
        """Emits the events of the request; see `Engine.generate`."""
        progress = Progress(sink, prepared.request.num_samples)
        groups = self.groups(prepared.request, len(prepared.prompt), prepared.starts_per_step)
        remaining = iter(groups.indexes)
        seed = first_seed(prepared.request)
        tasks = [
            asyncio.create_task(self._complete_all(prepared, seed, remaining, progress)) for _ in range(groups.concurrency)
        ]
        for task in tasks:
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        try:
            await progress.finished
        finally:
            progress.finished.cancel()
            # A task ends, and releases its capacity, after the next step of llama.cpp. The caller does not wait for that.
            for task in tasks:
                task.cancel()

    def groups(self, request: GenerationRequest, prompt_tokens: int, starts_per_step: int | None) -> SampleGroups:
        """Returns the groups of the request's samples, each of which is a completion, and starts in one step."""
        return SampleGroups.of(
            request,
            prompt_tokens,
            slots=self._slots,
            context_tokens=self._context_tokens,
            one_by_one=self._runs_alone(request),
            max_size=starts_per_step,
        )

    def _runs_alone(self, request: GenerationRequest) -> bool:
        """Returns whether each sample of the request has llama.cpp for itself.

        The logits differ a little with all that is computed in the same step, and with all that the context holds. So equal
        requests have equal samples only if each sample is computed alone, without what other completions left in the context.
        """
        return self._exact_seeds and request.seed is not None

    async def _complete_all(self, prepared: PreparedRequest, seed: int, groups: Iterator[range], progress: Progress) -> None:
        """Runs completions one after the other, so that the request never holds more context than admission counted for it.

        A further completion would wait for capacity, ahead of other requests for which admission has counted free capacity.
        """
        for indexes in groups:
            if progress.finished.done():
                return  # the request has failed, or its caller has left
            await self._complete(prepared, seed, indexes, progress)

    async def _complete(self, prepared: PreparedRequest, seed: int, indexes: range, progress: Progress) -> None:
        """Generates the samples with these indexes once there is capacity. Events and errors go to `progress`."""
        request, prompt = prepared.request, prepared.prompt
        is_alone = self._runs_alone(request)
        slots = self._slots if is_alone else len(indexes)
        try:
            async with self._capacity.reserve(slots, len(prompt) + len(indexes) * request.max_tokens):
                self._refuse_if_stopping()
                progress.start(len(prompt))
                completion = Completion(
                    self._llama,
                    prepared,
                    indexes,
                    seed=seed,
                    emit=partial(self._handover.call_soon, progress.emit),
                    cache=self._cache and not is_alone,
                )
                # One slot reads the prompt for several samples. Until it has, the others would keep their last prompts, which
                # take context that is reserved for these samples.
                erase = is_alone or len(indexes) > 1
                # If all slots started in one step, building such a constraint for each would keep other callers waiting.
                is_costly = prepared.starts_per_step is not None and prepared.starts_per_step < self._slots
                await self._run_in_order(completion, request, len(prompt), alone=erase or is_costly, erase=erase)
                self._refuse_if_stopping()
        except EngineError as error:
            progress.fail(error)
        except Exception as error:  # noqa: BLE001 - without an event or an error, the call would hang
            failure = EngineFailedError("the completion failed")
            failure.__cause__ = error
            progress.fail(failure)

    async def _run_in_order(
        self, completion: Completion, request: GenerationRequest, prompt_tokens: int, *, alone: bool, erase: bool
    ) -> None:
        """Runs the completion when llama.cpp may get its prompt. Ends it at once if the time limit passes before.

        `alone` says whether no other prompt may be unread at the same time, and `erase` whether to erase first what idle slots
        hold.
        """
        try:
            async with (
                asyncio.timeout(request.time_limit or None) as wait,
                self._prompts.admit(prompt_tokens, alone=alone) as pending,
            ):
                wait.reschedule(None)
                self._refuse_if_stopping()
                if erase:
                    loop = asyncio.get_running_loop()
                    await wait_until_done(loop.run_in_executor(self._threads, self._llama.erase_idle_slots))
                await self._run(completion, partial(self._handover.call_soon, pending.note_progress))
        except TimeoutError:
            if not wait.expired():
                raise
            completion.end_for_time()

    async def _run(self, completion: Completion, on_progress: Callable[[int], None]) -> None:
        """Runs the completion in a thread. Returns only when llama.cpp has released its slots, also if cancelled."""
        self._running.add(completion)
        self._handover.threads = len(self._running)
        try:
            work = asyncio.get_running_loop().run_in_executor(self._threads, completion.run, on_progress)
            await wait_until_done(work, completion.cancel)
        finally:
            # If run_in_executor raises because no thread could be started, another thread may still run the work later.
            completion.cancel()
            self.cached_prompt_tokens += completion.cached_tokens
            self._running.remove(completion)
            self._handover.threads = len(self._running)

    def _refuse_if_stopping(self) -> None:
        if self._stopping:
            raise EngineUnavailableError("the engine is stopping")
