"""Declares the subcommands of `flywheel` and their options.

`_commands` runs the subcommands. It is imported only when a subcommand runs, so that the help does not import grpc.
"""

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Final, get_args, get_origin, get_type_hints

import click
from click.core import ParameterSource
from flywheel_proto import __version__
from flywheel_proto._extras import loading

from flywheel_client._records import DEFAULT_APP

_KEY_VARIABLE: Final = "FLYWHEEL_API_KEY"
_SECONDS: Final = click.FloatRange(min=0.001)
_FILE: Final = click.Path(exists=True, dir_okay=False, path_type=Path)

Command = Callable[..., None]
Decorator = Callable[[Command], Command]


def _option(metavar: str | None, description: str, *flags: str, **settings: Any) -> Callable[[str, Any], Decorator]:  # noqa: ANN401 - as click's
    """Describes an option of a subcommand, in the annotation of a field, which gives the option its name and type.

    Args:
        metavar: How the help names the value; None for an option without one.
        description: What the help says of the option.
        flags: The flags, unless the only one is the name of the field.
        settings: Further arguments of `click.option`.
    """

    def named(name: str, kind: Any) -> Decorator:  # noqa: ANN401 - any type
        value, *_ = get_args(kind) or (kind,)
        return click.option(
            *(flags or [f"--{name.replace('_', '-')}"]),
            name,
            type={Path: _FILE, bool: None}.get(value, value),
            multiple=get_origin(kind) is tuple,
            metavar=metavar,
            help=description,
            **{"show_default": "default" in settings, "show_envvar": True} | settings,
        )

    return named


def _options_of(kind: type) -> Decorator:
    """Returns a decorator that gives a subcommand the options that the fields of a dataclass are annotated with."""
    hints = get_type_hints(kind, include_extras=True).items()
    options = [option(name, hint.__origin__) for name, hint in hints for option in hint.__metadata__]
    return lambda run: functools.reduce(lambda decorated, option: option(decorated), reversed(options), run)


def _key_that_is_not_empty(_context: click.Context, _parameter: click.Parameter, key: str | None) -> str | None:
    # Click ignores an empty variable, but a user who sets a key wants to send a key.
    if not (os.environ.get(_KEY_VARIABLE, "unset") if key is None else key).strip():
        raise click.BadParameter("it is empty, but must be a key")
    return key


_CACERT: Final = _option(
    "FILE", "Use TLS, and trust the certificates in this PEM file.", show_default="certificates of public authorities"
)
_json: Final = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_timeout: Final = click.option(
    "--timeout", type=_SECONDS, metavar="SECONDS", default=10.0, show_default=True, help="How long the call may take."
)


@dataclass(frozen=True, kw_only=True)
class Server:
    """The options of every subcommand that calls a server: which server, and how to connect."""

    address: Annotated[
        str, _option("HOST:PORT", "The server.", "--address", "-a", envvar="FLYWHEEL_ADDRESS", default="localhost:50051")
    ]
    modal_app: Annotated[str | None, _option("NAME", "Call the servers of this app on Modal, instead of an address.")]
    modal_environment: Annotated[
        str | None, _option("NAME", "The Modal environment of the app.", show_default="default of the modal command")
    ]
    api_key: Annotated[
        str | None,
        _option(
            "KEY",
            "The key that the server requires. Other users of this machine can see options, but not variables.",
            envvar=_KEY_VARIABLE,
            callback=_key_that_is_not_empty,
        ),
    ] = field(repr=False)
    tls: Annotated[
        bool,
        _option(
            None, "Connect with TLS. Servers on Modal always have it.", "--tls/--no-tls", envvar="FLYWHEEL_TLS", default=False
        ),
    ]
    cacert: Annotated[Path | None, _CACERT]
    cert: Annotated[
        Path | None,
        _option("FILE", "Use TLS, and show the server the certificate chain in this PEM file.", envvar="FLYWHEEL_CERT"),
    ]
    key: Annotated[
        Path | None, _option("FILE", "The PEM file with the private key of that certificate.", envvar="FLYWHEEL_KEY")
    ]
    wait_for_ready: Annotated[
        bool, _option(None, "Wait, within --timeout, for a server that cannot be reached yet.", is_flag=True)
    ]

    @property
    def name(self) -> str:
        """The name of the server for users, for the beginning of a sentence."""
        return f"The server at {self.address}" if self.modal_app is None else f"The server of the Modal app {self.modal_app}"


@dataclass(frozen=True, kw_only=True)
class RequestOptions:
    """The options of `generate` that are fields of its request, by the names of these fields."""

    max_tokens: Annotated[int, _option("N", "The most tokens to generate for each sample.", default=128)]
    num_samples: Annotated[int | None, _option("N", "How many samples to generate.", "--samples", "-n", show_default="1")]
    stop: Annotated[tuple[str, ...], _option("TEXT", "Where to end a sample; not part of it. Repeatable.")]
    eos_token_ids: Annotated[tuple[int, ...], _option("ID", "A token that ends a sample. Repeatable.", "--eos-token-id")]
    max_input_tokens: Annotated[int | None, _option("N", "Read only the last N tokens of a longer prompt.", show_default="all")]
    temperature: Annotated[
        float | None, _option("X", "How varied the text is; 0 takes the likeliest token.", show_default="1.0")
    ]
    top_k: Annotated[int | None, _option("N", "Sample from the N likeliest tokens; 0 is all.", show_default="50")]
    top_p: Annotated[float | None, _option("P", "Sample from the likeliest tokens of total probability P.", show_default="1.0")]
    presence_penalty: Annotated[
        float | None, _option("X", "Make tokens that have occurred rarer: -2 to 2.", show_default="0.0")
    ]
    frequency_penalty: Annotated[float | None, _option("X", "The same, by how often they have: -2 to 2.", show_default="0.0")]


