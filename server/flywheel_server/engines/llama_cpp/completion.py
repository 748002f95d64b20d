"""One completion of llama.cpp: samples of one request, for which the prompt is read once."""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

from flywheel_server.engines.base import EngineFailedError, Event, PreparedRequest
from flywheel_server.engines.llama_cpp.constraints.guard import ConstraintGuard
from flywheel_server.engines.llama_cpp.llama import Chunk, Llama
from flywheel_server.engines.samples import GrowingSample
from flywheel_server.engines.seeds import seed_of_sample
from flywheel_server.messages import LikelyToken, Token

MIN_TEMPERATURE: Final = 1e-6
"""At lower temperatures the logits may overflow. Sampling is as good as greedy there, so these temperatures count as 0."""

MIN_REPETITION_PENALTY: Final = 1e-30
MAX_REPETITION_PENALTY: Final = 1e30
"""Beyond these limits, the logits would overflow, or llama.cpp would take the penalty for 0. At them, samples are the same."""


class Completion:
    """One completion. Its time limit counts from now on.

    Arguments:
        llama: The model.
        prepared: The request, with the tokens of its prompt and its grammar.
        indexes: The samples that the completion makes.
        seed: The seed of the request's first sample.
        emit: Called with each event, in the thread that calls `run` or `end_for_time`.
        cache: Whether llama.cpp skips the tokens with which the last prompt in the slot began too.

    Attributes:
        cached_tokens: Tokens of the prompt that llama.cpp skips; 0 until it has begun to read the prompt.

    Stop sequences are found here and not by llama.cpp. If a token ends with the beginning of a stop sequence, llama.cpp holds
    back the whole text of the token, and loses that text if the sample ends with this token.
    """

    def __init__(
        self,
        llama: Llama,
        prepared: PreparedRequest,
        indexes: Sequence[int],
        *,
        seed: int,
        emit: Callable[[Event], object],
        cache: bool,
    ) -> None:
        request = prepared.request
        self.cached_tokens = 0
        self._llama = llama
        self._body = _body(prepared, len(indexes))
        # llama.cpp counts the seed up for each further sample.
        self._body |= {"seed": seed_of_sample(seed, indexes[0]), "cache_prompt": cache}
        self._samples = [
            GrowingSample(index, len(prepared.prompt), request.stop, emit, seed=seed_of_sample(seed, index))
            for index in indexes
        ]
        self._grammar = prepared.grammar
        self._guards: list[ConstraintGuard] = []
        self._generated_tokens = [0] * len(indexes)
        self._eos_token_ids = frozenset(request.eos_token_ids)
        self._returns_tokens = request.logprobs > 0
        self._ends_at = time.monotonic() + (request.time_limit or math.inf)
        self._on_progress: Callable[[int], object]
        self._cancelled = False
        self._error: Exception | None = None

    def cancel(self) -> None:
        """Ends the completion after the next step of llama.cpp, whether the step reads the prompt or generates."""
        self._cancelled = True

    def end_for_time(self) -> None:
        """Ends the unfinished samples with the text so far, because the request's time limit has passed."""
        for sample, generated_tokens in zip(self._samples, self._generated_tokens, strict=True):
            if not sample.finished:
                sample.end("time", generated_tokens)

    def run(self, on_progress: Callable[[int], object]) -> None:
        """Blocks until all samples have finished or the completion is cancelled; raises `EngineFailedError`.

        `on_progress` is called with the number of unread tokens of the prompt: when the first step begins to read the prompt,
        and after each step that has read a part of it.
        """
        self._on_progress = on_progress
        if self._grammar:
            # Built here and not earlier, because this thread keeps nobody waiting.
            guard = ConstraintGuard(self._grammar)
            self._guards = [guard.copy() for _ in self._samples]
        self._llama.complete(self._body, self._on_chunk)
        if self._error is not None:
            raise EngineFailedError("the answer of llama.cpp cannot be used") from self._error
        if not self._cancelled and not self._all_finished():
            raise EngineFailedError("llama.cpp ended before the samples did")

    def _on_chunk(self, chunk: Chunk) -> bool:
        if self._cancelled:
            return True
        try:
            self._process(chunk)
            if time.monotonic() >= self._ends_at:
                self.end_for_time()
        except Exception as error:  # noqa: BLE001 - llama.cpp would swallow the error; `run` raises it
            self._error = error
            return True
        return self._all_finished()

    def _process(self, chunk: Chunk) -> None:
        if error := chunk.get("error"):
            raise EngineFailedError(f"llama.cpp: {error['message']}")
        if progress := chunk.get("prompt_progress"):
            self.cached_tokens = progress.get("cache", 0)
            self._on_progress(progress["total"] - progress["processed"])
            return
        choice = chunk["choices"][0]
        sample = self._samples[choice["index"]]
        if sample.finished:
            return
        described = (choice["logprobs"] or {}).get("content", ())
        guard = self._guards[choice["index"]] if self._guards else None
        # An end token that the request adds ends no text that has not the form yet.
        is_end = any(each["id"] in self._eos_token_ids for each in described) and (guard is None or guard.is_complete())
        if guard is not None and not is_end:
            self._check(guard, choice)
        if finish_reason := choice["finish_reason"]:
            sample.end(finish_reason, chunk["usage"]["completion_tokens"])
            return
        generated_tokens = self._generated_tokens[choice["index"]] = chunk["timings"]["predicted_n"]
        tokens = [_token(each) for each in described] if self._returns_tokens else ()
        if is_end:
            sample.end("stop", generated_tokens, tokens)
        else:
            sample.add(choice["text"], generated_tokens, tokens)

    def _check(self, guard: ConstraintGuard, choice: dict[str, Any]) -> None:
        """Raises `EngineFailedError` if llama.cpp has left the grammar, which it does if LLGuidance gives up."""
        if not guard.accepts(choice["text"]) or (choice["finish_reason"] == "stop" and not guard.is_complete()):
            raise EngineFailedError("llama.cpp did not keep to the grammar")

    def _all_finished(self) -> bool:
        return all(sample.finished for sample in self._samples)


