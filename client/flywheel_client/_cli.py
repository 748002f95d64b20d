"""The subcommands of `flywheel`: their options, and which exit code they end with."""

import asyncio
import functools
import inspect
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Final, get_args

import grpc
import typer
from flywheel_proto import __version__

from flywheel_client import _terminal as terminal
from flywheel_client._errors import DeadlineExceededError, FlywheelError, InvalidArgumentError, UnavailableError
from flywheel_client._health import PROBE_TIMEOUT, answering
from flywheel_client._modal import APP, no_endpoint, published_endpoints
from flywheel_client._records import Endpoint
from flywheel_client._retry import NEVER_SENT, Retry
from flywheel_client._sync import Client
from flywheel_client._waiting import ReadyServer, was_begun

FAILED: Final = 1
INVALID: Final = 2

UNHEALTHY: Final = "backend unhealthy"
"""What gRPC says if a server answers that it is not SERVING."""

NO_CONNECTION: Final = ("connections to all backends failing", *NEVER_SENT)
"""How the message of gRPC begins if it could not connect to a server."""

OTHER_PROTOCOL: Final = "What listens there is no gRPC server, or one that wants TLS (--tls)."
OTHER_NAME: Final = "Its certificate is for another name."
HINTS: Final = {
    "Connection refused": "Nothing listens at that address; if the server has several, gRPC names one of them.",
    "Failed parsing HTTP/2": OTHER_PROTOCOL,
    "Trying to connect an http1.x server": OTHER_PROTOCOL,
    "Socket closed": "What listens there hangs up, as a server does that wants TLS (--tls) or a certificate (--cert).",
    "WRONG_VERSION_NUMBER": "What listens there does not speak TLS, which --tls, --cacert and --cert ask for.",
    "CERTIFICATE_VERIFY_FAILED": "Its certificate is not trusted: --cacert names those that are.",
    "Hostname Verification Check failed": OTHER_NAME,
    "is not in peer certificate": OTHER_NAME,
    "Failed to create security handshaker": "A file of --cacert, --cert or --key cannot be read as what it should be.",
}
"""What it means if such a message has these words."""

MAX_PROMPT_BYTES: Final = 64 * 2**20
"""How much is read from stdin, which may be endless. It is far beyond the longest prompt that a model can read."""

Watch = Callable[[Iterable[Any]], Iterator[Any]]

app = typer.Typer(
    help="Generates text with a Flywheel gRPC server, and asks the server how it is.",
    epilog="Exit codes: 0 success; 1 failure, also to write the output; 2 wrong usage or invalid argument; 130 interrupted; "
    "141 the reader of the output has left.",
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Timeout = Annotated[float, typer.Option(metavar="SECONDS", min=0.001, help="How long the call may take.")]
CaCert = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        exists=True,
        dir_okay=False,
        help="With TLS, trust the certificates in this PEM file.",
        show_default="those of public authorities",
    ),
]
_KEY_VARIABLE: Final = "FLYWHEEL_API_KEY"
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def _key_that_is_not_empty(key: str | None) -> str | None:
    # Whoever sets a key means to send one. Typer takes an empty variable for one that is not set.
    if not (os.environ.get(_KEY_VARIABLE, "unset") if key is None else key).strip():
        raise typer.BadParameter("it is empty, and must hold a key")
    return key


