"""llama.cpp in this process: the little of xllamacpp that the embedded engine needs, with its quirks kept in here.

llama.cpp runs its own server, with continuous batching, on threads of its own. Generations are called in process. Tokens and
properties are to be had only by HTTP. That server listens on a Unix socket in a directory which only this user may enter: a
port on the loopback interface would be open to all users of the machine, and idle connections alone use up its threads.
"""

import json
import secrets
import shutil
import socket
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from http import HTTPStatus
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, Final

from flywheel_server.engines.llama_cpp.memory_bound import bounded_memory
from flywheel_server.engines.llama_cpp.openmp import SpinGuard, adjustable_spins

with adjustable_spins():
    import xllamacpp

Chunk = dict[str, Any]
"""A piece of the answer to a completion, in the shape of OpenAI's API with llama.cpp's additions."""

MIN_BATCH_TOKENS: Final = 2
"""Tokens that a step must have room for. With room for one, llama.cpp ends the process."""

HTTP_TIMEOUT: Final = 60.0
"""Seconds that llama.cpp may take for an answer by HTTP. A MiB of text that cannot be cut takes six seconds of a core."""

MAX_SOCKET_PATH: Final = 100
"""Bytes that the path of a Unix socket may have. Operating systems allow for 104 or 108."""


class RefusedError(ValueError):
    """llama.cpp answers with an error. Its `reason` is not part of the text: it may quote a prompt, and the text is logged."""

    def __init__(self, path: str, status: int, reason: str) -> None:
        super().__init__(f"llama.cpp answered {path} with {status}")
        self.reason = reason


def step_tokens(batch_tokens: int, slots: int) -> int:
    """Returns how many tokens llama.cpp computes in a step, at most."""
    # A step computes a token for each slot that generates. Without room for all of them, llama.cpp ends the process.
    return max(batch_tokens, slots, MIN_BATCH_TOKENS)


