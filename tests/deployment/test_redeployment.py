"""A deployment changes only those settings of a running app that it is told to change."""

import re
import shlex
import subprocess
import time
from pathlib import Path

import pytest
from flywheel_server.deployment.redeployment import (
    MAX_TAG_CHARACTERS,
    refusal_message,
    tags,
    unconfirmed_changes,
    unknown_app_message,
)
from flywheel_server.deployment.settings import DEPLOY_PREFIX, EXCLUDED_SETTINGS, Deployment, configured, relevant_variables
from flywheel_server.settings import PREFIX, Settings
from grpclib import Status
from hypothesis import given as given_any
from hypothesis import settings
from hypothesis import strategies as st

from tests.deployment.conftest import ROOT, SMALL, deploy
from tests.modal_cloud import ModalCloud
from tests.thorough import further

COMMAND = ("modal", "deploy", "modal_deploy.py", "-e", "staging")
IDLE = {"FLYWHEEL_DEPLOY_GATEWAY_MIN_CONTAINERS": "0"}
TRIAL = {"FLYWHEEL_DEPLOY_WEIGHTS": SMALL.name, "FLYWHEEL_MODAL_GPU": "none"}
MIXTRAL = {"FLYWHEEL_DEPLOY_WEIGHTS": "mixtral-8x7b-instruct-q3_k_s", "FLYWHEEL_MODAL_GPU": "A10G"}
OF_ANOTHER_APP = ("modal_class", "modal_environment")
"""Settings that say nothing about a Model of ours."""

