"""A deployment changes of a running app what it is told to, and nothing else."""

import re
import shlex

import pytest
from flywheel_server.deployment.redeployment import MAX_TAG, refusal, tags, unsaid_changes
from flywheel_server.deployment.settings import DEPLOY_PREFIX, NOT_FROM_THE_SHELL, Deployment, configured, given
from flywheel_server.settings import PREFIX, Settings
from hypothesis import given as given_any
from hypothesis import strategies as st

from tests.deployment.conftest import ROOT, SMALL, deploy
from tests.modal_cloud import ModalCloud

COMMAND = ("modal", "deploy", "modal_deploy.py", "-e", "staging")
TRIAL = {"FLYWHEEL_DEPLOY_WEIGHTS": SMALL.name, "FLYWHEEL_MODAL_GPU": ""}
MIXTRAL = {"FLYWHEEL_DEPLOY_WEIGHTS": "mixtral-8x7b-instruct-q3_k_s", "FLYWHEEL_MODAL_GPU": "A10G"}
VARIABLES = [
    *(f"{DEPLOY_PREFIX}{name.upper()}" for name in Deployment.model_fields if name != "app"),
    *(f"{PREFIX}{name.upper()}" for name in Settings.model_fields if name not in NOT_FROM_THE_SHELL),
]
VALUES = (
    *("true", "false", "2", "0", "3", "7", "2000", "5.5", "0.25", "/some/dir", "1.2.3.4:5"),
    *("both", "raw", "end", "exit", "warning", "text", SMALL.name, "L40S"),
)


def configuration(environment: dict[str, str]) -> tuple[Deployment, Settings]:
    found = configured(environment)
    return found.deployment, found.server


def another_value(variable: str) -> str:
    """Returns a value of the variable that makes a difference."""
    for value in VALUES:
        try:
            if configuration({variable: value}) != configuration({}):
                return value
        except ValueError:
            continue
    raise AssertionError(f"no value for {variable}")


def commands(message: str) -> list[dict[str, str]]:
    """Returns the variables of the commands in a refusal: the one that keeps what runs, and the one that replaces it."""
    found = []
    for line in message.splitlines():
        words = shlex.split(line)
        if words[-len(COMMAND) :] == list(COMMAND):
            found.append(dict(word.split("=", 1) for word in words[: -len(COMMAND)]))
    return found


@pytest.mark.parametrize("variable", VARIABLES)
def test_each_setting_is_asked_for_that_is_no_longer_set(variable: str) -> None:
    environment = {variable: another_value(variable)}
    running = tags(configured(environment), environment)
    changes = unsaid_changes(running, {})
    assert variable in {change.variable for change in changes}
    keep, replace = commands(refusal("flywheel-grpc", changes, COMMAND))
    assert configuration(keep) == configuration(environment)
    assert configuration(replace) == configuration({})
    for answer in (keep, replace):
        assert unsaid_changes(running, answer) == []


def test_what_is_said_or_makes_no_difference_is_not_asked_for() -> None:
    running = tags(configured(TRIAL), TRIAL)
    assert unsaid_changes(running, MIXTRAL) == []
    assert unsaid_changes(running, {**TRIAL, "FLYWHEEL_LOG_LEVEL": "debug"}) == []
    assert unsaid_changes(tags(configured(MIXTRAL), MIXTRAL), {}) == []
    assert unsaid_changes(tags(configured({}), {}), {}) == []
    assert unsaid_changes({}, TRIAL) == []
    assert unsaid_changes(running, {"FLYWHEEL_MODAL_APP": "another", "FLYWHEEL_MODAL_GPU": ""}) == []
    assert unsaid_changes({"team": "llamas", "FLYWHEEL_OF_ANOTHER_VERSION": "1"}, {}) == []


def test_what_runs_is_remembered_although_nobody_has_set_it() -> None:
    assert tags(configured({}), {}) == {name: value.replace("_", "__") for name, value in MIXTRAL.items()}


@given_any(st.text(max_size=30))
def test_any_value_survives_in_a_tag(value: str) -> None:
    environment = {"FLYWHEEL_MODAL_CLASS": value}
    found = tags(configured(environment), environment)
    for tag in found.values():
        assert re.fullmatch(r"[A-Za-z0-9._-]+", tag), tag
        assert len(tag) <= MAX_TAG
    if "FLYWHEEL_MODAL_CLASS" in found and value != "Model":
        (change,) = unsaid_changes(found, {})
        assert (change.running, change.new) == (value, "Model")


def test_nothing_replaces_the_trial_by_accident(prepared: ModalCloud) -> None:
    """The trial of the documentation, then a deployment from a shell that no longer has its variables."""
    idle = {"FLYWHEEL_DEPLOY_GATEWAY_MIN_CONTAINERS": "0"}
    assert deploy(prepared, "trial", **TRIAL, **idle).returncode == 0
    before = prepared.tags("trial")
    assert given(before) == before
    forgetful = deploy(prepared, "trial", **dict.fromkeys(TRIAL), **idle)
    assert forgetful.returncode == 1
    assert "Traceback" not in forgetful.stderr
    for expected in (
        f"FLYWHEEL_DEPLOY_WEIGHTS: {SMALL.name} now, mixtral-8x7b-instruct-q3_k_s then",
        "FLYWHEEL_MODAL_GPU: empty now, A10G then",
        f"  FLYWHEEL_DEPLOY_WEIGHTS={SMALL.name} FLYWHEEL_MODAL_GPU='' modal deploy modal_deploy.py",
        "  FLYWHEEL_DEPLOY_WEIGHTS=mixtral-8x7b-instruct-q3_k_s FLYWHEEL_MODAL_GPU=A10G modal deploy modal_deploy.py",
    ):
        assert expected in forgetful.stderr
    assert prepared.tags("trial") == before
    assert not prepared.function("trial/Model").resources.gpu_config.gpu_type
    for answer, gpu in ((TRIAL, ""), (MIXTRAL, "A10G")):
        done = deploy(prepared, "trial", **answer, **idle)
        assert done.returncode == 0, done.stderr
        assert prepared.function("trial/Model").resources.gpu_config.gpu_type == gpu
    assert deploy(prepared, "trial", **dict.fromkeys(TRIAL), **idle).returncode == 0, "these are the defaults"


def test_an_app_that_was_stopped_is_no_longer_remembered(prepared: ModalCloud) -> None:
    idle = {"FLYWHEEL_DEPLOY_GATEWAY_MIN_CONTAINERS": "0"}
    assert deploy(prepared, "stopped", **TRIAL, **idle).returncode == 0
    assert prepared.cli("app", "stop", "stopped", "--yes").returncode == 0
    done = deploy(prepared, "stopped", **dict.fromkeys(TRIAL), **idle)
    assert done.returncode == 0, done.stderr


def test_the_refusal_in_the_documentation_is_what_is_said() -> None:
    changes = unsaid_changes(tags(configured(TRIAL), TRIAL), {})
    said = refusal("flywheel-grpc", changes, [".venv/bin/modal", "deploy", "modal_deploy.py"])
    assert f"```\n{said}\n```" in (ROOT / "docs" / "modal.md").read_text()
