"""The embedded engine: llama.cpp runs a GGUF model in this process."""

import asyncio
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, contextmanager, suppress
from http.client import HTTPException
from pathlib import Path
from typing import Final, Self

import structlog

from flywheel_server.engines.base import (
    Engine,
    EngineFailedError,
    EngineModel,
    EngineStats,
    EngineUnavailableError,
    InvalidFieldError,
    PreparedRequest,
    PromptFormat,
    PromptToken,
    PromptTooLongError,
    Sink,
)
from flywheel_server.engines.llama_cpp import native_log
from flywheel_server.engines.llama_cpp.chat_template import ChatTemplate, UnusableTemplateError
from flywheel_server.engines.llama_cpp.completions import Completions
from flywheel_server.engines.llama_cpp.constraints.grammars import grammar_of
from flywheel_server.engines.llama_cpp.constraints.probe import starts_per_step, trial_tokenizer
from flywheel_server.engines.llama_cpp.llama import Llama
from flywheel_server.engines.llama_cpp.load_failure import load_failure, template_failure
from flywheel_server.engines.llama_cpp.model_file import ModelFile, UnusableModelError
from flywheel_server.engines.llama_cpp.tokenizer import CHUNK_CHARACTERS, StoppedError, Tokenizer
from flywheel_server.engines.samples import FinishedSamplesSink
from flywheel_server.engines.uninterrupted import wait_until_done
from flywheel_server.messages import FieldViolation, GenerationRequest
from flywheel_server.system import heap
from flywheel_server.system.memory import total_memory

log = structlog.stdlib.get_logger(__name__)

SUPPORTED_FIELDS: Final = frozenset(GenerationRequest.model_fields)
"""The fields of a request that the engine honours; without a chat template, all but `messages`."""

CHECK_REQUEST: Final = GenerationRequest(text="Hello", max_tokens=1)
"""The request of `check`, which shows that the model generates."""

MAX_CONCURRENT_TOKENIZATIONS: Final = 2
"""Prompts of callers that are tokenized at the same time. One further thread keeps `check` from waiting for them."""


