"""Runs the subcommands of `flywheel`, and turns errors into exit codes."""

import asyncio
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import grpc
from click.exceptions import Exit
from flywheel_proto._interrupts import EXIT_INTERRUPTED, raise_on_interrupt

from flywheel_client import _terminal as terminal
from flywheel_client._client_sync import Client
from flywheel_client._errors import DeadlineExceededError, FlywheelError, InvalidArgumentError, UnavailableError
from flywheel_client._health import PROBE_TIMEOUT, answering
from flywheel_client._modal import no_endpoint, published_endpoints
from flywheel_client._records import Endpoint
from flywheel_client._retry import NO_CONNECTION_MESSAGES, Retry
from flywheel_client._waiting import ReadyServer, was_begun

if TYPE_CHECKING:
    from flywheel_client._options import RequestOptions, Server

EXIT_FAILURE: Final = 1
EXIT_USAGE: Final = 2

NOT_SERVING_MESSAGE: Final = "backend unhealthy"
"""gRPC's message if a server answers that it is not SERVING."""

UNREACHABLE_MESSAGES: Final = ("connections to all backends failing", *NO_CONNECTION_MESSAGES)
"""How gRPC's message begins if gRPC could not connect to a server."""

NOT_GRPC_HINT: Final = "What listens there is not a gRPC server, or it requires TLS (--tls)."
WRONG_NAME_HINT: Final = "Its certificate is for another name."
HINTS: Final = {
    "Connection refused": "Nothing listens at that address; if the server has several, gRPC names one of them.",
    "Failed parsing HTTP/2": NOT_GRPC_HINT,
    "Trying to connect an http1.x server": NOT_GRPC_HINT,
    "Socket closed": "What listens there hangs up, as a server does if it requires TLS (--tls) or a certificate (--cert).",
    "WRONG_VERSION_NUMBER": "What listens there does not speak TLS, which --tls, --cacert and --cert ask for.",
    "CERTIFICATE_VERIFY_FAILED": "Its certificate is not trusted: --cacert sets the certificates to trust.",
    "Hostname Verification Check failed": WRONG_NAME_HINT,
    "is not in peer certificate": WRONG_NAME_HINT,
    "Failed to create security handshaker": "A file of --cacert, --cert or --key has no valid content.",
}
"""Hints for users, by words in such a message."""

MAX_PROMPT_BYTES: Final = 64 * 2**20
"""The longest prompt that is read from stdin, which may be endless. No model can read such a long prompt."""

ResultWrapper = Callable[[Iterable[Any]], Iterator[Any]]


@contextmanager
def exit_codes(server: "Server | None" = None) -> Iterator[None]:
    """Turns errors and interrupts of a subcommand into a message and an exit code.

    Args:
        server: The server that the subcommand calls, for advice on its errors.
    """
    before = signal.getsignal(signal.SIGINT)
    try:
        raise_on_interrupt()
        yield
    except FlywheelError as error:
        terminal.show_error(terminal.describe(error, _advice(error, server) if server else ""))
        raise Exit(EXIT_USAGE if isinstance(error, InvalidArgumentError) else EXIT_FAILURE) from None
    except (TypeError, ValueError) as error:
        terminal.show_error(str(error))
        raise Exit(EXIT_USAGE) from None
    except (OSError, ImportError) as error:
        terminal.show_error(str(error))
        raise Exit(EXIT_FAILURE) from None
    except KeyboardInterrupt:
        # Click itself would print "Aborted!" and exit with 1.
        raise Exit(EXIT_INTERRUPTED) from None
    finally:
        signal.signal(signal.SIGINT, before)


def generate(server: "Server", prompt: str | None, options: "RequestOptions", *, timeout: float | None, as_json: bool) -> None:
    """Prints the samples of a prompt."""
    fields = {"text": _text(prompt), **asdict(options)}
    # A user watches the terminal, and can decide about longer delays.
    with _client(server, timeout, Retry(max_delay=5.0)) as client, _client(server, timeout) as observer:
        ready = ReadyServer(observer, server.name, timeout, wait_for_ready=server.wait_for_ready)
        show = _print_samples if as_json else _print_text
        ready.call(lambda seconds: show(ready.noting_silence, client, fields | {"timeout": seconds}))


def health(server: "Server", service: str, *, timeout: float, as_json: bool) -> None:
    """Prints whether the server is SERVING, and exits with 1 if not."""
    with _client(server, timeout) as client:
        status = client.health(service)
    if as_json:
        terminal.show_json({"status": status})
    else:
        terminal.show(status)
    if status != "SERVING":
        raise Exit(EXIT_FAILURE)


def stats(server: "Server", *, timeout: float, as_json: bool) -> None:
    """Prints how busy the server and its engine are."""
    with _client(server, timeout) as client:
        found = client.stats()
    if as_json:
        terminal.show_json(asdict(found))
    else:
        terminal.show_table(
            [
                ("active calls", found.active),
                ("queued calls", found.queued),
                ("backlog of the engine", found.backlog),
                ("runners of the engine", found.num_total_runners),
            ]
        )


def model(server: "Server", *, timeout: float, as_json: bool) -> None:
    """Prints the model and its engine, with the limits and defaults."""
    with _client(server, timeout) as client:
        found = client.model()
    if as_json:
        terminal.show_json(asdict(found))
    else:
        terminal.show_table(
            [
                ("name", found.name),
                ("engine", found.engine),
                ("context_tokens", found.context_tokens),
                ("penalizes_prompt", "yes" if found.penalizes_prompt else "no"),
                ("prompt_format", found.prompt_format),
                *((f"limits.{name}", value) for name, value in asdict(found.limits).items()),
                *((f"defaults.{name}", f"{value:g}") for name, value in asdict(found.defaults).items()),
            ]
        )


