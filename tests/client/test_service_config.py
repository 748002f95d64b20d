"""The service config beside the contract: the same for every language, installed with the stubs, and what our client sends."""

import json
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import grpc
import pytest
from flywheel_client import SERVICE_CONFIG
from flywheel_client._channel import ANY_HEALTH_OPTIONS, ENDPOINT_OPTIONS, SERVING_ONLY_OPTIONS
from flywheel_proto.v1 import generation_pb2

ROOT = Path(__file__).parents[2]
FILE = ROOT / "proto" / "flywheel" / "v1" / "generation_grpc_service_config.json"
CONFIG: dict[str, Any] = json.loads(FILE.read_text())
SERVICES = {service.full_name: set(service.methods_by_name) for service in generation_pb2.DESCRIPTOR.services_by_name.values()}

RETRY_POLICY = {"maxAttempts", "initialBackoff", "maxBackoff", "backoffMultiplier", "retryableStatusCodes"}
DURATION = re.compile(r"\d+(\.\d{1,9})?s")
MOST_ATTEMPTS = 5
"""The most attempts that an implementation makes, even if the config asks for more (gRFC A6)."""


def test_stubs_of_your_own_get_the_file() -> None:
    assert json.loads(SERVICE_CONFIG) == CONFIG


@pytest.mark.parametrize("options", [SERVING_ONLY_OPTIONS, ANY_HEALTH_OPTIONS], ids=["serving only", "any health"])
def test_channels_of_the_client_have_all_of_the_file_but_the_retries_which_are_its_own(options: dict[str, str]) -> None:
    config = json.loads(options["grpc.service_config"])
    assert {key: config[key] for key in config if key != "methodConfig"} == {
        key: CONFIG[key] for key in CONFIG if key != "methodConfig"
    }
    assert not [method for method in config["methodConfig"] if "retryPolicy" in method]


def test_a_channel_to_one_endpoint_of_a_directory_balances_nothing() -> None:
    assert json.loads(str(ENDPOINT_OPTIONS["grpc.service_config"])).keys() == {"methodConfig"}


def test_every_implementation_can_read_it() -> None:
    assert CONFIG.keys() == {"loadBalancingConfig", "healthCheckConfig", "methodConfig"}
    assert CONFIG["loadBalancingConfig"] == [{"round_robin": {}}], "the policy that looks at health in every language"
    assert CONFIG["healthCheckConfig"]["serviceName"] in SERVICES
    for method in CONFIG["methodConfig"]:
        assert method.keys() == {"name", "retryPolicy"}, "the caller sets the deadline, and not the config"
        policy = method["retryPolicy"]
        assert policy.keys() == RETRY_POLICY, "Java refuses a policy in which one of these fields is missing"
        assert 1 < policy["maxAttempts"] <= MOST_ATTEMPTS
        assert all(DURATION.fullmatch(policy[key]) for key in ("initialBackoff", "maxBackoff"))
        assert policy["backoffMultiplier"] > 0
        assert {getattr(grpc.StatusCode, code) for code in policy["retryableStatusCodes"]}


def test_it_holds_for_all_methods_of_the_contract() -> None:
    assert [name for method in CONFIG["methodConfig"] for name in method["name"]] == [{"service": name} for name in SERVICES]


def test_it_repeats_what_the_contract_lets_anybody_repeat_by_its_status_alone() -> None:
    (method,) = CONFIG["methodConfig"]
    assert set(method["retryPolicy"]["retryableStatusCodes"]) == {"UNAVAILABLE", "CANCELLED"}


def test_the_distributions_have_it(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--directory", tmp_path], cwd=ROOT, check=True, capture_output=True
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as files:
        assert json.loads(files.read(f"flywheel_proto/v1/{FILE.name}")) == CONFIG
    (source,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(source) as files:
        names = {name.partition("/")[2] for name in files.getnames()}
    assert {f"proto/flywheel/v1/{FILE.name}", f"proto/flywheel_proto/v1/{FILE.name}"} <= names
