"""llama.cpp in this process: the little of xllamacpp that the embedded engine needs, with its quirks kept in here.

llama.cpp runs its own server, with continuous batching, on threads of its own. Generations are called in process. Tokens and
properties are to be had only on the HTTP port that it opens on loopback, which a random key locks.
"""

import json
import secrets
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import xllamacpp

Chunk = dict[str, Any]
"""A piece of the answer to a completion, in the shape of OpenAI's API with llama.cpp's additions."""


class Llama:
    """A loaded model. Its methods block, and may be called from several threads.

    Arguments:
        model: A GGUF file. `RuntimeError` where llama.cpp cannot load it.
        context_tokens: Tokens of context that all slots share.
        slots: How many samples are generated at a time.
        threads: Threads that compute.
        batch_tokens: Tokens computed in one step.
        verbosity: How much llama.cpp logs: 1 errors, 2 also warnings, 3 also information, 4 everything.
    """

    def __init__(
        self, model: Path, *, context_tokens: int, slots: int, threads: int, batch_tokens: int, verbosity: int
    ) -> None:
        self._key = secrets.token_urlsafe(32)
        params = xllamacpp.CommonParams()
        params.model.path = str(model)
        params.model_alias = {"model"}
        params.n_ctx = context_tokens
        params.n_parallel = slots
        # One pool of context for all slots: whoever needs much of it can have it while others need little.
        params.kv_unified = True
        params.n_batch = params.n_ubatch = batch_tokens
        for cpu in (params.cpuparams, params.cpuparams_batch):
            cpu.n_threads = threads
            # Polling threads starve each other: with two streams on two cores a tenth of the speed is left.
            cpu.poll = 0
        # Memory stays bounded: by default up to 8 GiB of old prompts are kept besides what the slots hold.
        params.cache_ram_mib = 0
        params.cache_idle_slots = False
        params.fit_params = False
        params.api_keys = [self._key]
        params.ui = False
        params.endpoint_slots = False
        # Without it a silent connection would draw comments into the stream, which the binding does not expect.
        params.sse_ping_interval = -1
        params.verbosity = verbosity
        self._server = xllamacpp.Server(params)
        # Past any proxy of the environment: this never leaves the machine.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def complete(self, body: dict[str, Any], on_chunk: Callable[[Chunk], bool]) -> None:
        """Runs a completion, calling `on_chunk` for each piece of the answer until it returns True or all are done.

        `on_chunk` must not raise: llama.cpp takes that for True.
        """
        self._server.handle_completions(body, on_chunk)

    def tokenize(self, text: str, *, special: bool = True) -> list[int]:
        """Returns the tokens of a text, with those that the model wants at its start; `special` tokens are recognised."""
        tokens: list[int] = self._post("/tokenize", {"content": text, "add_special": True, "parse_special": special})["tokens"]
        return tokens

    def tokenize_chat(self, text: str) -> list[int]:
        """Returns the tokens of a user's message in the model's chat template, or of a text with special tokens as it is."""
        tokens = self.tokenize(text)
        if tokens != self.tokenize(text, special=False):
            return tokens
        return self.tokenize(self._post("/apply-template", {"messages": [{"role": "user", "content": text}]})["prompt"])

    def trained_context(self) -> int:
        """Returns how many tokens of context the model was trained for."""
        return int(self._get("/v1/models")["data"][0]["meta"]["n_ctx_train"])

    def _get(self, path: str, data: bytes | None = None) -> Any:  # noqa: ANN401 - JSON
        request = urllib.request.Request(  # noqa: S310 - the address is llama.cpp's own
            self._server.listening_address + path,
            data=data,
            headers={"Authorization": f"Bearer {self._key}", "Content-Type": "application/json"},
        )
        with self._opener.open(request) as response:
            return json.load(response)

    def _post(self, path: str, body: dict[str, Any]) -> Any:  # noqa: ANN401 - JSON
        return self._get(path, json.dumps(body).encode())