@dataclass(frozen=True, kw_only=True)
class Server:
    """The options of every subcommand that calls a server: which one, and how."""

    address: Annotated[
        str,
        typer.Option("--address", "-a", envvar="FLYWHEEL_ADDRESS", metavar="HOST:PORT", help="The server.", show_envvar=True),
    ] = "localhost:50051"
    modal_app: Annotated[
        str | None, typer.Option(metavar="NAME", help="Call the servers of this app on Modal, instead of an address.")
    ] = None
    modal_environment: Annotated[
        str | None, typer.Option(metavar="NAME", help="Its environment.", show_default="that of the modal command")
    ] = None
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar=_KEY_VARIABLE,
            metavar="KEY",
            callback=_key_that_is_not_empty,
            help="The key that the server asks for. Others on this machine can see options, but not variables.",
            show_envvar=True,
        ),
    ] = field(default=None, repr=False)
    tls: Annotated[
        bool, typer.Option(envvar="FLYWHEEL_TLS", help="Connect with TLS. Servers on Modal always have it.", show_envvar=True)
    ] = False
    cacert: CaCert = None
    cert: Annotated[
        Path | None,
        typer.Option(
            envvar="FLYWHEEL_CERT",
            metavar="FILE",
            exists=True,
            dir_okay=False,
            help="With TLS, show the server the certificate chain in this PEM file.",
            show_envvar=True,
        ),
    ] = None
    key: Annotated[
        Path | None,
        typer.Option(
            envvar="FLYWHEEL_KEY",
            metavar="FILE",
            exists=True,
            dir_okay=False,
            help="The PEM file with the private key of that certificate.",
            show_envvar=True,
        ),
    ] = None
    wait_for_ready: Annotated[
        bool, typer.Option("--wait-for-ready", help="Wait, within --timeout, for a server that cannot be reached yet.")
    ] = False

    def client(self, timeout: float | None, retry: Retry | None = None) -> Client:
        """Returns a client of the server, which tries nothing again unless it is told how."""
        arguments: dict[str, Any] = {
            "timeout": timeout,
            "credentials": self._credentials(),
            "api_key": self.api_key,
            "retry": retry,
            "wait_for_ready": self.wait_for_ready,
        }
        if self.modal_app is None:
            return Client(self.address, **arguments)
        return Client.from_modal(self.modal_app, environment=self.modal_environment, **arguments)

    def _credentials(self) -> grpc.ChannelCredentials | None:
        if (self.cert is None) != (self.key is None):
            raise ValueError("--cert and --key need each other")
        trusted, chain, key = _pem("--cacert", self.cacert), _pem("--cert", self.cert), _pem("--key", self.key)
        if self.modal_app or self.tls or trusted or chain:
            return grpc.ssl_channel_credentials(trusted, key, chain)
        return None

    @property
    def name(self) -> str:
        """How to name the server in a sentence, at its beginning."""
        return f"The server at {self.address}" if self.modal_app is None else f"The server of the Modal app {self.modal_app}"

    def advice(self, error: FlywheelError) -> str:
        """Returns what to look at if a call ended with this error; empty if the error says enough."""
        if isinstance(error, DeadlineExceededError) and not error.reason and error.request_id and not was_begun(error):
            return f"{self.name} has not answered. It may be loading its model, or something on the way drops what is sent."
        if not isinstance(error, UnavailableError) or not error.request_id:
            return ""
        if error.reason == "ENGINE_UNAVAILABLE" or UNHEALTHY in error.message:
            return f"{self.name} answers, but its engine is starting, stopping or out of reach."
        if error.reason or error.code is not grpc.StatusCode.UNAVAILABLE:
            return ""
        if self.modal_app is None:
            hints = (HINTS[words] for words in HINTS if words in error.message and error.message.startswith(NO_CONNECTION))
            return " ".join([*hints, f"Is flywheel-server running at {self.address}?"])
        environment = f" --environment {self.modal_environment}" if self.modal_environment else ""
        return f"To see what is live: flywheel endpoints --app {self.modal_app}{environment}"


def _pem(option: str, path: Path | None) -> bytes | None:
    """Returns what is in the file of an option; gRPC says of what is not PEM only that a connection could not be made."""
    if path is None:
        return None
    read = path.read_bytes()
    if b"-----BEGIN " not in read:
        raise ValueError(f"{option} must be a file in PEM, which {path} is not")
    return read


_VARIABLES: Final = [
    option.envvar for each in fields(Server) for option in get_args(each.type)[1:] if getattr(option, "envvar", None)
]


def _tidy_variables() -> None:
    """Unsets the variables of the options that are empty, and strips the others, for typer to read."""
    for name in _VARIABLES:
        value = os.environ.get(name, "").strip()
        if value:
            os.environ[name] = value
        elif name != _KEY_VARIABLE:
            os.environ.pop(name, None)


