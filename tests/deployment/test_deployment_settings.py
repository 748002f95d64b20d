"""The configuration of a deployment: checked before anything is deployed, and the same again in its containers."""

import modal
import pytest
from flywheel_server.deployment.directory import dict_name
from flywheel_server.deployment.settings import Deployment, configured
from modal._utils.mount_utils import validate_volumes


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {
            "FLYWHEEL_DEPLOY_EXPOSE": "both",
            "FLYWHEEL_DEPLOY_GATEWAY_MAX_CONTAINERS": "3",
            "FLYWHEEL_DEPLOY_ADDRESS": "127.0.0.1:5",
        },
        {"FLYWHEEL_MODAL_APP": "mk1-flywheel-latest-mistral-7b-instruct", "FLYWHEEL_MODAL_PROMPT": "raw"},
        {"FLYWHEEL_DEPLOY_WEIGHTS": "smollm2-135m-instruct-q8_0", "FLYWHEEL_MODAL_GPU": "none"},
    ],
)
def test_a_container_comes_to_the_same_configuration(environment: dict[str, str]) -> None:
    deployed = configured(environment)
    assert configured({**deployed.environment, "MODAL_TASK_ID": "ta-1"}) == deployed


def test_the_defaults() -> None:
    found = configured({})
    assert (found.deployment.app, found.deployment.expose, found.deployment.gateway_min_containers) == (
        "flywheel-grpc",
        "tunnel",
        1,
    )
    assert (found.server.engine, found.server.modal_app, found.server.modal_gpu) == ("flywheel", "flywheel-grpc", "A10G")
    assert found.weights is not None
    assert found.server.model == found.weights.name
    assert found.weights.name.startswith("mixtral-8x7b")
    assert found.server.drain_timeout < 30, "Modal grants no more"


def test_the_class_of_another_app_needs_no_model_here() -> None:
    found = configured({"FLYWHEEL_MODAL_APP": "mk1-flywheel-latest-mistral-7b-instruct"})
    assert found.weights is None
    assert found.server.model is None


def test_settings_that_mean_something_else_in_the_deployer_s_shell_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    shell = {
        "FLYWHEEL_API_KEYS": "too short",
        "FLYWHEEL_SCRIPT": "{}",
        "FLYWHEEL_ADDRESS": "localhost:50051",
        "FLYWHEEL_ENGINE": "embedded",
        "FLYWHEEL_MODEL": "some.gguf",
        "FLYWHEEL_TLS_CERT": "server.pem",
        "FLYWHEEL_TLS_KEY": "server-key.pem",
        "FLYWHEEL_API_KEYS_FILE": "keys.json",
    }
    default = configured({})
    for name, value in shell.items():
        monkeypatch.setenv(name, value)
    assert configured(shell) == configured({}) == default


@pytest.mark.parametrize(
    ("environment", "cpu", "memory"),
    [
        ({}, 2, 4096),
        ({"FLYWHEEL_DEPLOY_MODEL_CPU": "3.9", "FLYWHEEL_DEPLOY_MODEL_MEMORY": "9000"}, 3, 9000),
        ({"FLYWHEEL_DEPLOY_MODEL_CPU": "0.5", "FLYWHEEL_DEPLOY_MODEL_MEMORY": ""}, 1, 4096),
        # 139 MiB of weights and 8192 tokens of 22.5 KiB on the CPU; 19488 MiB and 8192 of 128 KiB.
        ({"FLYWHEEL_DEPLOY_WEIGHTS": "smollm2-135m-instruct-q8_0", "FLYWHEEL_MODAL_GPU": "none"}, 2, 1024 + 319),
        ({"FLYWHEEL_MODAL_GPU": "none"}, 2, 1024 + 20512),
        ({"FLYWHEEL_MODAL_APP": "another"}, 2, None),
    ],
)
def test_threads_and_memory_of_the_model(environment: dict[str, str], cpu: int, memory: int | None) -> None:
    found = configured(environment)
    assert (found.deployment.model_threads, found.model_memory) == (cpu, memory)


