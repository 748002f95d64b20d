"""Keeps a deployment from changing what an app runs only because a variable is not set in today's shell.

The settings with which an app was deployed are tags of the app on Modal, which the next deployment reads.
"""

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final
from urllib.parse import unquote_to_bytes

from flywheel_server.deployment.settings import DEPLOY_PREFIX, Configuration, Deployment, configured, given
from flywheel_server.setting_texts import NONE, is_blank
from flywheel_server.settings import PREFIX, Settings

MAX_TAG: Final = 63
"""Modal's limit for the characters of a tag."""

APP: Final = f"{DEPLOY_PREFIX}APP"
"""The variable that says which app is deployed: with another value it is about another app."""

IN_ANY_CASE: Final = (f"{DEPLOY_PREFIX}WEIGHTS", f"{PREFIX}MODAL_GPU")
"""What is remembered of a Model, also if it is the default: another version may have another default."""

OF_MODAL: Final = ("MODAL_PROFILE", "MODAL_ENVIRONMENT")
"""Variables of the `modal` command that say which account and environment it deploys to."""

OF_THE_MODEL: Final = (f"{DEPLOY_PREFIX}MODEL_", f"{DEPLOY_PREFIX}WEIGHTS")
"""How the variables begin that make no difference if the class of another app generates."""


@dataclass(frozen=True, slots=True)
class Change:
    """A setting that a deployment would change, although nothing in its environment says so.

    Attributes:
        variable: The variable of the environment.
        running: The value with which the app runs.
        new: The value with which it would run.
    """

    variable: str
    running: str
    new: str


def tags(configuration: Configuration, environment: Mapping[str, str]) -> dict[str, str]:
    """Returns the tags of an app that is deployed so: the variables that were set, and in any case what runs on which GPU.

    A value that is too long for a tag is left out.
    """
    settings = given(environment)
    if configuration.weights is not None:
        for variable in IN_ANY_CASE:
            settings[variable] = _value(configuration, variable)
    settings.pop(APP, None)
    encoded = {variable: _encoded(value) for variable, value in settings.items()}
    return {variable: tag for variable, tag in encoded.items() if len(tag) <= MAX_TAG}


def unsaid_changes(running: Mapping[str, str], environment: Mapping[str, str]) -> list[Change]:
    """Returns what a deployment from the environment would change of an app with these tags, without being told to."""
    configuration = configured(environment)
    changes = []
    for variable, tag in given(running).items():
        if not is_blank(environment.get(variable)) or (configuration.weights is None and variable.startswith(OF_THE_MODEL)):
            continue
        value = _decoded(tag)
        try:
            as_it_runs = configured({**environment, variable: value})
        except ValueError:  # as it runs, it does not fit what else has changed
            as_it_runs = None
        if as_it_runs is None or _settings(as_it_runs) != _settings(configuration):
            changes.append(Change(variable, value, _value(configuration, variable)))
    return changes


def refusal(app: str, changes: Sequence[Change], command: Sequence[str], environment: Mapping[str, str]) -> str:
    """Returns the message for a command that would make the changes, with the two commands that say what is wanted.

    Those set all variables of the environment that count, because nobody knows which of them the next shell has too.
    """
    rows = [f"  {change.variable}: the app has {change.running}, this command would use {change.new}" for change in changes]
    keep = {change.variable: change.running for change in changes}
    replace = {change.variable: change.new for change in changes}
    return "\n".join(
        [
            f"The app {app} runs with other settings than this command would use, because these variables are not set:",
            "",
            *rows,
            "",
            "So nothing was done. To keep the settings of the app:",
            "",
            f"  {_typed(command, environment, keep)}",
            "",
            "To change them:",
            "",
            f"  {_typed(command, environment, replace)}",
        ]
    )


def unknown_app(app: str, configuration: Configuration, command: Sequence[str], environment: Mapping[str, str]) -> str | None:
    """Returns the message for a command that would replace an app without tags of ours, unless it is said what is to run."""
    if not any(is_blank(environment.get(variable)) for variable in IN_ANY_CASE):
        return None
    said = {variable: _value(configuration, variable) for variable in IN_ANY_CASE}
    return (
        f"There is an app {app}, and it does not say with which settings it runs: an older version deployed it, or it is "
        f"another program, which this command would replace. So nothing was done. If it is to be replaced, say what is to "
        f"run:\n\n  {_typed(command, environment, said)}"
    )


def _typed(command: Sequence[str], environment: Mapping[str, str], answer: Mapping[str, str]) -> str:
    where = {name: environment[name] for name in OF_MODAL if environment.get(name)}
    variables = {**where, **given(environment), **answer}
    return " ".join([*(f"{name}={shlex.quote(value)}" for name, value in variables.items()), shlex.join(command)])


def _settings(configuration: Configuration) -> tuple[Deployment, Settings]:
    return configuration.deployment, configuration.server


def _value(configuration: Configuration, variable: str) -> str:
    if variable in configuration.environment:
        return configuration.environment[variable]
    is_deployments = variable.startswith(DEPLOY_PREFIX)
    settings = configuration.deployment if is_deployments else configuration.server
    value = getattr(settings, variable.removeprefix(DEPLOY_PREFIX if is_deployments else PREFIX).lower())
    return NONE if value in {None, ""} else str(value)


def _encoded(value: str) -> str:
    """Returns the value in the characters that a tag may have."""
    special = re.compile(rb"[^A-Za-z0-9.-]")
    return special.sub(lambda found: b"__" if found[0] == b"_" else b"_%02X" % ord(found[0]), value.encode()).decode()


def _decoded(tag: str) -> str:
    if tag == "_":
        # An app that was deployed when an empty value asked for none.
        return NONE
    return unquote_to_bytes(re.sub("_(_|[0-9A-F]{2})", lambda found: "%5F" if found[1] == "_" else f"%{found[1]}", tag)).decode(
        errors="replace"
    )
