"""The options of the subcommands of `flywheel`: a field of a dataclass is an option."""

import functools
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final, get_args, get_origin, get_type_hints

import click

KEY_VARIABLE: Final = "FLYWHEEL_API_KEY"

Command = Callable[..., None]
Decorator = Callable[[Command], Command]


class FiniteFloat(click.types.FloatParamType):
    """A finite number. Click's own types also accept NaN, which no range excludes, and infinity."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:  # noqa: ANN401 - as click's
        """Returns the number; fails, with an error that names the option, for other values."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{number} is not a finite number.", param, ctx)
        return number


class FiniteFloatRange(click.FloatRange, FiniteFloat):
    """A finite number within a range."""


class Seconds(click.FloatRange):
    """Seconds that something may take; infinity is no limit."""

    def __init__(self) -> None:
        super().__init__(min=0.001)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:  # noqa: ANN401 - as click's
        """Returns the seconds; fails, with an error that names the option, for other values."""
        seconds = super().convert(value, param, ctx)
        if math.isnan(seconds):
            self.fail(f"{seconds} is not a number of seconds.", param, ctx)
        return seconds


SECONDS: Final = Seconds()
_FILE: Final = click.Path(exists=True, dir_okay=False, path_type=Path)
_TYPES: Final[Mapping[type, Any]] = {Path: _FILE, float: FiniteFloat(), bool: None}
"""The types of options, for kinds of fields that click would take for another type."""


def option(metavar: str | None, description: str, *flags: str, **settings: Any) -> Callable[[str, Any], Decorator]:  # noqa: ANN401 - as click's
    """Describes an option of a subcommand, in the annotation of a field, which gives the option its name and type.

    Args:
        metavar: How the help names the value; None for an option without one.
        description: What the help says of the option.
        flags: The flags, unless the only one is the name of the field.
        settings: Further arguments of `click.option`.
    """

    def named(name: str, kind: Any) -> Decorator:  # noqa: ANN401 - any type
        value, *_ = get_args(kind) or (kind,)
        defaults: dict[str, Any] = {
            "type": _TYPES.get(value, value),
            "multiple": get_origin(kind) is tuple,
            "show_default": "default" in settings,
            "show_envvar": True,
        }
        flag = f"--{name.replace('_', '-')}"
        return click.option(*(flags or [flag]), name, metavar=metavar, help=description, **defaults | settings)

    return named


def options_of(kind: type) -> Decorator:
    """Returns a decorator that gives a subcommand the options that the fields of a dataclass are annotated with."""
    hints = get_type_hints(kind, include_extras=True).items()
    decorators = [decorator_for(name, hint.__origin__) for name, hint in hints for decorator_for in hint.__metadata__]
    return lambda run: functools.reduce(lambda decorated, decorator: decorator(decorated), reversed(decorators), run)


def option_for(field_name: str) -> str:
    """Returns the option of `generate` that sets a field of its request."""
    return {"messages": "--system or --chat", "choices": "--choice"}.get(field_name, f"--{field_name.replace('_', '-')}")


def _key_that_is_not_empty(_context: click.Context, _parameter: click.Parameter, key: str | None) -> str | None:
    # Click ignores an empty variable, but a user who sets a key wants to send a key.
    if not (os.environ.get(KEY_VARIABLE, "unset") if key is None else key).strip():
        raise click.BadParameter("it is empty, but must be a key")
    return key


def _biases(_context: click.Context, _parameter: click.Parameter, values: Iterable[str]) -> dict[int, float] | None:
    """Returns the biases by the ids of tokens, from values such as `42=-100`."""
    biases: dict[int, float] = {}
    for value in values:
        token_id, _, bias = value.partition("=")
        try:
            if int(token_id) in biases:
                raise click.BadParameter(f"the id {int(token_id)} has two biases")
            biases[int(token_id)] = float(bias)
        except ValueError:
            raise click.BadParameter(f"{value!r} is not the id of a token and a bias, such as 42=-100") from None
        if not math.isfinite(biases[int(token_id)]):
            raise click.BadParameter(f"the bias in {value!r} is not a finite number")
    return biases or None


CACERT: Final = option(
    "FILE", "Use TLS, and trust the certificates in this PEM file.", show_default="certificates of public authorities"
)
JSON: Final = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
TIMEOUT: Final = click.option(
    "--timeout", type=SECONDS, metavar="SECONDS", default=10.0, show_default=True, help="How long the call may take."
)