def _token(described: dict[str, Any]) -> Token:
    """Returns a token as llama.cpp describes it. It describes a character of several tokens as one token."""
    return Token(
        described["id"],
        bytes(described["bytes"]),
        described["logprob"],
        tuple(LikelyToken(likely["id"], bytes(likely["bytes"]), likely["logprob"]) for likely in described["top_logprobs"]),
    )


def _body(prepared: PreparedRequest, num_samples: int) -> dict[str, Any]:
    """Returns the request to llama.cpp for so many samples, with each field that is left to llama.cpp."""
    request, prompt = prepared.request, prepared.prompt
    body = {
        "prompt": list(prompt),
        "n": num_samples,
        "max_tokens": request.max_tokens,
        "temperature": request.temperature if request.temperature > MIN_TEMPERATURE else 0.0,
        "top_k": request.top_k,
        "top_p": request.top_p,
        "min_p": request.min_p,
        # By default, llama.cpp would apply top_p and min_p before the temperature. And min_p before top_p would leave fewer
        # tokens to top_p, which adds up the probabilities of all.
        "samplers": ["penalties", "top_k", "temperature", "top_p", "min_p"],
        "presence_penalty": request.presence_penalty,
        "frequency_penalty": request.frequency_penalty,
        "repeat_penalty": min(max(request.repetition_penalty, MIN_REPETITION_PENALTY), MAX_REPETITION_PENALTY),
        # The penalties count all tokens so far. By default, llama.cpp would count the last 64.
        "repeat_last_n": len(prompt) + request.max_tokens,
        "logit_bias": list(request.logit_bias.items()),
        "stream": True,
        # Sends a chunk after each step that reads the prompt, so that a cancel takes effect after that step.
        "return_progress": True,
        # Adds the number of tokens generated so far to each chunk. A chunk has several tokens if they make up one character.
        "timings_per_token": True,
    }
    if prepared.grammar:
        body |= {"grammar": prepared.grammar}
    if request.logprobs:
        body |= {"logprobs": request.logprobs}
    elif request.eos_token_ids:
        # llama.cpp sends token ids only with probabilities. Probabilities after sampling cost less than those before.
        body |= {"logprobs": 1, "post_sampling_probs": True}
    return body