def test_one_container_with_a_gpu_unless_more_are_asked_for() -> None:
    assert configured({}).deployment.model_max_containers == 1
    assert configured({"FLYWHEEL_DEPLOY_MODEL_MAX_CONTAINERS": "3"}).deployment.model_max_containers == 3
    assert configured({"FLYWHEEL_DEPLOY_GATEWAY_MAX_CONTAINERS": ""}).deployment.gateway_max_containers is None


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({"FLYWHEEL_DEPLOY_EXPOSE": "telnet"}, ["FLYWHEEL_DEPLOY_EXPOSE", "'tunnel', 'server' or 'both'"]),
        ({"FLYWHEEL_DEPLOY_MODEL_SLOTS": "0", "FLYWHEEL_DEPLOY_MODEL_SCALEDOWN": "x"}, ["MODEL_SLOTS", "MODEL_SCALEDOWN"]),
        ({"FLYWHEEL_DEPLOY_MODEL_CPU": "0", "FLYWHEEL_DEPLOY_GATEWAY_MEMORY": "1"}, ["MODEL_CPU", "GATEWAY_MEMORY"]),
        ({"FLYWHEEL_DEPLOY_MODEL_MAX_CONTAINERS": "0"}, ["FLYWHEEL_DEPLOY_MODEL_MAX_CONTAINERS", "greater than or equal to 1"]),
        ({"FLYWHEEL_DEPLOY_ADDRESS": "nowhere"}, ["FLYWHEEL_DEPLOY_ADDRESS", "HOST:PORT"]),
        ({"FLYWHEEL_DEPLOY_ADDRESS": "0.0.0.0:0", "FLYWHEEL_DEPLOY_EXPOSE": "server"}, ["FLYWHEEL_DEPLOY_ADDRESS", "a port"]),
        ({"FLYWHEEL_DRAIN_TIMEOUT": "21"}, ["FLYWHEEL_DRAIN_TIMEOUT", "at most 22 s", "WITHDRAW_WINDOW", "30 s"]),
        ({"FLYWHEEL_DEPLOY_WEIGHTS": "gpt"}, ["FLYWHEEL_DEPLOY_WEIGHTS", "'gpt'", "mixtral-8x7b-instruct-q3_k_s"]),
        ({"FLYWHEEL_MODAL_CONTEXT": "255"}, ["FLYWHEEL_MODAL_CONTEXT", "256"]),
        ({"FLYWHEEL_MODAL_GPU": "A11"}, ["FLYWHEEL_MODAL_GPU", "'A11'", "A10G", "or none"]),
        ({"FLYWHEEL_MODAL_GPU": "A10G:x"}, ["FLYWHEEL_MODAL_GPU", "NAME:COUNT"]),
        ({"FLYWHEEL_DEPLOY_APP": "my app"}, ["FLYWHEEL_DEPLOY_APP", "dashes, periods and underscores"]),
        ({"FLYWHEEL_MODAL_CLASS": "Flywheel"}, ["FLYWHEEL_MODAL_CLASS", "must be Model", "FLYWHEEL_MODAL_APP"]),
        ({"FLYWHEEL_MODAL_ENVIRONMENT": "prod"}, ["FLYWHEEL_MODAL_ENVIRONMENT", "must not be set", "-e ENVIRONMENT"]),
        ({"FLYWHEEL_DEPLOY_WEIGHTS_PATH": "weights"}, ["FLYWHEEL_DEPLOY_WEIGHTS_PATH", "absolute path such as /weights"]),
        ({"FLYWHEEL_DEPLOY_WEIGHTS_PATH": "/root"}, ["FLYWHEEL_DEPLOY_WEIGHTS_PATH", "neither / nor /root"]),
        ({"FLYWHEEL_DEPLOY_WEIGHTS_PATH": "/a/../b"}, ["FLYWHEEL_DEPLOY_WEIGHTS_PATH"]),
        ({"FLYWHEEL_DEPLOY_TUNNEL_INTERVAL": "inf"}, ["FLYWHEEL_DEPLOY_TUNNEL_INTERVAL", "finite"]),
        ({"FLYWHEEL_DEPLOY_MODEL_MAX_CONTAINERS": "99999999999"}, ["FLYWHEEL_DEPLOY_MODEL_MAX_CONTAINERS", "less than"]),
        (
            {"FLYWHEEL_DEPLOY_MODEL_MIN_CONTAINERS": "2"},
            ["MODEL_MIN_CONTAINERS", "FLYWHEEL_DEPLOY_MODEL_MAX_CONTAINERS", "is 1"],
        ),
        (
            {"FLYWHEEL_DEPLOY_GATEWAY_MIN_CONTAINERS": "3", "FLYWHEEL_DEPLOY_GATEWAY_MAX_CONTAINERS": "2"},
            ["FLYWHEEL_DEPLOY_GATEWAY_MIN_CONTAINERS", "FLYWHEEL_DEPLOY_GATEWAY_MAX_CONTAINERS", "is 2"],
        ),
        ({"FLYWHEEL_MODAL_GPU": "none", "FLYWHEEL_MODAL_CONTEXT": "2000000000"}, ["FLYWHEEL_MODAL_CONTEXT", "MiB"]),
        (
            {"FLYWHEEL_DEPLOY_WEIGHTS": "mixtral-8x7b-instruct-q4_k_m"},
            ["does not fit A10G", "missing", "It fits L40S", "FLYWHEEL_MODAL_GPU"],
        ),
        ({"FLYWHEEL_MODAL_CONTEXT": "32768"}, ["32768 tokens x 128 KiB", "with at most 15"]),
    ],
)
def test_what_is_wrong_is_named(environment: dict[str, str], named: list[str]) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - what matters is the message
        configured(environment)
    for expected in named:
        assert expected in str(caught.value)


