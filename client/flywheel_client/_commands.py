"""Runs the subcommands of `flywheel`, and turns errors into exit codes."""

import asyncio
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Final

import grpc
from click.exceptions import Exit
from flywheel_proto._interrupts import EXIT_INTERRUPTED, raise_on_interrupt

from flywheel_client import _terminal as terminal
from flywheel_client._connecting import client_of, pem
from flywheel_client._errors import DeadlineExceededError, FlywheelError, InvalidArgumentError, UnavailableError
from flywheel_client._health import PROBE_TIMEOUT, answering
from flywheel_client._modal import no_endpoint, published_endpoints
from flywheel_client._prompt import prompt_fields, read_prompt
from flywheel_client._records import Endpoint
from flywheel_client._retry import NO_CONNECTION_MESSAGES
from flywheel_client._token_table import quoted, token_json
from flywheel_client._waiting import was_begun

if TYPE_CHECKING:
    from flywheel_client._options import Server

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
        terminal.show_error(terminal.describe(error, advice(error, server) if server else ""))
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


def health(server: "Server", service: str, *, timeout: float, as_json: bool) -> None:
    """Prints whether the server is SERVING, and exits with 1 if not."""
    with client_of(server, timeout) as client:
        status = client.health(service)
    if as_json:
        terminal.show_json({"status": status})
    else:
        terminal.show(status)
    if status != "SERVING":
        raise Exit(EXIT_FAILURE)


def stats(server: "Server", *, timeout: float, as_json: bool) -> None:
    """Prints how busy the server and its engine are."""
    with client_of(server, timeout) as client:
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


def tokenize(server: "Server", text: str | None, system: str | None, *, timeout: float, as_json: bool) -> None:
    """Prints the number of tokens of a prompt, and its tokens."""
    prompt = prompt_fields(read_prompt(text, "tokenize"), system)
    with client_of(server, timeout) as client:
        found = client.tokenize(**prompt)
    if as_json:
        terminal.show_json({"prompt_tokens": found.prompt_tokens, "tokens": list(map(token_json, found.tokens))})
        return
    terminal.show(f"{found.prompt_tokens} tokens")
    width = max((len(str(token.id)) for token in found.tokens), default=0)
    for token in found.tokens:
        terminal.show(f"{token.id:{width}}  {quoted(token.text)}")


def model(server: "Server", *, timeout: float, as_json: bool) -> None:
    """Prints the model and its engine, with the limits and defaults."""
    with client_of(server, timeout) as client:
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
                ("supported_fields", ", ".join(found.supported_fields) or "unknown: the server is older than this list"),
                ("exact_seeds", "yes" if found.exact_seeds else "no"),
                # A server that is older than a limit or default leaves it at 0.
                *((f"limits.{name}", value) for name, value in asdict(found.limits).items() if value),
                *((f"defaults.{name}", f"{value:g}") for name, value in asdict(found.defaults).items() if value),
            ]
        )


def endpoints(app: str, environment: str | None, cacert: Path | None, *, first: bool, as_json: bool) -> None:
    """Prints the live addresses of a deployment on Modal, or all of them if none answers."""
    credentials = grpc.ssl_channel_credentials(pem("--cacert", cacert))
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


def advice(error: FlywheelError, server: "Server") -> str:
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
        # A message of gRPC may have several words with the same hint.
        return " ".join([*dict.fromkeys(hints), f"Is flywheel-server running at {server.address}?"])
    environment = f" --environment {server.modal_environment}" if server.modal_environment else ""
    return f"To see what is live: flywheel endpoints --app {server.modal_app}{environment}"


async def _endpoints(
    app_name: str, environment: str | None, credentials: grpc.ChannelCredentials
) -> tuple[list[Endpoint], list[Endpoint]]:
    """Returns the published endpoints that answer, and the endpoints that do not."""
    found = await published_endpoints(app_name, environment)
    live = await answering([endpoint.address for endpoint in found], credentials)
    return [it for it in found if it.address in live], [it for it in found if it.address not in live]