VARIABLES = [
    *(f"{DEPLOY_PREFIX}{name.upper()}" for name in Deployment.model_fields if name != "app"),
    *(f"{PREFIX}{name.upper()}" for name in Settings.model_fields if name not in (*EXCLUDED_SETTINGS, *OF_ANOTHER_APP)),
]
VALUES = (
    *("true", "false", "2", "0", "3", "7", "2000", "5.5", "0.25", "/some/dir", "1.2.3.4:5"),
    *("1", "both", "raw", "end", "exit", "warning", "text", SMALL.name, "L40S", "http://1.2.3.4:5"),
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
    """Returns the variables of the two commands in a refusal: the first keeps the settings, the second replaces them."""
    found = []
    for line in message.splitlines():
        words = shlex.split(line)
        if words[-len(COMMAND) :] == list(COMMAND):
            found.append(dict(word.split("=", 1) for word in words[: -len(COMMAND)]))
    return found


@pytest.mark.parametrize("variable", VARIABLES)
def test_each_setting_that_is_no_longer_set_is_asked_for(variable: str) -> None:
    environment = {variable: another_value(variable)}
    running = tags(configured(environment), environment)
    changes = unconfirmed_changes(running, {})
    assert variable in {change.variable for change in changes}
    keep, replace = commands(refusal_message("flywheel-grpc", changes, COMMAND, {}))
    assert configuration(keep) == configuration(environment)
    assert configuration(replace) == configuration({})
    for answer in (keep, replace):
        assert unconfirmed_changes(running, answer) == []


def test_a_setting_that_is_set_or_makes_no_difference_is_not_asked_for() -> None:
    running = tags(configured(TRIAL), TRIAL)
    assert unconfirmed_changes(running, MIXTRAL) == []
    assert unconfirmed_changes(running, {**TRIAL, "FLYWHEEL_LOG_LEVEL": "debug"}) == []
    assert unconfirmed_changes(tags(configured(MIXTRAL), MIXTRAL), {}) == []
    assert unconfirmed_changes(tags(configured({}), {}), {}) == []
    assert unconfirmed_changes({}, TRIAL) == []
    assert unconfirmed_changes(running, {"FLYWHEEL_MODAL_APP": "another", "FLYWHEEL_MODAL_GPU": "none"}) == []
    assert unconfirmed_changes({"team": "llamas", "FLYWHEEL_OF_ANOTHER_VERSION": "1"}, {}) == []


def test_an_app_that_was_deployed_with_an_empty_gpu_has_none() -> None:
    (change,) = unconfirmed_changes({"FLYWHEEL_MODAL_GPU": "_"}, {})
    assert (change.running, change.new) == ("none", "A10G")
    assert (
        unconfirmed_changes(
            {"FLYWHEEL_MODAL_GPU": "_", "FLYWHEEL_DEPLOY_GATEWAY_MAX_CONTAINERS": "_"}, {"FLYWHEEL_MODAL_GPU": "none"}
        )
        == []
    )


@pytest.mark.parametrize("empty", ["", " "])
def test_an_empty_variable_does_not_say_what_is_to_run(empty: str) -> None:
    running = tags(configured(TRIAL), TRIAL)
    assert {change.variable for change in unconfirmed_changes(running, dict.fromkeys(TRIAL, empty))} == set(TRIAL)
    assert unknown_app_message("some", configured({}), COMMAND, dict.fromkeys(TRIAL, empty))


def test_what_runs_is_remembered_although_nobody_has_set_it() -> None:
    assert tags(configured({}), {}) == {name: value.replace("_", "__") for name, value in MIXTRAL.items()}


@settings(deadline=None)  # a busy machine takes its time
@given_any(st.text(max_size=30))
def test_any_value_survives_in_a_tag(value: str) -> None:
    another = {"FLYWHEEL_MODAL_APP": "another"}
    environment = {**another, "FLYWHEEL_MODAL_ENVIRONMENT": value}
    found = tags(configured(environment), environment)
    for tag in found.values():
        assert re.fullmatch(r"[A-Za-z0-9._-]+", tag), tag
        assert len(tag) <= MAX_TAG_CHARACTERS
    if "FLYWHEEL_MODAL_ENVIRONMENT" in found and value.strip().lower() != "none":
        (change,) = unconfirmed_changes(found, another)
        assert (change.running, change.new) == (value, "none")


@pytest.mark.thorough
def test_nothing_replaces_the_trial_by_accident(prepared: ModalCloud) -> None:
    """The trial of the documentation, then a deployment from a shell that no longer has its variables."""
    assert deploy(prepared, "trial", **TRIAL, **IDLE).returncode == 0
    before = prepared.tags("trial")
    assert relevant_variables(before) == before
    forgetful = deploy(prepared, "trial", **dict.fromkeys(TRIAL), **IDLE)
    assert forgetful.returncode == 1
    assert "Traceback" not in forgetful.stderr
    for expected in (
        f"FLYWHEEL_DEPLOY_WEIGHTS: the app has {SMALL.name}, this command would use mixtral-8x7b-instruct-q3_k_s",
        "FLYWHEEL_MODAL_GPU: the app has none, this command would use A10G",
        f" FLYWHEEL_DEPLOY_WEIGHTS={SMALL.name} FLYWHEEL_MODAL_GPU=none modal deploy modal_deploy.py",
        " FLYWHEEL_DEPLOY_WEIGHTS=mixtral-8x7b-instruct-q3_k_s FLYWHEEL_MODAL_GPU=A10G modal deploy modal_deploy.py",
    ):
        assert expected in forgetful.stderr
    assert prepared.tags("trial") == before
    assert not prepared.function("trial/Model").resources.gpu_config.gpu_type
    for answer, gpu in ((TRIAL, ""), (MIXTRAL, "A10G")):
        done = deploy(prepared, "trial", **answer, **IDLE)
        assert done.returncode == 0, done.stderr
        assert prepared.function("trial/Model").resources.gpu_config.gpu_type == gpu
    assert deploy(prepared, "trial", **dict.fromkeys(TRIAL), **IDLE).returncode == 0, "these are the defaults"


def test_the_commands_of_a_refusal_are_about_the_same_app_account_and_settings() -> None:
    shell = {
        "FLYWHEEL_DEPLOY_APP": "second",
        "FLYWHEEL_LOG_LEVEL": "debug",
        "MODAL_PROFILE": "work",
        "MODAL_ENVIRONMENT": "staging",
        "FLYWHEEL_API_KEYS": "0123456789abcdef",
        "FLYWHEEL_API_KEY": "0123456789abcdef",
        "MODAL_TOKEN_SECRET": "as-0123456789abcdef",
    }
    said = refusal_message("second", unconfirmed_changes(tags(configured(TRIAL), TRIAL), shell), COMMAND, shell)
    kept = {name: value for name, value in shell.items() if "0123456789abcdef" not in value}
    assert commands(said) == [{**kept, **TRIAL}, {**kept, **MIXTRAL}]
    assert "0123456789abcdef" not in said


@pytest.fixture(scope="module")
def tried(prepared: ModalCloud) -> ModalCloud:
    """The cloud with the trial of the documentation as the app `tried`."""
    assert deploy(prepared, "tried", **TRIAL, **IDLE).returncode == 0
    return prepared


def untouched(cloud: ModalCloud, refused: subprocess.CompletedProcess[str], *named: str) -> None:
    """Asserts that the command was refused in words, and that the app `tried` is still the trial."""
    assert refused.returncode == 1, refused.stdout
    assert "Traceback" not in refused.stderr
    assert "App deployed" not in refused.stdout
    for expected in named:
        assert expected in refused.stderr
    assert not cloud.function("tried/Model").resources.gpu_config.gpu_type


@pytest.mark.parametrize("status", [Status.PERMISSION_DENIED, *further([Status.UNIMPLEMENTED, Status.FAILED_PRECONDITION])])
def test_nothing_is_deployed_if_modal_does_not_tell_the_settings(tried: ModalCloud, status: Status) -> None:
    tried.disturb("AppGetTags", status=status, message="not for you")
    try:
        refused = deploy(tried, "tried", **dict.fromkeys(TRIAL), **IDLE)
    finally:
        tried.calm()
    untouched(tried, refused, "which settings the app tried runs", "not for you")


@pytest.mark.thorough  # for as long as Modal's client tries, which is a minute
def test_a_deployment_waits_once_for_a_modal_that_cannot_be_reached(tried: ModalCloud) -> None:
    began = time.monotonic()
    refused = deploy(tried, "tried", MODAL_SERVER_URL="http://127.0.0.1:9", **TRIAL, **IDLE)
    untouched(tried, refused, "Could not connect to the Modal server")
    assert time.monotonic() - began < 100, "twice would be two minutes"


@pytest.mark.parametrize("option", [["--name", "other"], *further([["--name=other"]])])
def test_a_name_that_the_gateway_does_not_know_is_refused(tried: ModalCloud, option: list[str]) -> None:
    refused = tried.cli("deploy", *option, "modal_deploy.py", env=TRIAL, cwd=ROOT)
    untouched(tried, refused, "FLYWHEEL_DEPLOY_APP=NAME")
    with pytest.raises(KeyError):
        tried.function("other/Gateway")


@pytest.mark.parametrize(
    "command", [["serve", "modal_deploy.py"], *further([["run", "modal_deploy.py::Model.generate", "--text", "x"]])]
)
def test_no_second_gateway_beside_the_deployed_ones(tried: ModalCloud, command: list[str]) -> None:
    refused = tried.cli(*command, env={**TRIAL, "FLYWHEEL_DEPLOY_APP": "tried"}, cwd=ROOT)
    untouched(tried, refused, "modal deploy", "modal run modal_deploy.py::fetch_weights")


@pytest.mark.thorough
def test_other_weights_than_the_app_runs_are_not_fetched_by_accident(tried: ModalCloud) -> None:
    variables = {"FLYWHEEL_DEPLOY_APP": "tried", "FLYWHEEL_DEPLOY_WEIGHTS_PATH": str(tried.directory / "weights")}
    refused = tried.cli("run", "modal_deploy.py::fetch_weights", env=variables, cwd=ROOT)
    untouched(tried, refused, f"FLYWHEEL_DEPLOY_WEIGHTS={SMALL.name}", "modal run modal_deploy.py::fetch_weights")


def test_an_app_that_is_not_known_to_be_ours_is_not_replaced_by_accident(tried: ModalCloud, tmp_path: Path) -> None:
    (tmp_path / "foreign.py").write_text("import modal\napp = modal.App('foreign')\n@app.function()\ndef nothing(): ...\n")
    deployed = tried.cli("deploy", "foreign.py", cwd=tmp_path)
    assert deployed.returncode == 0, deployed.stderr
    refused = deploy(tried, "foreign", **dict.fromkeys(TRIAL), **IDLE)
    untouched(tried, refused, "There is an app foreign", "FLYWHEEL_DEPLOY_WEIGHTS=mixtral", "FLYWHEEL_MODAL_GPU=A10G modal")
    done = deploy(tried, "foreign", **TRIAL, **IDLE)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "variables", [{"FLYWHEEL_MODAL_APP": "mk2"}, *further([{"FLYWHEEL_MODAL_APP": "tried", "FLYWHEEL_MODAL_CLASS": "Modl"}])]
)
def test_no_gateway_for_a_class_that_is_not_there(tried: ModalCloud, variables: dict[str, str]) -> None:
    refused = deploy(tried, "fronting", **variables, **IDLE)
    untouched(tried, refused, *(f"{name} is {value}" for name, value in variables.items() if name.endswith("APP")))
    with pytest.raises(KeyError):
        tried.function("fronting/Gateway")


@pytest.mark.thorough
def test_an_app_that_was_stopped_is_no_longer_remembered(prepared: ModalCloud) -> None:
    assert deploy(prepared, "stopped", **TRIAL, **IDLE).returncode == 0
    assert prepared.cli("app", "stop", "stopped", "--yes").returncode == 0
    done = deploy(prepared, "stopped", **dict.fromkeys(TRIAL), **IDLE)
    assert done.returncode == 0, done.stderr


def test_the_refusal_in_the_documentation_is_what_is_said() -> None:
    changes = unconfirmed_changes(tags(configured(TRIAL), TRIAL), {})
    said = refusal_message("flywheel-grpc", changes, [".venv/bin/modal", "deploy", "modal_deploy.py"], {})
    assert f"```\n{said}\n```" in (ROOT / "docs" / "modal.md").read_text()
