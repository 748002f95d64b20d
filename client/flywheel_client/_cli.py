"""The subcommands of `flywheel`: their options, and which exit code they end with."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Annotated, Any, Final

import typer
from flywheel_proto import __version__

from flywheel_client import _terminal as terminal
from flywheel_client._errors import FlywheelError, InvalidArgumentError
from flywheel_client._sync import Client

FAILED: Final = 1
INVALID: Final = 2
INTERRUPTED: Final = 130
BROKEN_PIPE: Final = 141

app = typer.Typer(
    help="Generates text with a Flywheel gRPC server, and asks the server how it is.",
    epilog="Exit codes: 0 success; 1 failure; 2 wrong usage or invalid argument; 130 interrupted.",
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Address = Annotated[
    str, typer.Option("--address", "-a", envvar="FLYWHEEL_ADDRESS", metavar="HOST:PORT", help="The server.", show_envvar=True)
]
Timeout = Annotated[float, typer.Option(metavar="SECONDS", min=0.001, help="How long the call may take.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]

DEFAULT_ADDRESS: Final = "localhost:50051"


@contextmanager
def _exit_codes(address: str) -> Iterator[None]:
    """Turns what may go wrong in a subcommand into a message and an exit code."""
    try:
        yield
        sys.stdout.flush()
    except FlywheelError as error:
        terminal.show_error(terminal.describe(error, address))
        raise typer.Exit(INVALID if isinstance(error, InvalidArgumentError) else FAILED) from None
    except (TypeError, ValueError) as error:
        terminal.show_error(str(error))
        raise typer.Exit(INVALID) from None
    except BrokenPipeError:
        # Whoever read the output, such as head, has seen enough. The code is that of a program which SIGPIPE ended.
        terminal.discard_output()
        raise typer.Exit(BROKEN_PIPE) from None
    except OSError as error:
        terminal.show_error(str(error))
        raise typer.Exit(FAILED) from None
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None


def _print_version(wanted: bool) -> None:
    if wanted:
        terminal.show(f"flywheel {__version__}")
        raise typer.Exit


@app.callback()
def _flywheel(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
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
    address: Address = DEFAULT_ADDRESS,
    as_json: Annotated[bool, typer.Option("--json", help="Print each finished sample as a line of JSON.")] = False,
) -> None:
    """Continue a prompt, and print the text while it is made.

    Several samples are printed one after another. A summary of each goes to stderr. A newline at the end of stdin is not
    taken as part of the prompt. Exit codes: see flywheel --help.
    """
    with _exit_codes(address):
        fields: dict[str, Any] = {
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
        with Client(address, timeout=timeout) as client:
            if as_json:
                _print_samples(client, fields)
            else:
                _print_text(client, fields, samples or 1)


def _text(prompt: str | None) -> str:
    if prompt is None and sys.stdin.isatty():
        raise ValueError('no prompt: give one, as in flywheel generate "Once upon a time", or pipe it in')
    if prompt in {None, "-"}:
        try:
            # Text tools end what they write with a newline, which is not meant as part of the prompt.
            prompt = sys.stdin.buffer.read().decode().removesuffix("\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"the prompt on stdin is not UTF-8: {error}") from None
    if not prompt:
        raise ValueError("the prompt is empty")
    return prompt


def _print_samples(client: Client, fields: dict[str, Any]) -> None:
    with client.generate(**fields) as samples:
        for sample in samples:
            terminal.show_json(asdict(sample))


def _print_text(client: Client, fields: dict[str, Any], num_samples: int) -> None:
    # Where the locale's encoding has no such character, a question mark must do.
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    writer = terminal.SampleWriter(terminal.Output(sys.stdout), num_samples)
    begun = time.monotonic()
    with client.generate_deltas(**fields) as deltas:
        try:
            for delta in deltas:
                writer.add(delta, time.monotonic() - begun)
        finally:
            deltas.close()
            writer.finish()
    terminal.show_aside(writer.summary())


@app.command()
def health(
    service: Annotated[str, typer.Option(help="The full name of one service.", show_default="the server as a whole")] = "",
    timeout: Timeout = 10.0,
    address: Address = DEFAULT_ADDRESS,
    as_json: Json = False,
) -> None:
    """Say whether the server is SERVING (exit code 0) or not (1)."""
    with _exit_codes(address), Client(address, timeout=timeout) as client:
        status = client.health(service)
        if as_json:
            terminal.show_json({"status": status})
        else:
            terminal.show(status)
    if status != "SERVING":
        raise typer.Exit(FAILED)


@app.command()
def stats(timeout: Timeout = 10.0, address: Address = DEFAULT_ADDRESS, as_json: Json = False) -> None:
    """Say how busy the server and its engine are."""
    with _exit_codes(address), Client(address, timeout=timeout) as client:
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


@app.command()
def model(timeout: Timeout = 10.0, address: Address = DEFAULT_ADDRESS, as_json: Json = False) -> None:
    """Say what is served, with the limits and defaults."""
    with _exit_codes(address), Client(address, timeout=timeout) as client:
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
