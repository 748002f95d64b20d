"""The options of the subcommands of `flywheel`: a field of a dataclass is an option."""

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final, get_args, get_origin, get_type_hints

import click

KEY_VARIABLE: Final = "FLYWHEEL_API_KEY"
SECONDS: Final = click.FloatRange(min=0.001)
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


def options_of(kind: type) -> Decorator:
    """Returns a decorator that gives a subcommand the options that the fields of a dataclass are annotated with."""
    hints = get_type_hints(kind, include_extras=True).items()
    options = [option(name, hint.__origin__) for name, hint in hints for option in hint.__metadata__]
    return lambda run: functools.reduce(lambda decorated, option: option(decorated), reversed(options), run)


def _key_that_is_not_empty(_context: click.Context, _parameter: click.Parameter, key: str | None) -> str | None:
    # Click ignores an empty variable, but a user who sets a key wants to send a key.
    if not (os.environ.get(KEY_VARIABLE, "unset") if key is None else key).strip():
        raise click.BadParameter("it is empty, but must be a key")
    return key


CACERT: Final = _option(
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
            envvar=KEY_VARIABLE,
            callback=_key_that_is_not_empty,
        ),
    ] = field(repr=False)
    tls: Annotated[
        bool,
        _option(
            None, "Connect with TLS. Servers on Modal always have it.", "--tls/--no-tls", envvar="FLYWHEEL_TLS", default=False
        ),
    ]
    cacert: Annotated[Path | None, CACERT]
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
