"""The variables of the command `flywheel`: an empty one counts as not set, except the key."""

import pytest
from click.testing import CliRunner, Result
from flywheel_client._cli import app

from tests.client.conftest import FakeService

VARIABLES = {str(option.envvar): str(option.name) for option in app.commands["health"].params if option.envvar}
KEY = "FLYWHEEL_API_KEY"
BLANKS = ("", "  ")


def health(fake: FakeService, *arguments: str, **variables: str) -> Result:
    address = () if variables.get("FLYWHEEL_ADDRESS", "").strip() else ("--address", fake.address)
    others = dict.fromkeys(VARIABLES.keys() - variables.keys())
    return CliRunner().invoke(app, ["health", *address, *arguments], env={**others, **variables})


def test_it_has_these_variables() -> None:
    assert set(VARIABLES) == {"FLYWHEEL_ADDRESS", KEY, "FLYWHEEL_TLS", "FLYWHEEL_CERT", "FLYWHEEL_KEY"}


@pytest.mark.parametrize("blank", BLANKS)
def test_empty_variables_count_as_not_set(fake: FakeService, blank: str) -> None:
    done = health(fake, **dict.fromkeys(VARIABLES.keys() - {KEY}, blank))
    assert (done.exit_code, done.stdout) == (0, "SERVING\n"), done.stderr


def test_spaces_and_upper_case_make_no_difference(fake: FakeService) -> None:
    done = health(fake, FLYWHEEL_ADDRESS=f" {fake.address} ", FLYWHEEL_TLS=" FALSE ", FLYWHEEL_API_KEY=" key ")
    assert (done.exit_code, done.stdout) == (0, "SERVING\n"), done.stderr


@pytest.mark.parametrize("variables", [*({KEY: blank} for blank in BLANKS), {}])
def test_an_empty_key_is_refused(fake: FakeService, variables: dict[str, str]) -> None:
    done = health(fake, *(() if variables else ("--api-key", "")), **variables)
    assert done.exit_code == 2
    for expected in ("--api-key", KEY, "it is empty"):
        assert expected in done.stderr


def test_the_option_wins_over_an_empty_key(fake: FakeService) -> None:
    assert health(fake, "--api-key", "key", **{KEY: ""}).exit_code == 0


@pytest.mark.parametrize("name", ["FLYWHEEL_TLS", "FLYWHEEL_CERT", "FLYWHEEL_KEY"])
def test_a_wrong_value_is_answered_with_option_and_variable(fake: FakeService, name: str) -> None:
    done = health(fake, **{name: "no-such-value"})
    assert done.exit_code == 2
    for expected in (f"--{VARIABLES[name]}", name):
        assert expected in done.stderr