def endpoints(app: str, environment: str | None, cacert: Path | None, *, first: bool, as_json: bool) -> None:
    """Prints the live addresses of a deployment on Modal, or all of them if none answers."""
    credentials = grpc.ssl_channel_credentials(_pem("--cacert", cacert))
    live, silent = asyncio.run(_endpoints(app, environment, credentials))
    if not live and not silent:
        raise no_endpoint(app, environment)
    shown = (live or silent)[: 1 if first else None]
    if as_json:
        terminal.show_json([asdict(endpoint) for endpoint in shown])
    elif first:
        terminal.show(shown[0].address)
    else:
        terminal.show_endpoints(shown, time.time())
    if silent and not (first and live):
        which = "any of these" if not live else ", ".join(endpoint.address for endpoint in silent)
        terminal.show_aside([f"no answer within {PROBE_TIMEOUT:g} s from {which}"])


def _client(server: "Server", timeout: float | None, retry: Retry | None = None) -> Client:
    """Returns a client of the server, without retries by default."""
    arguments: dict[str, Any] = {
        "timeout": timeout,
        "credentials": _credentials(server),
        "api_key": server.api_key,
        "retry": retry,
        "wait_for_ready": server.wait_for_ready,
    }
    if server.modal_app is None:
        return Client(server.address, **arguments)
    return Client.from_modal(server.modal_app, environment=server.modal_environment, **arguments)


def _credentials(server: "Server") -> grpc.ChannelCredentials | None:
    if (server.cert is None) != (server.key is None):
        raise ValueError("--cert and --key need each other")
    trusted, chain, key = _pem("--cacert", server.cacert), _pem("--cert", server.cert), _pem("--key", server.key)
    if server.modal_app or server.tls or trusted or chain:
        return grpc.ssl_channel_credentials(trusted, key, chain)
    return None


def _pem(option: str, path: Path | None) -> bytes | None:
    """Returns the content of a PEM file. For other files, gRPC would only say that it could not connect."""
    if path is None:
        return None
    content = path.read_bytes()
    if b"-----BEGIN " not in content:
        raise ValueError(f"{option} must be a file in PEM, which {path} is not")
    return content


def _advice(error: FlywheelError, server: "Server") -> str:
    """Returns advice for the user about an error of a call; empty if the error itself says enough."""
    if isinstance(error, DeadlineExceededError) and not error.reason and error.request_id and not was_begun(error):
        return f"{server.name} has not answered. It may be loading its model, or something on the way drops its packets."
    # Without a request id, the error is not about a call, but about the directory, or a probe that found no connection.
    if not isinstance(error, UnavailableError) or not (error.request_id or error.message.startswith(UNREACHABLE_MESSAGES)):
        return ""
    if error.reason == "ENGINE_UNAVAILABLE" or NOT_SERVING_MESSAGE in error.message:
        return f"{server.name} answers, but its engine is starting, stopping or cannot be reached."
    if error.reason or error.code is not grpc.StatusCode.UNAVAILABLE:
        return ""
    if server.modal_app is None:
        hints = (HINTS[words] for words in HINTS if words in error.message and error.message.startswith(UNREACHABLE_MESSAGES))
        return " ".join([*hints, f"Is flywheel-server running at {server.address}?"])
    environment = f" --environment {server.modal_environment}" if server.modal_environment else ""
    return f"To see what is live: flywheel endpoints --app {server.modal_app}{environment}"


def _text(prompt: str | None) -> str:
    if prompt is None and sys.stdin.isatty():
        raise ValueError('no prompt: give one, as in flywheel generate "Once upon a time", or pipe it in')
    if prompt in {None, "-"}:
        try:
            # Text tools write a newline at the end, some write a byte order mark at the beginning, and Windows ends lines with
            # CR and LF. These are not part of the prompt.
            prompt = _stdin().decode().removeprefix("\ufeff").replace("\r\n", "\n").removesuffix("\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"the prompt on stdin is not UTF-8: {error}") from None
    if not prompt:
        raise ValueError("the prompt is empty")
    return prompt


def _stdin() -> bytes:
    read = sys.stdin.buffer.read(MAX_PROMPT_BYTES + 1)
    if len(read) > MAX_PROMPT_BYTES:
        raise ValueError(f"the prompt on stdin is longer than {MAX_PROMPT_BYTES // 2**20} MiB")
    return read


def _print_samples(watched: ResultWrapper, client: Client, fields: dict[str, Any]) -> None:
    with client.generate(**fields) as samples:
        for sample in watched(samples):
            terminal.show_json(asdict(sample))


def _print_text(watched: ResultWrapper, client: Client, fields: dict[str, Any]) -> None:
    writer = terminal.SampleWriter(terminal.Output(sys.stdout), fields["num_samples"] or 1)
    begun = time.monotonic()
    with client.generate_deltas(**fields) as deltas:
        try:
            for delta in watched(deltas):
                writer.add(delta, time.monotonic() - begun)
        finally:
            deltas.close()
            writer.finish()
    terminal.show_aside(writer.summary())


async def _endpoints(
    app_name: str, environment: str | None, credentials: grpc.ChannelCredentials
) -> tuple[list[Endpoint], list[Endpoint]]:
    """Returns the published endpoints that answer, and the endpoints that do not."""
    found = await published_endpoints(app_name, environment)
    live = await answering([endpoint.address for endpoint in found], credentials)
    return [it for it in found if it.address in live], [it for it in found if it.address not in live]