@dataclass(frozen=True, kw_only=True)
class Server:
    """The options of every subcommand that calls a server: which server, and how to connect."""

    address: Annotated[
        str, option("HOST:PORT", "The server.", "--address", "-a", envvar="FLYWHEEL_ADDRESS", default="localhost:50051")
    ]
    modal_app: Annotated[str | None, option("NAME", "Call the servers of this app on Modal, instead of an address.")]
    modal_environment: Annotated[
        str | None, option("NAME", "The Modal environment of the app.", show_default="default of the modal command")
    ]
    api_key: Annotated[
        str | None,
        option(
            "KEY",
            "The key that the server requires. Other users of this machine can see options, but not variables.",
            envvar=KEY_VARIABLE,
            callback=_key_that_is_not_empty,
        ),
    ] = field(repr=False)
    tls: Annotated[
        bool,
        option(
            None, "Connect with TLS. Servers on Modal always have it.", "--tls/--no-tls", envvar="FLYWHEEL_TLS", default=False
        ),
    ]
    cacert: Annotated[Path | None, CACERT]
    cert: Annotated[
        Path | None,
        option("FILE", "Use TLS, and show the server the certificate chain in this PEM file.", envvar="FLYWHEEL_CERT"),
    ]
    key: Annotated[Path | None, option("FILE", "The PEM file with the private key of that certificate.", envvar="FLYWHEEL_KEY")]
    wait_for_ready: Annotated[
        bool, option(None, "Wait, within --timeout, for a server that cannot be reached yet.", is_flag=True)
    ]

    @property
    def name(self) -> str:
        """The name of the server for users, for the beginning of a sentence."""
        return f"The server at {self.address}" if self.modal_app is None else f"The server of the Modal app {self.modal_app}"


@dataclass(frozen=True, kw_only=True)
class RequestOptions:
    """The options of `generate` that are fields of its request, by the names of these fields."""

    max_tokens: Annotated[int, option("N", "The most tokens to generate for each sample.", default=128)]
    num_samples: Annotated[int | None, option("N", "How many samples to generate.", "--samples", "-n", show_default="1")]
    stop: Annotated[tuple[str, ...], option("TEXT", "Where to end a sample; not part of it. Repeatable.")]
    eos_token_ids: Annotated[tuple[int, ...], option("ID", "A token that ends a sample. Repeatable.", "--eos-token-id")]
    max_input_tokens: Annotated[int | None, option("N", "Read only the last N tokens of a longer prompt.", show_default="all")]
    temperature: Annotated[
        float | None, option("X", "How varied the text is; 0 takes the likeliest token.", show_default="1.0")
    ]
    top_k: Annotated[int | None, option("N", "Sample from the N likeliest tokens; 0 is all.", show_default="50")]
    top_p: Annotated[float | None, option("P", "Sample from the likeliest tokens of total probability P.", show_default="1.0")]
    presence_penalty: Annotated[float | None, option("X", "Make tokens that have occurred rarer: -2 to 2.", show_default="0.0")]
    frequency_penalty: Annotated[float | None, option("X", "The same, by how often they have: -2 to 2.", show_default="0.0")]
    seed: Annotated[int | None, option("N", "Make the samples repeatable.", show_default="a new seed")]
    min_p: Annotated[
        float | None, option("P", "Sample from tokens at least P times as likely as the likeliest.", show_default="0.0")
    ]
    repetition_penalty: Annotated[
        float | None, option("X", "Above 1, make tokens that have occurred rarer.", show_default="1.0")
    ]
    logit_bias: Annotated[
        Mapping[int, float] | None,
        option(
            "ID=BIAS", "Make a token likelier or rarer: -100 to 100. Repeatable.", type=str, multiple=True, callback=_biases
        ),
    ]
    json_schema: Annotated[Path | None, option("FILE", "Generate JSON that is valid under the JSON Schema in this file.")]
    regex: Annotated[str | None, option("RE", "Generate a text that matches this regular expression as a whole.")]
    choices: Annotated[tuple[str, ...], option("TEXT", "Generate one of these texts. Repeatable.", "--choice")]
    logprobs: Annotated[
        int | None, option("N", "Show each token with its probability, and the N likeliest tokens.", show_default="0")
    ]
    time_limit: Annotated[
        float | None, option("SECONDS", "End a sample after this time, with the text so far.", show_default="none")
    ]
    priority: Annotated[int | None, option("N", "Below 0, let other calls go first: -1000 to 0.", show_default="0")]

    def fields(self) -> dict[str, Any]:
        """Returns the fields that are set, as keyword arguments of the client; reads the file of the schema.

        Raises:
            OSError: The file cannot be read.
            ValueError: The file is not UTF-8, or an option contradicts another.
        """
        fields = {name: value for name, value in vars(self).items() if value is not None and value != ()}
        if self.json_schema is not None:
            try:
                fields["json_schema"] = self.json_schema.read_bytes().decode("utf-8-sig")
            except UnicodeDecodeError as error:
                raise ValueError(f"--json-schema must be a file in UTF-8, which {self.json_schema} is not: {error}") from None
        if len(constraints := fields.keys() & {"json_schema", "regex", "choices"}) > 1:
            raise ValueError(f"give only one of {' and '.join(map(option_for, sorted(constraints)))}")
        return fields
