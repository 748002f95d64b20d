"""Declares the subcommands of `flywheel`.

`_commands`, `_generate` and `_chat` run the subcommands. They are imported only when a subcommand runs, so that the help does
not import grpc.
"""

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, Final

import click
from click.core import ParameterSource
from flywheel_proto import __version__
from flywheel_proto._extras import loading

from flywheel_client._bench.options import BenchOptions
from flywheel_client._options import (
    CACERT,
    JSON,
    KEY_VARIABLE,
    SECONDS,
    TIMEOUT,
    Command,
    FiniteFloatRange,
    RequestOptions,
    Server,
    options_of,
)
from flywheel_client._records import DEFAULT_APP


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
        elif name != KEY_VARIABLE:
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

    return options_of(Server)(command)


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


SYSTEM: Final = click.option("--system", metavar="TEXT", help="The system message of a conversation that has the prompt.")


@app.command()
@click.argument("prompt", required=False)
@SYSTEM
@click.option("--chat", is_flag=True, help="Keep a conversation: read one message a line, and answer it.")
@options_of(RequestOptions)
@click.option("--timeout", type=SECONDS, metavar="SECONDS", help="How long the call may take.", show_default="no deadline")
@click.option("--json", "as_json", is_flag=True, help="Print each finished sample as a line of JSON.")
@_subcommand
@_calls_server
def generate(
    server: Server,
    prompt: str | None,
    system: str | None,
    timeout: float | None,
    *,
    chat: bool,
    as_json: bool,
    **fields: Any,  # noqa: ANN401 - fields have several types
) -> None:
    """Continue a prompt, and print the text as it is generated.

    PROMPT is the text to continue. Without PROMPT, or if it is -, the prompt is read from stdin: at most 64 MiB in UTF-8. A
    byte order mark at the beginning and a newline at the end are not part of the prompt. Lines may end with CR and LF, as on
    Windows.

    Several samples are printed one after another. A summary of each sample goes to stderr, with the tokens that --logprobs asks
    for. If a call fails before the engine has begun on it, the command retries for some seconds. If the server answers that its
    engine is not ready, the command waits for as long as --timeout allows. Exit codes: see flywheel --help.

    With --chat, PROMPT is the first message, and each line of stdin is another one. On a terminal, Ctrl-C stops an answer and
    keeps the part that came; Ctrl-D or /exit ends the conversation.
    """
    options = RequestOptions(**fields)
    if not chat:
        from flywheel_client import _generate

        _generate.generate(server, prompt, system, options, timeout=timeout, as_json=as_json)
    elif as_json:
        raise ValueError("give --chat or --json, not both")
    else:
        from flywheel_client import _chat

        _chat.chat(server, prompt, system, options, timeout=timeout)


@app.command()
@click.argument("text", required=False)
@SYSTEM
@TIMEOUT
@JSON
@_subcommand
@_calls_server
def tokenize(server: Server, **options: Any) -> None:  # noqa: ANN401 - options have several types
    """Show how many tokens a prompt has, and the tokens.

    TEXT is the prompt. Without TEXT, or if it is -, the prompt is read from stdin, as by flywheel generate.
    """
    from flywheel_client import _commands

    _commands.tokenize(server, **options)


@app.command()
@click.option(
    "--service", default="", metavar="NAME", help="The full name of one service.", show_default="the server as a whole"
)
@TIMEOUT
@JSON
@_subcommand
@_calls_server
def health(server: Server, **options: Any) -> None:  # noqa: ANN401 - options have several types
    """Show whether the server is SERVING (exit code 0) or not (1)."""
    from flywheel_client import _commands

    _commands.health(server, **options)


@app.command()
@TIMEOUT
@JSON
@_subcommand
@_calls_server
def stats(server: Server, **options: Any) -> None:  # noqa: ANN401 - options have several types
    """Show how busy the server and its engine are."""
    from flywheel_client import _commands

    _commands.stats(server, **options)


@app.command()
@TIMEOUT
@JSON
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
@click.option("--first", is_flag=True, help="Print only the first address, for scripts: ADDRESS=$(flywheel endpoints --first).")
@CACERT("cacert", Path | None)
@JSON
@_subcommand
def endpoints(**options: Any) -> None:  # noqa: ANN401 - options have several types
    """List the live addresses of a deployment on Modal.

    All addresses speak TLS. The address of a GatewayServer, which never changes, comes first. The others follow, most recently
    refreshed first. An address is live if it answers. If none answers, all are listed, because the cause may be the network of
    this machine.
    """
    from flywheel_client import _commands

    _commands.endpoints(**options)


@app.command()
@click.argument("addresses", metavar="HOST:PORT...", nargs=-1, required=True, envvar="FLYWHEEL_METRICS_ADDRESS")
@click.option(
    "--interval",
    type=FiniteFloatRange(min=0.1, max=3600),
    metavar="SECONDS",
    default=2.0,
    show_default=True,
    help="The time between two looks at a server.",
)
@click.option("--once", is_flag=True, help="Print what happens in one interval, and exit.")
@JSON
@_subcommand
def top(**options: Any) -> None:  # noqa: ANN401 - options have several types
    """Watch what servers do, live in the terminal.

    HOST:PORT is where a server shows its metrics over HTTP: its setting --metrics-address. Several servers are shown one by one
    and added up. Without HOST:PORT, the variable FLYWHEEL_METRICS_ADDRESS counts.

    Keys: up and down choose a server, left and right a panel; s sorts, p pauses, q quits, ? explains the rest. If the output is
    not a terminal, the command prints what happens in one interval, as with --once. Exit code 1: a server did not answer.
    """
    with loading("flywheel", "cli"):
        from flywheel_client._top import command
    command.top(**options)


@app.command()
@options_of(BenchOptions)
@options_of(RequestOptions)
@_subcommand
@_calls_server
def bench(server: Server, **options: Any) -> None:  # noqa: ANN401 - options have several types
    """Measure a server under load: latencies, tokens per second, and errors.

    The run ends after --duration or --requests, and also after --max-errors. Ctrl-C ends the run early and still reports; the
    exit code is then 130. The exit code is 1 if no call succeeded. With --rate, latencies count from when a call was due to be
    sent, so that slow answers cannot hide.

    The options of requests, such as --max-tokens, are the same as for flywheel generate.
    """
    from flywheel_client._bench import command

    bench_options = BenchOptions(**{each.name: options.pop(each.name) for each in fields(BenchOptions)})
    command.bench(server, bench_options, RequestOptions(**options))
