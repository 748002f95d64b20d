"""What `modal deploy modal_deploy.py` takes from the environment, each as `FLYWHEEL_DEPLOY_X`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from flywheel_server.deployment.weights import DEFAULT, Weights, check_fit, find
from flywheel_server.settings import PREFIX, Settings, host_and_port

DEPLOY_PREFIX: Final = f"{PREFIX}DEPLOY_"

MAX_STOP_TIME: Final = 22.0
"""Seconds. The rest of the 30 that Modal grants is for withdrawing the address before, and for cancelling and closing after."""

NOT_FROM_THE_SHELL: Final = (
    "address",
    "api_keys",
    "api_keys_file",
    "engine",
    "model",
    "tls_cert",
    "tls_client_ca",
    "tls_key",
)
"""Settings that mean something else where one deploys: those of the client, or of a server there, and files that only it has.

The keys are in a secret.
"""

Count = Annotated[int, Field(ge=0)]


def _option(default: Any, description: str) -> Any:  # noqa: ANN401 - as generic as pydantic's Field
    return Field(default=default, description=description)


class Deployment(BaseModel):
    """The settings of a deployment. Those of the server that it deploys are the server's own `FLYWHEEL_X`."""

    model_config = ConfigDict(frozen=True)

    app: str = _option("flywheel-grpc", "The name of the app on Modal.")
    expose: Literal["tunnel", "server", "both"] = _option(
        "tunnel",
        "How callers reach the gateway: tunnel (an address for each container), server (a stable one, balanced and scaled by "
        "Modal) or both.",
    )
    address: Annotated[str, AfterValidator(host_and_port)] = _option(
        "0.0.0.0:50051", "HOST:PORT that a gateway listens on in its container."
    )
    routing_region: str = _option("us-east", "Where Modal takes in the calls of the server.")
    gateway_min_containers: Count = _option(1, "Gateways that run always. A tunnel does not start one: keep at least 1.")
    gateway_max_containers: Annotated[int, Field(ge=1)] | None = _option(None, "Gateways that run at most. Default: no limit.")
    gateway_concurrency: Annotated[int, Field(ge=1)] = _option(
        256, "Calls on one gateway beyond which the server starts another."
    )
    weights: str = _option(DEFAULT, "What the Model runs: a name of `flywheel_server.deployment.weights`.")
    weights_path: str = _option("/weights", "Where its containers see the volume with the weights.")
    model_slots: Annotated[int, Field(ge=1, le=256)] = _option(8, "Samples that one container generates at a time.")
    model_concurrency: Annotated[int, Field(ge=1)] = _option(
        16, "Calls that one container takes in; those beyond its slots wait in it, and are next."
    )
    model_min_containers: Count = _option(0, "Containers with a GPU that run always. 0 lets all stop when nobody calls.")
    model_max_containers: Annotated[int, Field(ge=1)] | None = _option(
        None, "Containers with a GPU that run at most. Default: no limit."
    )
    model_scaledown: Annotated[int, Field(ge=2, le=3600)] = _option(
        300, "Seconds without a call after which a container with a GPU stops."
    )

    @property
    def tunnelled(self) -> bool:
        """Whether each gateway has a tunnel."""
        return self.expose in {"tunnel", "both"}

    @property
    def served(self) -> bool:
        """Whether there is a server with a stable address."""
        return self.expose in {"server", "both"}


@dataclass(frozen=True, slots=True)
class Configuration:
    """All that a deployment is made from.

    Attributes:
        deployment: What is deployed.
        server: The settings of the server in it, without its API keys.
        weights: What the Model runs, which fit its GPU; None where the class of another app generates.
        environment: The variables of the containers. In a container they lead to the same configuration again.
    """

    deployment: Deployment
    server: Settings
    weights: Weights | None
    environment: dict[str, str]


def configured(environment: Mapping[str, str]) -> Configuration:
    """Returns the configuration that the variables of the environment describe; raises `ValueError` where they are wrong."""
    try:
        deployment = Deployment(**_own(environment, DEPLOY_PREFIX, Deployment))
        variables = _server_environment(deployment, environment)
        server = Settings(**_own(variables, PREFIX, Settings))
    except ValidationError as error:
        prefix = DEPLOY_PREFIX if error.title == Deployment.__name__ else PREFIX
        found = error.errors(include_url=False, include_input=False)
        problems = [f"  {prefix}{str(item['loc'][0]).upper()}: {item['msg']}" for item in found]
        raise ValueError("\n".join(["Some settings are wrong:", *problems])) from None
    if server.withdraw_window + server.drain_timeout > MAX_STOP_TIME:
        raise ValueError(
            f"{PREFIX}DRAIN_TIMEOUT: must be at most {MAX_STOP_TIME:g} s together with {PREFIX}WITHDRAW_WINDOW, because Modal "
            "ends a container after 30 s."
        )
    if deployment.served and server.port == 0:
        raise ValueError(f"{DEPLOY_PREFIX}ADDRESS: must name a port, because Modal forwards that of a server.")
    if server.modal_app != deployment.app:
        return Configuration(deployment, server, None, variables)
    weights = find(deployment.weights)
    check_fit(weights, server.modal_gpu, server.modal_context)
    return Configuration(deployment, server, weights, variables)


def _own(environment: Mapping[str, str], prefix: str, settings: type[BaseModel]) -> dict[str, Any]:
    names = {name: f"{prefix}{name.upper()}" for name in settings.model_fields}
    return {name: environment[variable] for name, variable in names.items() if variable in environment}


def _server_environment(deployment: Deployment, environment: Mapping[str, str]) -> dict[str, str]:
    given = _own(environment, PREFIX, Settings)
    for name in NOT_FROM_THE_SHELL:
        given.pop(name, None)
    ours = given.get("modal_app", deployment.app) == deployment.app
    settings = {
        "engine": "flywheel",
        "address": deployment.address,
        "modal_app": deployment.app,
        # A Model of ours is deployed with the options that the gateway would ask for.
        "modal_as_deployed": str(ours).lower(),
        "drain_timeout": "20",
        "log_format": "json",
        **({"model": deployment.weights} if ours else {}),
        **given,
    }
    deployed = _own(environment, DEPLOY_PREFIX, Deployment)
    return {
        **{f"{PREFIX}{name.upper()}": value for name, value in settings.items()},
        **{f"{DEPLOY_PREFIX}{name.upper()}": value for name, value in deployed.items()},
        # Read when grpc is imported; see flywheel_server.__main__.
        "GRPC_EXPERIMENTS": "-event_engine_listener",
        "GRPC_VERBOSITY": "ERROR",
        # Seconds. By default Modal's client waits for as long as it is throttled, and the caller learns nothing.
        "MODAL_MAX_THROTTLE_WAIT": "5",
    }