@pytest.mark.parametrize("text", ["nan", "inf", "-inf"])
def test_numbers_must_be_finite(text: str) -> None:
    numbers = [name for name, field in Deployment.model_fields.items() if field.annotation is float]
    assert {"gateway_cpu", "tunnel_interval"} <= set(numbers)
    for name in numbers:
        with pytest.raises(ValueError, match=f"FLYWHEEL_DEPLOY_{name.upper()}: "):
            configured({f"FLYWHEEL_DEPLOY_{name.upper()}": text})


@pytest.mark.parametrize("gpu", ["a10g", " A10G", "A10g "])
def test_a_gpu_is_the_same_however_it_is_written(gpu: str) -> None:
    assert configured({"FLYWHEEL_MODAL_GPU": gpu}).server == configured({}).server


@pytest.mark.parametrize("path", ["/", "/root", "/tmp", "weights", "/a/", "/a/../b", "//a"])  # noqa: S108 - a name
def test_modal_mounts_no_volume_where_we_refuse_to(path: str) -> None:
    """By the rule of Modal's own client."""
    with pytest.raises(modal.exception.InvalidError):
        validate_volumes({path: modal.Volume.from_name("weights")})  # type: ignore[dict-item] # it is unwrapped before
    with pytest.raises(ValueError, match="FLYWHEEL_DEPLOY_WEIGHTS_PATH: must be an absolute path"):
        configured({"FLYWHEEL_DEPLOY_WEIGHTS_PATH": path})


def test_the_name_of_an_app_leaves_room_for_the_name_of_its_dict() -> None:
    """By the rule of Modal's own client."""
    longest = "a" * 54
    assert configured({"FLYWHEEL_DEPLOY_APP": longest}).deployment.app == longest
    modal.Dict.from_name(dict_name(longest))
    with pytest.raises(modal.exception.InvalidError):
        modal.Dict.from_name(dict_name(longest + "a"))
    with pytest.raises(ValueError, match="FLYWHEEL_DEPLOY_APP: must be 1 to 54 letters, digits"):
        configured({"FLYWHEEL_DEPLOY_APP": longest + "a"})
