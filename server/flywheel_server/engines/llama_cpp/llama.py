"""llama.cpp in this process: wraps the part of xllamacpp that the embedded engine needs, and hides its quirks.

llama.cpp runs its own server, with continuous batching, on threads of its own. Completions are called in process. Tokens and
the properties of the model are available only over HTTP. For these, the server listens on a Unix socket in a directory that
only this user may enter. A port on the loopback interface would be open to all users of the machine, who could block the
server's few threads with idle connections.
"""

import json
import secrets
import shutil
import socket
import tempfile
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from http import HTTPStatus
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, Final

from flywheel_server.engines.llama_cpp.memory_bound import bounded_memory
from flywheel_server.engines.llama_cpp.openmp import SpinGuard, adjustable_spins

with adjustable_spins():
    import xllamacpp

Chunk = dict[str, Any]
"""A part of the response to a completion: a chunk of OpenAI's API, with llama.cpp's additions."""

MIN_BATCH_TOKENS: Final = 2
"""Minimum size of a step in tokens. llama.cpp ends the process if the size is 1."""

HTTP_TIMEOUT: Final = 60.0
"""Seconds that llama.cpp may take to answer over HTTP. Tokenizing a MiB of text in one piece takes 6 s of a core."""

MAX_SOCKET_PATH: Final = 100
"""Maximum length of the path of a Unix socket, in bytes. Operating systems allow 104 or 108."""


class RefusedError(ValueError):
    """llama.cpp answered with an error.

    Attributes:
        reason: What llama.cpp says. It may quote a prompt, so it is not part of this error's text, which is logged.
    """

    def __init__(self, path: str, status: int, reason: str) -> None:
        super().__init__(f"llama.cpp answered {path} with {status}")
        self.reason = reason


def step_tokens(batch_tokens: int, slots: int) -> int:
    """Returns the maximum number of tokens that llama.cpp computes in one step."""
    # A step computes a token for each slot that generates. llama.cpp ends the process if a step cannot hold all of them.
    return max(batch_tokens, slots, MIN_BATCH_TOKENS)


