"""Refuses a deployment that would change an app's settings only because a variable is not set in the current shell.

A deployment stores its settings as tags of the app on Modal, which the next deployment reads.
"""

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final
from urllib.parse import unquote_to_bytes

from flywheel_server.deployment.settings import DEPLOY_PREFIX, Configuration, configured, relevant_variables
from flywheel_server.setting_texts import NONE, is_blank
from flywheel_server.settings import PREFIX

MAX_TAG_CHARACTERS: Final = 63
"""Modal's limit for the characters of a tag."""

APP_VARIABLE: Final = f"{DEPLOY_PREFIX}APP"
"""The variable with the name of the app. It is not a tag: with another value, another app is deployed."""

ALWAYS_TAGGED: Final = (f"{DEPLOY_PREFIX}WEIGHTS", f"{PREFIX}MODAL_GPU")
"""Variables of a Model whose values become tags even if they are defaults: another version may have other defaults."""

MODAL_VARIABLES: Final = ("MODAL_PROFILE", "MODAL_ENVIRONMENT")
"""Variables of the `modal` command that select the account and the environment."""

MODEL_VARIABLE_PREFIXES: Final = (f"{DEPLOY_PREFIX}MODEL_", f"{DEPLOY_PREFIX}WEIGHTS")
"""Prefixes of the variables that have no effect if the class of another app generates."""


@dataclass(frozen=True, slots=True)
class Change:
    """A setting that a deployment would change although its variable is not set.

    Attributes:
        variable: The environment variable.
        running: The value with which the app runs.
        new: The value with which the app would run.
    """

    variable: str
    running: str
    new: str


def tags(configuration: Configuration, environment: Mapping[str, str]) -> dict[str, str]:
    """Returns the tags for an app: the variables that are set, and always `ALWAYS_TAGGED` if it has a Model.

    Values that are too long for a tag are left out.
    """
    settings = relevant_variables(environment)
    if configuration.weights is not None:
        for variable in ALWAYS_TAGGED:
            settings[variable] = _value(configuration, variable)
    settings.pop(APP_VARIABLE, None)
    encoded = {variable: _encode_tag(value) for variable, value in settings.items()}
    return {variable: tag for variable, tag in encoded.items() if len(tag) <= MAX_TAG_CHARACTERS}


def unconfirmed_changes(running: Mapping[str, str], environment: Mapping[str, str]) -> list[Change]:
    """Returns what a deployment would change of an app with these tags, for variables that the environment does not set."""
    configuration = configured(environment)
    changes = []
    for variable, tag in relevant_variables(running).items():
        if not is_blank(environment.get(variable)) or (
            configuration.weights is None and variable.startswith(MODEL_VARIABLE_PREFIXES)
        ):
            continue
        value = _decode_tag(tag)
        try:
            kept = configured({**environment, variable: value})
        except ValueError:  # the value does not fit other settings, which have changed
            kept = None
        if kept is None or (kept.deployment, kept.server) != (configuration.deployment, configuration.server):
            changes.append(Change(variable, value, _value(configuration, variable)))
    return changes


def refusal_message(app: str, changes: Sequence[Change], command: Sequence[str], environment: Mapping[str, str]) -> str:
    """Returns the message for a command that would make the changes, with two commands: one keeps the settings, one does not.

    Both set all relevant variables of the environment, because the next shell may not have them.
    """
    rows = [f"  {change.variable}: the app has {change.running}, this command would use {change.new}\n" for change in changes]
    keep = {change.variable: change.running for change in changes}
    replace = {change.variable: change.new for change in changes}
    return (
        f"The app {app} runs with other settings than this command would use, because these variables are not set:\n\n"
        f"{''.join(rows)}\nSo nothing was done. To keep the settings of the app:\n\n"
        f"  {_command_line(command, environment, keep)}\n\n"
        f"To change them:\n\n  {_command_line(command, environment, replace)}"
    )


def unknown_app_message(
    app: str, configuration: Configuration, command: Sequence[str], environment: Mapping[str, str]
) -> str | None:
    """Returns the message for a command that would replace an app without tags; None if it sets all `ALWAYS_TAGGED`."""
    if not any(is_blank(environment.get(variable)) for variable in ALWAYS_TAGGED):
        return None
    values = {variable: _value(configuration, variable) for variable in ALWAYS_TAGGED}
    return (
        f"There is an app {app} whose settings are unknown: an older version deployed it, or it is another program, which this "
        "command would replace. So nothing was done. To replace it, say what is to run:\n\n"
        f"  {_command_line(command, environment, values)}"
    )


def _command_line(command: Sequence[str], environment: Mapping[str, str], changed: Mapping[str, str]) -> str:
    """Returns the command for a shell, with all relevant variables of the environment, and with the changed ones."""
    target = {name: environment[name] for name in MODAL_VARIABLES if environment.get(name)}
    variables = {**target, **relevant_variables(environment), **changed}
    return " ".join([*(f"{name}={shlex.quote(value)}" for name, value in variables.items()), shlex.join(command)])


def _value(configuration: Configuration, variable: str) -> str:
    if variable in configuration.environment:
        return configuration.environment[variable]
    of_deployment = variable.startswith(DEPLOY_PREFIX)
    settings = configuration.deployment if of_deployment else configuration.server
    value = getattr(settings, variable.removeprefix(DEPLOY_PREFIX if of_deployment else PREFIX).lower())
    return NONE if value in {None, ""} else str(value)


def _encode_tag(value: str) -> str:
    """Escapes the characters that a tag may not have: `_` as `__`, any other byte as `_` and two hexadecimal digits."""
    special = re.compile(rb"[^A-Za-z0-9.-]")
    return special.sub(lambda found: b"__" if found[0] == b"_" else b"_%02X" % ord(found[0]), value.encode()).decode()


def _decode_tag(tag: str) -> str:
    if tag == "_":
        # From a version in which an empty value meant none.
        return NONE
    return unquote_to_bytes(re.sub("_(_|[0-9A-F]{2})", lambda found: "%5F" if found[1] == "_" else f"%{found[1]}", tag)).decode(
        errors="replace"
    )
