"""One completion of llama.cpp: samples of one request, for which the prompt is read once."""

from collections.abc import Callable, Collection, Sequence
from typing import Any, Final

from flywheel_server.engines.base import EngineFailedError, Event
from flywheel_server.engines.llama_cpp.llama import Chunk, Llama
from flywheel_server.engines.samples import GrowingSample
from flywheel_server.messages import GenerationRequest

MIN_TEMPERATURE: Final = 1e-6
"""At lower temperatures the logits may overflow. Sampling is as good as greedy there, so these temperatures count as 0."""


class Completion:
    """One completion. `run` blocks, and calls `emit` with each event in the thread that runs it.

    `on_progress` is called with the number of unread tokens of the prompt: when the first step begins to read the prompt, and
    after each step that has read a part of it.

    Stop sequences are found here and not by llama.cpp. If a token ends with the beginning of a stop sequence, llama.cpp holds
    back the whole text of the token, and loses that text if the sample ends with this token.
    """

    def __init__(
        self,
        llama: Llama,
        request: GenerationRequest,
        prompt: Sequence[int],
        indexes: Collection[int],
        *,
        emit: Callable[[Event], object],
        on_progress: Callable[[int], object],
        cache: bool,
    ) -> None:
        self._llama = llama
        self._body = _body(request, prompt, indexes) | {"cache_prompt": cache}
        self._samples = [GrowingSample(index, len(prompt), request.stop, emit) for index in indexes]
        self._eos_token_ids = frozenset(request.eos_token_ids)
        self._on_progress = on_progress
        self._cancelled = False
        self._error: Exception | None = None

    def cancel(self) -> None:
        """Ends the completion after the next step of llama.cpp, whether the step reads the prompt or generates."""
        self._cancelled = True

    def run(self) -> None:
        """Returns when all samples have finished or the completion is cancelled; raises `EngineFailedError`."""
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
        except Exception as error:  # noqa: BLE001 - llama.cpp would swallow the error; `run` raises it
            self._error = error
            return True
        return self._all_finished()

    def _process(self, chunk: Chunk) -> None:
        if error := chunk.get("error"):
            raise EngineFailedError(f"llama.cpp: {error['message']}")
        if progress := chunk.get("prompt_progress"):
            self._on_progress(progress["total"] - progress["processed"])
            return
        choice = chunk["choices"][0]
        sample = self._samples[choice["index"]]
        if sample.finished:
            return
        if finish_reason := choice["finish_reason"]:
            sample.end(finish_reason, chunk["usage"]["completion_tokens"])
        elif self._has_eos(choice):
            sample.end("stop", chunk["timings"]["predicted_n"])
        else:
            sample.add(choice["text"], chunk["timings"]["predicted_n"])

    def _has_eos(self, choice: dict[str, Any]) -> bool:
        """Returns whether one of the request's `eos_token_ids` is in the piece of text."""
        tokens = (choice["logprobs"] or {}).get("content", ())
        return any(token["id"] in self._eos_token_ids for token in tokens)

    def _all_finished(self) -> bool:
        return all(sample.finished for sample in self._samples)


def _body(request: GenerationRequest, prompt: Sequence[int], indexes: Collection[int]) -> dict[str, Any]:
    """Returns the request to llama.cpp, with each field that is left to llama.cpp."""
    body = {
        "prompt": list(prompt),
        "n": len(indexes),
        "max_tokens": request.max_tokens,
        "temperature": request.temperature if request.temperature > MIN_TEMPERATURE else 0.0,
        "top_k": request.top_k,
        "top_p": request.top_p,
        # By default, llama.cpp would drop unlikely tokens (min_p), and apply top_p before the temperature.
        "min_p": 0.0,
        "samplers": ["penalties", "top_k", "temperature", "top_p"],
        "presence_penalty": request.presence_penalty,
        "frequency_penalty": request.frequency_penalty,
        # The penalties count all tokens so far. By default, llama.cpp would count the last 64.
        "repeat_last_n": len(prompt) + request.max_tokens,
        "stream": True,
        # Sends a chunk after each step that reads the prompt, so that a cancel takes effect after that step.
        "return_progress": True,
        # Adds the number of tokens generated so far to each chunk. A chunk has several tokens if they make up one character.
        "timings_per_token": True,
    }
    if request.eos_token_ids:
        # llama.cpp sends token ids only with probabilities. Probabilities after sampling cost less than those before.
        body |= {"logprobs": 1, "post_sampling_probs": True}
    return body