class Llama:
    """A loaded model. Its methods block, and may be called from several threads.

    Arguments:
        model: A GGUF file.
        context_tokens: Tokens of context that all slots share.
        slots: How many samples are generated at the same time.
        threads: Threads that compute.
        batch_tokens: Maximum number of tokens computed in one step; one for each slot if there are more slots.
        memory_map: Whether the file is mapped into memory. If not, it is read, which is faster if all of it goes to a GPU.
        http_threads: Texts that are tokenized at the same time. Each thread keeps the memory that its longest text needed.
        uses_chat_template: Whether `render_chat` uses the template in the file, or ChatML if there is none. If not, llama.cpp
            does not read the file's template, which may be unusable.
        verbosity: What llama.cpp logs: 1 errors, 2 also warnings, 3 also information, 4 everything.

    Raises `RuntimeError` if llama.cpp cannot load the model.
    """

    def __init__(
        self,
        model: Path,
        *,
        context_tokens: int,
        slots: int,
        threads: int,
        batch_tokens: int,
        memory_map: bool = True,
        http_threads: int = 1,
        uses_chat_template: bool = True,
        verbosity: int = 1,
    ) -> None:
        params = xllamacpp.CommonParams()
        params.model.path = str(model)
        params.model_alias = {"model"}
        params.n_ctx = context_tokens
        params.n_parallel = slots
        # One pool of context for all slots, so that one slot can use much of it while others use little.
        params.kv_unified = True
        params.n_batch = params.n_ubatch = step_tokens(batch_tokens, slots)
        if not memory_map:
            params.load_mode = xllamacpp.llama_load_mode.LLAMA_LOAD_MODE_NONE
        for cpu in (params.cpuparams, params.cpuparams_batch):
            cpu.n_threads = threads
            # Polling threads starve each other: with polling, two streams on two cores run at a tenth of the speed.
            cpu.poll = 0
        _disable_features(params)
        # llama.cpp logs a warning if its server has no key.
        self._key = secrets.token_urlsafe(32)
        params.api_keys = [self._key]
        self._directory = _private_directory()
        self._socket = str(self._directory / "llama.sock")
        # llama.cpp takes a host name that ends with .sock for the path of a Unix socket.
        params.hostnames = [self._socket]
        params.n_threads_http = http_threads
        params.endpoint_slots = True
        if not uses_chat_template:
            params.chat_template = "chatml"
        # Nothing is saved there, but llama.cpp erases slots only if there is such a path.
        params.slot_save_path = f"{self._directory}/"
        params.verbosity = verbosity
        self._spins = SpinGuard(threads)
        try:
            with bounded_memory(threads + http_threads) if _computes_on_cpu() else nullcontext():
                self._server = xllamacpp.Server(params)
            # The server's loop answers this, so the loop has begun. A server that is unloaded before its loop has begun waits
            # for the loop forever, while it holds the interpreter lock.
            self._request("GET", "/slots")
        except BaseException:
            self._spins.close()
            shutil.rmtree(self._directory, ignore_errors=True)
            raise

    def close(self) -> None:
        """Unloads the model."""
        self._spins.close()
        del self._server
        shutil.rmtree(self._directory, ignore_errors=True)

    def complete(self, body: dict[str, Any], on_chunk: Callable[[Chunk], bool]) -> None:
        """Runs a completion, and calls `on_chunk` with each chunk until that returns True or the completion ends.

        `on_chunk` must not raise: llama.cpp treats an error as True, and swallows it.
        """
        self._server.handle_completions(body, on_chunk)

    def tokenize(self, text: str | Sequence[str | int], *, add_special: bool = False, parse_special: bool = True) -> list[int]:
        """Returns the tokens of a text, or of several texts that are tokenized separately and then joined.

        Arguments:
            text: The text or texts. Among texts, there may be tokens, which stay as they are.
            add_special: Whether to add the tokens with which the model expects a text to begin and end.
            parse_special: Whether special tokens such as `<|im_start|>` are recognized. If not, they are plain text.

        Raises `OSError`, `HTTPException` or `ValueError` if llama.cpp does not answer as it should.
        """
        body = {"content": text, "add_special": add_special, "parse_special": parse_special}
        tokens: list[int] = self._request("POST", "/tokenize", body)["tokens"]
        return tokens

    def render_chat(self, messages: Sequence[tuple[str, str]]) -> str:
        """Returns the messages, each a role and a content, in the model's chat template; raises what `tokenize` does.

        The returned text ends where the model's answer begins. It leaves out the token with which the model expects a text to
        begin (BOS), even if the template writes that token.
        """
        body = {"messages": [{"role": role, "content": content} for role, content in messages]}
        return str(self._request("POST", "/apply-template", body)["prompt"])

    def chat_template(self) -> str:
        """Returns the source of the chat template that `render_chat` uses; raises what `tokenize` does."""
        return str(self._request("GET", "/props")["chat_template"])

    def bos_token(self) -> str:
        """Returns the text of the token with which a text begins, empty if there is none; raises what `tokenize` does."""
        return str(self._request("GET", "/props")["bos_token"])

    def erase_idle_slots(self) -> None:
        """Clears the last prompt of each idle slot; raises what `tokenize` does."""
        for slot in self._request("GET", "/slots"):
            if not slot["is_processing"]:
                self._request("POST", f"/slots/{slot['id']}?action=erase")

    def trained_context(self) -> int:
        """Returns the context that the model was trained for, in tokens; raises what `tokenize` does."""
        return int(self._request("GET", "/v1/models")["data"][0]["meta"]["n_ctx_train"])

    def _request(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:  # noqa: ANN401 - JSON
        with closing(HTTPConnection("localhost")) as connection:
            # By itself, HTTPConnection would connect to a port.
            connection.sock = socket.socket(socket.AF_UNIX)
            connection.sock.settimeout(HTTP_TIMEOUT)
            connection.sock.connect(self._socket)
            headers = {"Authorization": f"Bearer {self._key}", "Content-Type": "application/json"}
            connection.request(method, path, json.dumps(body) if body else None, headers)
            response = connection.getresponse()
            answer = response.read()
        if response.status != HTTPStatus.OK:
            raise RefusedError(path, response.status, _message(answer))
        return json.loads(answer)


def _disable_features(params: xllamacpp.CommonParams) -> None:
    """Disables what llama.cpp does by default, and the engine does not need."""
    # Bounds memory: by default, llama.cpp keeps up to 8 GiB of old prompts besides what the slots hold.
    params.cache_ram_mib = 0
    params.cache_idle_slots = False
    params.fit_params = False
    params.ui = False
    # The binding cannot parse the comments in a stream that is silent for a while.
    params.sse_ping_interval = -1
    # llama.cpp would begin the answer with a last message of the assistant. With some templates it would damage the special
    # token before that message, and with others it would end the model's thoughts there.
    params.prefill_assistant = False


def _message(answer: bytes) -> str:
    """Returns the message of an error response of llama.cpp; empty if it has none."""
    try:
        return str(json.loads(answer)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return ""


def _computes_on_cpu() -> bool:
    """Returns whether there is no GPU. A GPU's driver may allocate far more addresses than there is memory."""
    cpu = xllamacpp.ggml_backend_dev_type.GGML_BACKEND_DEVICE_TYPE_CPU
    return all(device["type"] == cpu for device in xllamacpp.get_device_info())


def _private_directory() -> Path:
    """Makes a directory that only this user may enter, with a path that is short enough for a socket in it."""
    directory = tempfile.mkdtemp(prefix="flywheel-")
    if len(directory.encode()) + len("/llama.sock") > MAX_SOCKET_PATH:
        Path(directory).rmdir()
        directory = tempfile.mkdtemp(prefix="flywheel-", dir="/tmp")
    return Path(directory)