class Llama:
    """A loaded model. Its methods block, and may be called from several threads.

    Arguments:
        model: A GGUF file. `RuntimeError` if llama.cpp cannot load it.
        context_tokens: Tokens of context that all slots share.
        slots: How many samples are generated at a time.
        threads: Threads that compute.
        batch_tokens: Tokens computed in one step, or one for each slot if these are more.
        memory_map: Whether the file is mapped into memory. If not, it is read, which takes less time if a GPU gets all of it.
        http_threads: Texts tokenized at a time. Each thread keeps the memory that its longest text took.
        uses_chat_template: Whether `render_chat` uses the template in the file, or ChatML if there is none. If not, the file's
            template is not even read, so that an unusable one does no harm.
        verbosity: How much llama.cpp logs: 1 errors, 2 also warnings, 3 also information, 4 everything.
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
        # One pool of context for all slots: whoever needs much of it can have it while others need little.
        params.kv_unified = True
        params.n_batch = params.n_ubatch = step_tokens(batch_tokens, slots)
        if not memory_map:
            params.load_mode = xllamacpp.llama_load_mode.LLAMA_LOAD_MODE_NONE
        for cpu in (params.cpuparams, params.cpuparams_batch):
            cpu.n_threads = threads
            # Polling threads starve each other: with two streams on two cores a tenth of the speed is left.
            cpu.poll = 0
        # Memory stays bounded: by default up to 8 GiB of old prompts are kept besides what the slots hold.
        params.cache_ram_mib = 0
        params.cache_idle_slots = False
        params.fit_params = False
        # It warns of a server without one.
        self._key = secrets.token_urlsafe(32)
        params.api_keys = [self._key]
        self._directory = _private_directory()
        self._socket = str(self._directory / "llama.sock")
        # A name with this ending is that of a Unix socket.
        params.hostnames = [self._socket]
        params.n_threads_http = http_threads
        params.ui = False
        params.endpoint_slots = True
        if not uses_chat_template:
            params.chat_template = "chatml"
        # Nothing is saved there, but without it slots cannot be erased.
        params.slot_save_path = f"{self._directory}/"
        # Without it a silent connection would draw comments into the stream, which the binding does not expect.
        params.sse_ping_interval = -1
        params.verbosity = verbosity
        self._spins = SpinGuard(threads)
        try:
            with bounded_memory(threads + http_threads) if _computes_on_cpu() else nullcontext():
                self._server = xllamacpp.Server(params)
            # Answered by its loop. A server that is unloaded before its loop has begun waits for that loop for ever, and holds
            # the interpreter meanwhile.
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
        """Runs a completion, calling `on_chunk` for each piece of the answer until it returns True or all are done.

        `on_chunk` must not raise: llama.cpp takes that for True.
        """
        self._server.handle_completions(body, on_chunk)

    def tokenize(self, text: str | Sequence[str], *, add_special: bool = False, parse_special: bool = True) -> list[int]:
        """Return the tokens of a text, or of several that are tokenized each by itself.

        Arguments:
            text: The text or texts.
            add_special: Whether the tokens are added that the model wants where a text begins and ends.
            parse_special: Whether special tokens such as `<|im_start|>` are recognised, rather than plain text.

        Raises `OSError`, `HTTPException` or `ValueError` if llama.cpp does not answer as it should.
        """
        body = {"content": text, "add_special": add_special, "parse_special": parse_special}
        tokens: list[int] = self._request("POST", "/tokenize", body)["tokens"]
        return tokens

    def render_chat(self, messages: Sequence[tuple[str, str]]) -> str:
        """Return the messages, each a role and a content, in the model's chat template; raise what `tokenize` does.

        What the model is to answer follows the returned text. A token that the model wants where a text begins is not part of
        it, even if the template writes that token.
        """
        body = {"messages": [{"role": role, "content": content} for role, content in messages]}
        return str(self._request("POST", "/apply-template", body)["prompt"])

    def chat_template(self) -> str:
        """Return the source of the chat template that `render_chat` uses; raise what `tokenize` does."""
        return str(self._request("GET", "/props")["chat_template"])

    def bos_token(self) -> str:
        """Return the text of the token that begins a text, empty if there is none; raise what `tokenize` does."""
        return str(self._request("GET", "/props")["bos_token"])

    def erase_idle_slots(self) -> None:
        """Makes the slots that nothing runs in forget their last prompts; raises what `tokenize` does."""
        for slot in self._request("GET", "/slots"):
            if not slot["is_processing"]:
                self._request("POST", f"/slots/{slot['id']}?action=erase")

    def trained_context(self) -> int:
        """Returns how many tokens of context the model was trained for; raises what `tokenize` does."""
        return int(self._request("GET", "/v1/models")["data"][0]["meta"]["n_ctx_train"])

    def _request(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:  # noqa: ANN401 - JSON
        connection = _UnixConnection(self._socket)
        try:
            headers = {"Authorization": f"Bearer {self._key}", "Content-Type": "application/json"}
            connection.request(method, path, json.dumps(body) if body else None, headers)
            response = connection.getresponse()
            answer = response.read()
        finally:
            connection.close()
        if response.status != HTTPStatus.OK:
            raise RefusedError(path, response.status, _message(answer))
        return json.loads(answer)


def _message(answer: bytes) -> str:
    """Return what llama.cpp says is wrong."""
    try:
        return str(json.loads(answer)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return ""


class _UnixConnection(HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=HTTP_TIMEOUT)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def _computes_on_cpu() -> bool:
    """Return whether there is no GPU. The driver of one may allocate addresses far beyond the memory that there is."""
    cpu = xllamacpp.ggml_backend_dev_type.GGML_BACKEND_DEVICE_TYPE_CPU
    return all(device["type"] == cpu for device in xllamacpp.get_device_info())


def _private_directory() -> Path:
    """Makes a directory which only this user may enter, at a place where the path of a socket is not too long."""
    directory = tempfile.mkdtemp(prefix="flywheel-")
    if len(directory.encode()) + len("/llama.sock") > MAX_SOCKET_PATH:
        Path(directory).rmdir()
        directory = tempfile.mkdtemp(prefix="flywheel-", dir="/tmp")
    return Path(directory)