def _command(run: Callable[..., None]) -> Callable[..., None]:
    """Makes a subcommand of a function, whose parameter `server` becomes the options of `Server`."""

    @app.command()
    @functools.wraps(run)
    def command(context: typer.Context, **options: Any) -> None:  # noqa: ANN401 - as many kinds as there are options
        with _exit_codes():
            options = {name: _as_utf8(name, value) for name, value in options.items()}
        server = Server(**{each.name: options.pop(each.name) for each in fields(Server)})
        with _exit_codes(server.advice):
            if server.modal_app is None and server.modal_environment is not None:
                raise ValueError("--modal-environment needs --modal-app")
            address = context.get_parameter_source("address")
            if server.modal_app is not None and address is not None and address.name == "COMMANDLINE":
                raise ValueError("give --address or --modal-app, not both")
            run(server=server, **options)

    signature = inspect.signature(run)
    own = [parameter for parameter in signature.parameters.values() if parameter.name != "server"]
    context = inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
    parameters = [context, *own, *inspect.signature(Server).parameters.values()]
    # This is what typer reads.
    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return command


@contextmanager
def _exit_codes(advice: Callable[[FlywheelError], str] = lambda _: "") -> Iterator[None]:
    """Turns what may go wrong in a subcommand into a message and an exit code."""
    try:
        yield
    except FlywheelError as error:
        terminal.show_error(terminal.describe(error, advice(error)))
        raise typer.Exit(INVALID if isinstance(error, InvalidArgumentError) else FAILED) from None
    except (TypeError, ValueError) as error:
        terminal.show_error(str(error))
        raise typer.Exit(INVALID) from None
    except (OSError, ImportError) as error:
        terminal.show_error(str(error))
        raise typer.Exit(FAILED) from None


def _as_utf8(name: str, value: Any) -> Any:  # noqa: ANN401 - any value of an option
    """Returns an option's value; what the encoding of the locale does not have is read as UTF-8."""
    if isinstance(value, list):
        return [_as_utf8(name, each) for each in value]
    if not isinstance(value, str) or not any("\udc80" <= character <= "\udcff" for character in value):
        return value
    try:
        return os.fsencode(value).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8, from byte {error.start} on") from None


def _print_version(wanted: bool) -> None:
    if wanted:
        terminal.show(f"flywheel {__version__}")
        raise typer.Exit


