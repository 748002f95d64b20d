"""One completion of llama.cpp: some samples of a request that share one reading of the prompt."""

from collections.abc import Callable, Collection, Sequence
from typing import Any, Final

from flywheel_server.engines.base import EngineFailedError, Event
from flywheel_server.engines.llama_cpp.llama import Chunk, Llama
from flywheel_server.engines.samples import GrowingSample
from flywheel_server.messages import GenerationRequest

LOWEST_TEMPERATURE: Final = 1e-6


class Completion:
    """Runs on a thread of its own, where it hands each event to `emit`.

    When a step begins to read the prompt, and after each step that has read some of it, `on_progress` gets the number of tokens
    that are still unread.

    Stop sequences are looked for here rather than by llama.cpp, which sends less than it may: of a token whose text ends like a
    stop sequence begins it holds back all, and loses it where the sample ends with that token.
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
        """Ends the completion with the next step of llama.cpp, whether that reads the prompt or makes text."""
        self._cancelled = True

    def run(self) -> None:
        """Returns when all samples have finished, or the completion was cancelled; raises `EngineFailedError`."""
        self._llama.complete(self._body, self._on_chunk)
        if self._error is not None:
            raise EngineFailedError("the answer of llama.cpp cannot be used") from self._error
        if not self._cancelled and not self._all_finished():
            raise EngineFailedError("llama.cpp ended before the samples did")

    def _on_chunk(self, chunk: Chunk) -> bool:
        if self._cancelled:
            return True
        try:
            self._take(chunk)
        except Exception as error:  # noqa: BLE001 - llama.cpp would swallow it; `run` raises it
            self._error = error
            return True
        return self._all_finished()

    def _take(self, chunk: Chunk) -> None:
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
        elif self._ends(choice):
            sample.end("stop", chunk["timings"]["predicted_n"])
        else:
            sample.add(choice["text"], chunk["timings"]["predicted_n"])

    def _ends(self, choice: dict[str, Any]) -> bool:
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
        # One so low that the logits overflow is greedy in all but name.
        "temperature": request.temperature if request.temperature > LOWEST_TEMPERATURE else 0.0,
        "top_k": request.top_k,
        "top_p": request.top_p,
        # llama.cpp's own defaults would cut off unlikely tokens, and apply top_p before the temperature.
        "min_p": 0.0,
        "samplers": ["penalties", "top_k", "temperature", "top_p"],
        "presence_penalty": request.presence_penalty,
        "frequency_penalty": request.frequency_penalty,
        # All of the text so far counts for the penalties, not the last 64 tokens.
        "repeat_last_n": len(prompt) + request.max_tokens,
        "stream": True,
        # A piece of answer for each step while the prompt is read: a cancel is seen there.
        "return_progress": True,
        # The number of tokens in each piece: characters of several tokens come as one piece.
        "timings_per_token": True,
    }
    if request.eos_token_ids:
        # The ids of the tokens come with their probabilities; those after sampling are the cheaper ones.
        body |= {"logprobs": 1, "post_sampling_probs": True}
    return body