class EmbeddedEngine(Engine):
    """Runs a GGUF model.

    Arguments:
        model: The GGUF file.
        context_tokens: Tokens of context that all samples share. A single sample may use all of them, up to the context that
            the model was trained for.
        slots, threads, batch_tokens, memory_map: See `Llama`. Further samples wait for a slot. A cancel takes effect after a
            step.
        prompt_format: "chat" puts a text into the model's chat template unless the text is in that template already; "raw"
            leaves it as it is. None means "chat" if the model has a template, and "raw" if not.
        prompt_cache: Whether a slot skips the tokens that a prompt begins with if its last prompt, from any caller, began with
            the same tokens.
        exact_seeds: Whether a request that sets a seed has the engine for itself, so that it gives the same samples each time.
            The logits differ a little with everything that llama.cpp computes in the same step or keeps in its context.
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
        exact_seeds: bool = True,
        memory_map: bool = True,
    ) -> None:
        self._path = model
        self._pool_tokens = context_tokens
        self._context_tokens = context_tokens
        self._slots = slots
        self._threads = threads
        self._batch_tokens = batch_tokens
        self._configured_format = prompt_format
        self._prompt_format: PromptFormat = prompt_format or "raw"
        self._exact_seeds = exact_seeds
        self._memory_map = memory_map
        self._completions = Completions(
            slots=slots,
            batch_tokens=batch_tokens,
            context_tokens=context_tokens,
            cache=prompt_cache,
            exact_seeds=exact_seeds,
        )
        self._stopping = False
        self._stack = AsyncExitStack()
        self._file: ModelFile
        self._llama: Llama
        self._tokenizer: Tokenizer
        self._tokenizing: ThreadPoolExecutor

    async def __aenter__(self) -> Self:
        self._stopping = False
        errors = native_log.Errors()
        try:
            async with AsyncExitStack() as stack:
                errors = stack.enter_context(native_log.captured())
                stack.push_async_callback(asyncio.to_thread, self._unload)
                try:
                    # xllamacpp holds the interpreter lock while it loads, so no other thread runs Python during that time.
                    await wait_until_done(asyncio.get_running_loop().run_in_executor(None, self._load))
                except RuntimeError:
                    await asyncio.to_thread(errors.wait_for_last)
                    raise
                finally:
                    _restore_signal_handlers()
                self._tokenizing = ThreadPoolExecutor(MAX_CONCURRENT_TOKENIZATIONS + 1, "llama.cpp tokenize")
                self._completions.start(self._llama)
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
        await self._completions.stop()
        await asyncio.to_thread(self._tokenizing.shutdown)
        await self._stack.aclose()

    def _load(self) -> None:
        self._file = ModelFile.read(self._path)
        self._prompt_format = self._configured_format or ("chat" if self._file.has_chat_template else "raw")
        self._log_unusual_model()
        is_chat = self._prompt_format == "chat"
        self._llama = Llama(
            self._path,
            context_tokens=self._pool_tokens,
            slots=self._slots,
            threads=self._threads,
            batch_tokens=self._batch_tokens,
            memory_map=self._memory_map,
            http_threads=MAX_CONCURRENT_TOKENIZATIONS + 1,
            uses_chat_template=is_chat,
            verbosity=native_log.verbosity(),
        )
        self._context_tokens = min(self._pool_tokens, self._llama.trained_context())
        template = ChatTemplate(self._llama, self._file.vocabulary) if is_chat else None
        self._tokenizer = Tokenizer(self._llama, self._file.vocabulary, self._context_tokens, template)
        try:
            self._tokenizer.tokens(CHECK_REQUEST, lambda: False)
        except PromptTooLongError as error:
            raise UnusableModelError(self._context_problem(error.prompt_tokens)) from error
        self._prepare_for_grammars()

    def _prepare_for_grammars(self) -> None:
        """Does what the first grammars would do while other callers wait.

        That is to build the vocabulary for trials, and to make llama.cpp read its own vocabulary for LLGuidance.
        """
        trial_tokenizer()
        body = {"prompt": self._llama.tokenize("a"), "max_tokens": 1, "grammar": grammar_of(None, "a", None)}
        self._llama.complete(body, lambda _: True)

    def _context_problem(self, prompt_tokens: int) -> str:
        problem = f"has no room for a prompt of one word, {prompt_tokens} tokens, in a context of {self._context_tokens}"
        if self._context_tokens < self._pool_tokens:
            return f"{problem}, and the model was trained for no longer context"
        setting = "--embedded-context (FLYWHEEL_EMBEDDED_CONTEXT; for the Model on Modal: FLYWHEEL_MODAL_CONTEXT)"
        return f"{problem}; raise {setting}"

    def _log_unusual_model(self) -> None:
        if not self._file.has_chat_template:
            if self._prompt_format == "chat":
                log.warning("the model has no chat template; prompts are put into ChatML", model=self._path.stem)
            elif self._configured_format is None:
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
        stopped = threading.Event()
        loop = asyncio.get_running_loop()
        try:
            work = loop.run_in_executor(self._tokenizing, self._prepare, request, lambda: self._stopping or stopped.is_set())
            return await wait_until_done(work, stopped.set)
        except StoppedError:
            raise EngineUnavailableError("the engine is stopping") from None
        except (OSError, HTTPException, ValueError, KeyError) as error:
            raise EngineFailedError("llama.cpp could not make tokens of the prompt") from error
        finally:
            # If run_in_executor raises because no thread could be started, another thread may still run the work later.
            stopped.set()

    def _check_logit_bias(self, request: GenerationRequest) -> None:
        """Raises `InvalidFieldError` for token ids that do not exist, which llama.cpp would ignore."""
        size = self._file.vocabulary_size
        description = f"must be for a token of the vocabulary: 0 to {size - 1}"
        if wrong := [FieldViolation(f"logit_bias[{each}]", description) for each in request.logit_bias if each >= size]:
            raise InvalidFieldError.of(wrong)

    def _prepare(self, request: GenerationRequest, is_stopped: Callable[[], bool]) -> PreparedRequest:
        try:
            violations: list[FieldViolation] = []
            with _collecting(violations):
                self._check_logit_bias(request)
            with _collecting(violations):
                grammar = grammar_of(request.json_schema, request.regex, request.choices)
            if violations:
                with _collecting(violations):
                    self._tokenizer.check_prompt(request)
                raise InvalidFieldError.of(violations)
            self._tokenizer.check_length(request)
            prompt = self._tokenizer.tokens(request, is_stopped)
            starts = starts_per_step(grammar) if grammar else None
            context_tokens = self._completions.groups(request, len(prompt), starts).context_tokens
            return PreparedRequest(request, prompt, context_tokens, grammar, starts)
        finally:
            if request.prompt_bytes > CHUNK_CHARACTERS:
                heap.release_freed()

    async def generate(self, prepared: PreparedRequest, sink: Sink) -> None:
        """Emits the events of the request; see `Engine.generate`."""
        await self._completions.generate(prepared, sink)

    def _refuse_if_stopping(self) -> None:
        if self._stopping:
            raise EngineUnavailableError("the engine is stopping")

    async def check(self) -> None:
        """Generates one token."""
        await self.generate(await self.prepare(CHECK_REQUEST), FinishedSamplesSink())

    async def tokenize(self, prepared: PreparedRequest) -> Sequence[PromptToken]:
        """Returns the tokens of the prompt; see `Engine.tokenize`."""
        return list(map(PromptToken, prepared.prompt, self._tokenizer.token_bytes(prepared.prompt)))

    async def stats(self) -> EngineStats:
        """Returns how many completions wait for capacity, and how many tokens of prompts were in the cache."""
        completions = self._completions
        return EngineStats(completions.waiting, num_total_runners=1, cached_prompt_tokens=completions.cached_prompt_tokens)

    def model(self) -> EngineModel:
        """Returns the loaded model."""
        return EngineModel(
            name=self._path.stem,
            engine="embedded",
            context_tokens=self._context_tokens,
            # llama.cpp's sampler counts the tokens of the prompt like generated ones.
            penalizes_prompt=True,
            prompt_format=self._prompt_format,
            slots=self._slots,
            shared_context_tokens=self._pool_tokens,
            tokenizers=MAX_CONCURRENT_TOKENIZATIONS,
            supported_fields=SUPPORTED_FIELDS if self._prompt_format == "chat" else SUPPORTED_FIELDS - {"messages"},
            exact_seeds=self._exact_seeds,
            slots_for_seed=self._slots if self._exact_seeds else None,
        )


@contextmanager
def _collecting(violations: list[FieldViolation]) -> Iterator[None]:
    """Adds the violations of an `InvalidFieldError` to the list, and goes on."""
    try:
        yield
    except InvalidFieldError as error:
        violations += error.violations


def _restore_signal_handlers() -> None:
    """Restores Python's signal handlers, which llama.cpp replaces while it loads."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            if (handler := signal.getsignal(number)) is not None:
                signal.signal(number, handler)
                # As the event loops do: a signal must not interrupt a system call.
                signal.siginterrupt(number, False)