@app.callback()
def _flywheel(
    version: Annotated[  # noqa: ARG001 - its callback has printed it
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    _tidy_variables()


@_command
def generate(
    prompt: Annotated[
        str | None,
        typer.Argument(metavar="PROMPT", help="The text to continue. Without it, or with -, it is read from stdin."),
    ] = None,
    *,
    max_tokens: Annotated[int, typer.Option(metavar="N", help="The most tokens to generate for each sample.")] = 128,
    samples: Annotated[
        int | None, typer.Option("--samples", "-n", metavar="N", help="How many samples to generate.", show_default="1")
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="Where to end a sample; not part of it. Repeatable.")
    ] = None,
    eos_token_id: Annotated[
        list[int] | None, typer.Option(metavar="ID", help="A token that ends a sample. Repeatable.")
    ] = None,
    max_input_tokens: Annotated[
        int | None, typer.Option(metavar="N", help="Read only the last N tokens of a longer prompt.", show_default="all")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(metavar="X", help="How varied the text is; 0 takes the likeliest token.", show_default="1.0")
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(metavar="N", help="Sample from the N likeliest tokens; 0 is all.", show_default="50")
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(metavar="P", help="Sample from the likeliest tokens of total probability P.", show_default="1.0"),
    ] = None,
    presence_penalty: Annotated[
        float | None, typer.Option(metavar="X", help="Make tokens that have occurred rarer: -2 to 2.", show_default="0.0")
    ] = None,
    frequency_penalty: Annotated[
        float | None, typer.Option(metavar="X", help="The same, by how often they have: -2 to 2.", show_default="0.0")
    ] = None,
    timeout: Annotated[
        float | None, typer.Option(metavar="SECONDS", min=0.001, help="How long the call may take.", show_default="no deadline")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print each finished sample as a line of JSON.")] = False,
    server: Server,
) -> None:
    """Continue a prompt, and print the text while it is made.

    Several samples are printed one after another. A summary of each goes to stderr. Stdin is text in UTF-8, of at most 64
    MiB: a byte order mark at its beginning and a newline at its end are not taken as part of the prompt, and lines may end
    as on Windows, with CR and LF. A call that fails before the engine has begun on it is tried again for some seconds, and
    if the server answers that its engine is not ready, for as long as --timeout allows. Exit codes: see flywheel --help.
    """
    options: dict[str, Any] = {
        "text": _text(prompt),
        "max_tokens": max_tokens,
        "num_samples": samples,
        "stop": stop,
        "eos_token_ids": eos_token_id,
        "max_input_tokens": max_input_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
    }
    # Somebody looks at the terminal: what takes longer than that is for them to decide.
    with server.client(timeout, Retry(max_delay=5.0)) as client, server.client(timeout) as observer:
        ready = ReadyServer(observer, server.name, timeout, wait_for_ready=server.wait_for_ready)
        if as_json:
            ready.call(lambda seconds: _print_samples(ready.noting_silence, client, options | {"timeout": seconds}))
        else:
            ready.call(lambda seconds: _print_text(ready.noting_silence, client, options | {"timeout": seconds}, samples or 1))


def _text(prompt: str | None) -> str:
    if prompt is None and sys.stdin.isatty():
        raise ValueError('no prompt: give one, as in flywheel generate "Once upon a time", or pipe it in')
    if prompt in {None, "-"}:
        try:
            # Text tools end what they write with a newline, and some begin it with a byte order mark. Neither is meant as part
            # of the prompt, and nor are the line ends of Windows.
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


def _print_samples(watched: Watch, client: Client, fields: dict[str, Any]) -> None:
    with client.generate(**fields) as samples:
        for sample in watched(samples):
            terminal.show_json(asdict(sample))


def _print_text(watched: Watch, client: Client, fields: dict[str, Any], num_samples: int) -> None:
    writer = terminal.SampleWriter(terminal.Output(sys.stdout), num_samples)
    begun = time.monotonic()
    with client.generate_deltas(**fields) as deltas:
        try:
            for delta in watched(deltas):
                writer.add(delta, time.monotonic() - begun)
        finally:
            deltas.close()
            writer.finish()
    terminal.show_aside(writer.summary())


@_command
def health(
    service: Annotated[str, typer.Option(help="The full name of one service.", show_default="the server as a whole")] = "",
    timeout: Timeout = 10.0,
    as_json: Json = False,
    *,
    server: Server,
) -> None:
    """Say whether the server is SERVING (exit code 0) or not (1)."""
    with server.client(timeout) as client:
        status = client.health(service)
    if as_json:
        terminal.show_json({"status": status})
    else:
        terminal.show(status)
    if status != "SERVING":
        raise typer.Exit(FAILED)


@_command
def stats(timeout: Timeout = 10.0, as_json: Json = False, *, server: Server) -> None:
    """Say how busy the server and its engine are."""
    with server.client(timeout) as client:
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


@_command
def model(timeout: Timeout = 10.0, as_json: Json = False, *, server: Server) -> None:
    """Say what is served, with the limits and defaults."""
    with server.client(timeout) as client:
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


@app.command()
def endpoints(
    app_name: Annotated[str, typer.Option("--app", metavar="NAME", help="The name of the deployed app.")] = APP,
    environment: Annotated[
        str | None, typer.Option(metavar="NAME", help="Its environment.", show_default="that of the modal command")
    ] = None,
    first: Annotated[
        bool,
        typer.Option("--first", help="Print the first address only, as for a script: ADDRESS=$(flywheel endpoints --first)."),
    ] = False,
    cacert: CaCert = None,
    as_json: Json = False,
) -> None:
    """List the live addresses of a deployment on Modal.

    All of them speak TLS. The one of a GatewayServer, which stays the same, is first; then those that were refreshed last. Live
    are those that answer. If none does, all are listed, as the network of this machine may be to blame.
    """
    with _exit_codes():
        app_name, environment = _as_utf8("app", app_name), _as_utf8("environment", environment)
        credentials = grpc.ssl_channel_credentials(_pem("--cacert", cacert))
        live, silent = asyncio.run(_endpoints(app_name, environment, credentials))
        if not live and not silent:
            raise no_endpoint(app_name, environment)
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


async def _endpoints(
    app_name: str, environment: str | None, credentials: grpc.ChannelCredentials
) -> tuple[list[Endpoint], list[Endpoint]]:
    """Returns the published endpoints that answer, and those that do not."""
    found = await published_endpoints(app_name, environment)
    live = await answering([endpoint.address for endpoint in found], credentials)
    return [it for it in found if it.address in live], [it for it in found if it.address not in live]