@click.group(
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 success; 1 failure, also to write the output; 2 wrong usage or invalid argument; 130 interrupted; "
    "141 the reader of the output has left.",
)
@click.version_option(__version__, message="flywheel %(version)s", help="Print the version and exit.")
def app() -> None:
    """Generates text with a Flywheel gRPC server, and shows the state of the server."""
    _tidy_variables()


def _tidy_variables() -> None:
    """Strips the environment variables of options, and unsets empty ones, before click reads them."""
    for name in {str(option.envvar) for command in app.commands.values() for option in command.params if option.envvar}:
        value = os.environ.get(name, "").strip()
        if value:
            os.environ[name] = value
        elif name != _KEY_VARIABLE:
            os.environ.pop(name, None)


@contextmanager
def _exit_codes(server: Server | None = None) -> Iterator[None]:
    """Imports `_commands`; turns errors into a message and an exit code."""
    with loading("flywheel"):
        from flywheel_client._commands import exit_codes
    with exit_codes(server):
        yield


def _subcommand(run: Command) -> Command:
    """Makes a subcommand end with the exit codes of the command, and passes it its options as UTF-8."""

    @functools.wraps(run)
    def command(**options: Any) -> None:  # noqa: ANN401 - options have several types
        with _exit_codes():
            run(**{name: _as_utf8(name, value) for name, value in options.items()})

    return command


def _calls_server(run: Command) -> Command:
    """Adds the options of `Server` to a subcommand, and passes them as its argument `server`."""

    @functools.wraps(run)
    @click.pass_context
    def command(context: click.Context, /, **options: Any) -> None:  # noqa: ANN401 - options have several types
        server = Server(**{each.name: options.pop(each.name) for each in fields(Server)})
        with _exit_codes(server):
            if server.modal_app is None and server.modal_environment is not None:
                raise ValueError("--modal-environment needs --modal-app")
            if server.modal_app is not None and context.get_parameter_source("address") is ParameterSource.COMMANDLINE:
                raise ValueError("give --address or --modal-app, not both")
            run(server=server, **options)

    return _options_of(Server)(command)


def _as_utf8(name: str, value: Any) -> Any:  # noqa: ANN401 - any value of an option
    """Returns an option's value. Reads bytes as UTF-8 that the encoding of the locale could not decode."""
    if isinstance(value, tuple):
        return tuple(_as_utf8(name, each) for each in value)
    if not isinstance(value, str) or not any("\udc80" <= character <= "\udcff" for character in value):
        return value
    try:
        return os.fsencode(value).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8, from byte {error.start} on") from None


@app.command()
@click.argument("prompt", required=False)
@_options_of(RequestOptions)
@click.option("--timeout", type=_SECONDS, metavar="SECONDS", help="How long the call may take.", show_default="no deadline")
@click.option("--json", "as_json", is_flag=True, help="Print each finished sample as a line of JSON.")
@_subcommand
@_calls_server
def generate(server: Server, prompt: str | None, timeout: float | None, *, as_json: bool, **fields: Any) -> None:  # noqa: ANN401 - fields have several types
    """Continue a prompt, and print the text as it is generated.

    PROMPT is the text to continue. Without PROMPT, or if it is -, the prompt is read from stdin: at most 64 MiB in UTF-8. A
    byte order mark at the beginning and a newline at the end are not part of the prompt. Lines may end with CR and LF, as on
    Windows.

    Several samples are printed one after another. A summary of each sample goes to stderr. If a call fails before the engine
    has begun on it, the command retries for some seconds. If the server answers that its engine is not ready, the command
    waits for as long as --timeout allows. Exit codes: see flywheel --help.
    """
    from flywheel_client import _commands

    _commands.generate(server, prompt, RequestOptions(**fields), timeout=timeout, as_json=as_json)


@app.command()
@click.option(
    "--service", default="", metavar="NAME", help="The full name of one service.", show_default="the server as a whole"
)
@_timeout
@_json
@_subcommand
@_calls_server
def health(server: Server, **options: Any) -> None:  # noqa: ANN401 - options have several types
    """Show whether the server is SERVING (exit code 0) or not (1)."""
    from flywheel_client import _commands

    _commands.health(server, **options)


@app.command()
@_timeout
@_json
@_subcommand
@_calls_server
def stats(server: Server, **options: Any) -> None:  # noqa: ANN401 - options have several types
    """Show how busy the server and its engine are."""
    from flywheel_client import _commands

    _commands.stats(server, **options)


@app.command()
@_timeout
@_json
@_subcommand
@_calls_server
def model(server: Server, **options: Any) -> None:  # noqa: ANN401 - options have several types
    """Show the model and its engine, with the limits and defaults."""
    from flywheel_client import _commands

    _commands.model(server, **options)


@app.command()
@click.option("--app", metavar="NAME", default=DEFAULT_APP, help="The name of the deployed app.", show_default=True)
@click.option(
    "--environment", metavar="NAME", help="The Modal environment of the app.", show_default="default of the modal command"
)
@_CACERT("cacert", Path | None)
@_json
@_subcommand
def endpoints(**options: Any) -> None:  # noqa: ANN401 - options have several types
    """List the live addresses of a deployment on Modal.

    All addresses speak TLS. The address of a GatewayServer, which never changes, comes first. The others follow, most recently
    refreshed first. An address is live if it answers. If none answers, all are listed, because the cause may be the network of
    this machine.
    """
    from flywheel_client import _commands

    _commands.endpoints(**options)
