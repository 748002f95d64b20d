"""A deployment refuses keys with which its gateway would not start, and the message says how to replace them."""

import re
from collections.abc import Iterator

import pytest
from flywheel_server.deployment.gateway_settings import gateway_settings

from tests.deployment.conftest import KEY, ROOT, deploy
from tests.modal_cloud import ModalCloud
from tests.thorough import further

SECRET = "flywheel-grpc-keys"  # noqa: S105 - its name
IDLE = {"FLYWHEEL_DEPLOY_GATEWAY_MIN_CONTAINERS": "0"}
GOOD = [KEY, f"{KEY},{KEY[::-1]}", f" {KEY} , {KEY[::-1]},"]
BAD = {
    "": "FLYWHEEL_API_KEYS: must hold a key",
    " , ,": "FLYWHEEL_API_KEYS: must hold a key",
    KEY[1:]: "FLYWHEEL_API_KEYS number 1: must be at least 16 visible ASCII characters",
    f"{KEY},short": "FLYWHEEL_API_KEYS number 2: must be at least 16 visible ASCII characters",
    f"{KEY} {KEY}": "FLYWHEEL_API_KEYS number 1: must be at least 16 visible ASCII characters",
    f"{KEY}é": "FLYWHEEL_API_KEYS number 1: must be at least 16 visible ASCII characters",
}


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModalCloud]:
    """A cloud whose secret is this module's."""
    with ModalCloud(tmp_path_factory.mktemp("own-cloud")) as cloud:
        yield cloud
        assert not cloud.unimplemented


@pytest.mark.parametrize("keys", BAD)
def test_bad_keys_are_refused_with_the_reason_and_without_the_key(keys: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLYWHEEL_API_KEYS", keys)
    with pytest.raises(ValueError, match="does not start") as refused:
        gateway_settings()
    assert BAD[keys] in str(refused.value)
    assert not any(key.strip() and key.strip() in str(refused.value) for key in keys.split(","))


@pytest.mark.parametrize("keys", GOOD)
def test_good_keys(keys: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLYWHEEL_API_KEYS", keys)
    assert gateway_settings().api_keys


@pytest.mark.parametrize("keys", ["", *further([KEY[1:], f"{KEY},short"])])
def test_nothing_is_deployed_with_bad_keys(own: ModalCloud, keys: str) -> None:
    own.create_secret(SECRET, {"FLYWHEEL_API_KEYS": keys})
    refused = deploy(own, "bad", **IDLE)
    assert refused.returncode == 1
    said = refused.stdout + refused.stderr
    assert BAD[keys] in said
    assert f"modal secret create --force {SECRET} FLYWHEEL_API_KEYS=$KEY" in said
    assert "Traceback" not in said
    with pytest.raises(KeyError):
        own.function("bad/Gateway")


def test_the_commands_of_the_refusal_mend_it(own: ModalCloud) -> None:
    own.create_secret(SECRET, {"FLYWHEEL_API_KEYS": "short"})
    said = deploy(own, "mended", **IDLE).stdout
    (create,) = re.findall(r"^  modal (secret create .*)$", said, re.MULTILINE)
    done = own.cli(*create.replace("$KEY", KEY).split())
    assert done.returncode == 0, done.stderr
    done = deploy(own, "mended", **IDLE)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.thorough
def test_a_secret_that_turns_bad_is_found_by_the_next_deployment(own: ModalCloud) -> None:
    own.create_secret(SECRET, {"FLYWHEEL_API_KEYS": KEY})
    assert deploy(own, "turned", **IDLE).returncode == 0
    own.create_secret(SECRET, {"FLYWHEEL_API_KEYS": "short"})
    assert deploy(own, "turned", **IDLE).returncode == 1


def test_a_gateway_that_does_not_start_says_why_and_what_to_do(own: ModalCloud) -> None:
    own.create_secret(SECRET, {"FLYWHEEL_API_KEYS": KEY})
    assert deploy(own, "late", **IDLE).returncode == 0
    own.replace_secret(SECRET, {"FLYWHEEL_API_KEYS": "short"})
    container = own.start_container("late/Gateway")
    container.wait()
    assert "number 1: must be at least 16" in container.output()
    assert f"modal secret create -e main --force {SECRET}" in container.output()


@pytest.mark.thorough
def test_the_command_of_the_refusal_replaces_a_secret_that_lacks_the_variable(own: ModalCloud) -> None:
    """For example a secret with FLYWHEEL_API_KEY, which is the variable of the client."""
    own.create_secret(SECRET, {"FLYWHEEL_API_KEY": KEY})
    refused = deploy(own, "misnamed", **IDLE)
    assert refused.returncode == 1
    (create,) = re.findall(r"^  modal (secret create .*)$", refused.stderr, re.MULTILINE)
    assert own.cli(*create.replace("$KEY", KEY).split()).returncode == 0
    done = deploy(own, "misnamed", **IDLE)
    assert done.returncode == 0, done.stdout + done.stderr


def test_an_environment_that_is_not_there_is_named_in_the_words_of_modal(own: ModalCloud) -> None:
    refused = own.cli("deploy", "-e", "nowhere", "modal_deploy.py", cwd=ROOT)
    assert refused.returncode == 1
    assert re.search(r"\(.*not found in environment 'nowhere'\)|\(Environment 'nowhere' not found", refused.stderr)


@pytest.mark.parametrize("how", ["option", *further(["variable"])])
def test_the_hint_for_a_missing_secret_has_the_environment(own: ModalCloud, how: str) -> None:
    own.cli("environment", "create", "staging")
    options, env = (["-e", "staging"], {}) if how == "option" else ([], {"MODAL_ENVIRONMENT": "staging"})
    refused = own.cli("deploy", *options, "modal_deploy.py", env=env, cwd=ROOT)
    assert refused.returncode == 1
    assert f"modal secret create -e staging {SECRET} FLYWHEEL_API_KEYS=$KEY" in refused.stderr
