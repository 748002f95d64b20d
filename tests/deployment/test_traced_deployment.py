"""The settings of traces in a deployment."""

import pytest

from tests.deployment.conftest import deploy
from tests.modal_cloud import ModalCloud


@pytest.mark.thorough
def test_the_variables_of_opentelemetry_arrive_as_a_secret(prepared: ModalCloud) -> None:
    done = deploy(
        prepared,
        "traced",
        FLYWHEEL_DEPLOY_GATEWAY_MIN_CONTAINERS="0",
        FLYWHEEL_OTLP_ENDPOINT="https://receiver.example:4317",
        OTEL_EXPORTER_OTLP_HEADERS="authorization=Bearer%20KEY",
    )
    assert done.returncode == 0, done.stderr
    gateway, model = (prepared.function(f"traced/{name}") for name in ("Gateway", "Model"))
    assert len(gateway.secret_ids) == 3  # the keys, the environment, and these
    assert {*gateway.secret_ids} & {*model.secret_ids}
