"""The numbers that the command `flywheel` takes: no option accepts NaN, and only timeouts accept infinity."""

import click
import pytest
from click.testing import CliRunner
from flywheel_client._cli import app

OPTIONS = [
    (name, option.opts[0])
    for name, command in app.commands.items()
    for option in command.params
    if isinstance(option.type, click.types.FloatParamType)
]


def refused(*arguments: str) -> str:
    """Returns what the command says of wrong arguments, which must end it with exit code 2."""
    done = CliRunner().invoke(
        app, arguments, env={"FLYWHEEL_ADDRESS": "127.0.0.1:1", "FLYWHEEL_METRICS_ADDRESS": "127.0.0.1:1"}
    )
    assert done.exit_code == 2, (arguments, done.output)
    return done.stderr


def test_subcommands_have_such_options() -> None:
    assert {"bench", "generate", "stats", "tokenize", "top"} <= {name for name, _ in OPTIONS}
    assert {("bench", "--rate"), ("bench", "--min-p"), ("generate", "--time-limit"), ("top", "--interval")} <= set(OPTIONS)


@pytest.mark.parametrize("number", ["nan", "inf", "-inf"])
def test_numbers_must_be_finite(number: str) -> None:
    for name, flag in OPTIONS:
        if flag != "--timeout":
            assert f"Invalid value for '{flag}': {number} is not a finite number." in refused(name, flag, number)
        elif number != "inf":
            assert f"Invalid value for '{flag}': {number} is not " in refused(name, flag, number)
    for name in ("bench", "generate"):
        assert f"the bias in '42={number}' is not a finite number" in refused(name, "--logit-bias", f"42={number}")
