"""The settings of `modal deploy modal_deploy.py`: environment variables called `FLYWHEEL_DEPLOY_X`."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from flywheel_server.deployment.weights import DEFAULT_WEIGHTS, DoesNotFitError, Weights, check_fit, find
from flywheel_server.int32 import INT32_MAX
from flywheel_server.setting_texts import NONE, NoneWord, is_blank, normalized, problems_of
from flywheel_server.settings import MIN_CONTEXT, PREFIX, Address, Positive, Settings

DEPLOY_PREFIX: Final = f"{PREFIX}DEPLOY_"

MAX_STOP_SECONDS: Final = 22.0
"""Maximum seconds of `withdraw_window` and `drain_timeout` together: Modal grants 30; `deployment.gateway` shows the rest."""

MAX_APP_NAME_LENGTH: Final = 54
"""Characters. Modal allows 64 in the name of an object, and the Dict's name is the app's name and `-endpoints`."""

EXCLUDED_SETTINGS: Final = (
    "address",
    "api_keys",
    "api_keys_file",
    "engine",
    "model",
    "script",
    "tls_cert",
    "tls_client_ca",
    "tls_key",
)
"""Settings of the server that a deployment does not take from the environment of `modal deploy`.

There they belong to a client or to a local server, or name files that exist only on that machine. API keys come from a secret.
"""

MODEL_CLASS: Final = "Model"
"""The name of the Modal class in `modal_deploy.py`."""

GPU_MODEL_MEMORY_MIB: Final = 4096
"""MiB for Python, CUDA, and one or two tensors (of up to some hundred MiB) that are being copied to the GPU."""

CPU_MODEL_MEMORY_MIB: Final = 1024
"""MiB for Python and llama.cpp, in addition to the weights and the KV cache."""

Count = Annotated[int, Field(ge=0, le=INT32_MAX)]
Cores = Annotated[float, Field(ge=0.125, le=64, allow_inf_nan=False)]
MAX_MEMORY_MIB: Final = 2**20
MiB = Annotated[int, Field(ge=128, le=MAX_MEMORY_MIB)]


def _option(default: Any, description: str) -> Any:  # noqa: ANN401 - as generic as pydantic's Field
    return Field(default=default, description=description)


def _app_name(name: str) -> str:
    if not re.fullmatch(rf"[A-Za-z0-9._-]{{1,{MAX_APP_NAME_LENGTH}}}", name):
        raise ValueError(f"must be 1 to {MAX_APP_NAME_LENGTH} letters, digits, dashes, periods and underscores")
    return name


def _known_weights(name: str) -> str:
    return find(name.lower()).name


def _mount_point(path: str) -> str:
    if not re.fullmatch(r"(/[A-Za-z0-9._-]*[A-Za-z0-9_-])+", path) or path in {"/root", "/tmp"}:  # noqa: S108 - nothing is written
        raise ValueError("must be an absolute path such as /weights, and neither / nor /root nor /tmp")
    return path


class Deployment(BaseModel):
    """The settings of a deployment. The settings of the deployed server are `flywheel_server.settings.Settings`."""

    model_config = ConfigDict(frozen=True)

    app: Annotated[str, AfterValidator(_app_name)] = _option("flywheel-grpc", "The name of the app on Modal.")
    expose: Literal["tunnel", "server", "both"] = _option(
        "tunnel",
        "How callers reach the gateway: tunnel (one address for each container), server (one stable address, which Modal "
        "balances and scales) or both.",
    )
    address: Address = _option("0.0.0.0:50051", "HOST:PORT that a gateway listens on in its container.")
    routing_region: Annotated[str, Field(min_length=1)] = _option("us-east", "The region in which Modal receives calls.")
    gateway_min_containers: Count = _option(1, "Minimum number of gateways. A tunnel starts no gateway: keep at least 1.")
    gateway_max_containers: Annotated[Positive | None, NoneWord] = _option(
        None, f"Maximum number of gateways. Default, or {NONE}: no limit."
    )
    gateway_concurrency: Positive = _option(256, "Concurrent calls on a gateway above which the server starts another.")
    gateway_cpu: Cores = _option(0.5, "Cores reserved for one gateway; it may use more if they are free.")
    gateway_memory: MiB = _option(512, "MiB of memory reserved for one gateway; it may use more if it is free.")
    tunnel_interval: Annotated[float, Field(ge=0, le=86400, allow_inf_nan=False)] = _option(
        60.0, "Seconds between two probes of a gateway's own tunnel from outside. 0: no probes."
    )
    weights: Annotated[str, AfterValidator(_known_weights)] = _option(
        DEFAULT_WEIGHTS, "The weights that the Model runs: a name in `flywheel_server.deployment.weights`."
    )
    weights_path: Annotated[str, AfterValidator(_mount_point)] = _option(
        "/weights", "The path at which the Model's containers mount the volume with the weights."
    )
    model_slots: Annotated[int, Field(ge=1, le=256)] = _option(8, "Samples that one container generates at a time.")
    model_concurrency: Positive = _option(16, "Calls that one container accepts at a time. Calls beyond its slots wait in it.")
    model_min_containers: Count = _option(0, "Minimum number of containers of the Model. 0: all stop when there are no calls.")
    model_max_containers: Positive = _option(
        1, "Maximum number of containers of the Model, which are billed. Other calls wait."
    )
    model_scaledown: Annotated[int, Field(ge=2, le=3600)] = _option(
        300, "Seconds without a call after which a container of the Model stops."
    )
    model_cpu: Cores = _option(
        2.0, "Cores reserved for one container of the Model, which computes with as many threads, at least 1."
    )
    model_memory: Annotated[MiB | None, NoneWord] = _option(
        None,
        f"MiB of memory reserved for one container of the Model. Default, or {NONE}: 4096; without a GPU, 1024 in addition to "
        "the weights and the KV cache.",
    )

    @field_validator("*", mode="before")
    @classmethod
    def _normalized(cls, value: Any, info: ValidationInfo) -> Any:  # noqa: ANN401 - whatever a field is given
        return normalized(value, cls.model_fields[str(info.field_name)])

    @property
    def has_tunnels(self) -> bool:
        """Whether each gateway has a tunnel."""
        return self.expose in {"tunnel", "both"}

    @property
    def model_threads(self) -> int:
        """The maximum number of threads of a container of the Model, which may see more cores than it has reserved."""
        return max(1, int(self.model_cpu))

    @property
    def has_server(self) -> bool:
        """Whether there is a server with a stable address."""
        return self.expose in {"server", "both"}


@dataclass(frozen=True, slots=True)
class Configuration:
    """A deployment's settings, checked.

    Attributes:
        deployment: The settings of the deployment.
        server: The settings of the server in the gateways, without its API keys.
        weights: The weights that the Model runs, which fit its GPU; None if the class of another app generates.
        environment: The environment variables of the containers. In a container they give the same configuration.
    """

    deployment: Deployment
    server: Settings
    weights: Weights | None
    environment: dict[str, str]

    @property
    def model_memory(self) -> int | None:
        """MiB of memory for a container of the Model; None if this deployment has no Model."""
        if self.weights is None or self.deployment.model_memory is not None:
            return self.deployment.model_memory
        if self.server.modal_gpu:
            return GPU_MODEL_MEMORY_MIB
        fit = check_fit(self.weights, None, self.server.modal_context)
        return CPU_MODEL_MEMORY_MIB + -(-(self.weights.size_bytes + fit.kv_bytes) // 2**20)


def configured(environment: Mapping[str, str]) -> Configuration:
    """Returns the configuration that these environment variables describe. Raises `ValueError` if they are wrong."""
    try:
        deployment = Deployment(**_values_of(environment, DEPLOY_PREFIX, Deployment))
        variables = _server_environment(deployment, environment)
        # This prefix, with which no variable begins, keeps pydantic from reading the environment of this process.
        server = Settings(_env_prefix="\0", **_values_of(variables, PREFIX, Settings))
    except ValidationError as error:
        prefix, settings = (DEPLOY_PREFIX, Deployment) if error.title == Deployment.__name__ else (PREFIX, Settings)
        found = problems_of(error, settings)
        problems = [f"  {prefix}{str(location[0]).upper()}: {message}" for location, message in found]
        raise ValueError("\n".join(["Some settings are wrong:", *problems])) from None
    _check_together(deployment, server)
    if server.modal_app != deployment.app:
        return Configuration(deployment, server, None, variables)
    weights = find(deployment.weights)
    _check_model(weights, server)
    configuration = Configuration(deployment, server, weights, variables)
    if (configuration.model_memory or 0) > MAX_MEMORY_MIB:
        raise ValueError(
            f"{PREFIX}MODAL_CONTEXT: {server.modal_context} tokens need {configuration.model_memory} MiB of memory; at most "
            f"{MAX_MEMORY_MIB} can be asked for."
        )
    return configuration


def _check_together(deployment: Deployment, server: Settings) -> None:
    if server.withdraw_window + server.drain_timeout > MAX_STOP_SECONDS:
        raise ValueError(
            f"{PREFIX}DRAIN_TIMEOUT: must be at most {MAX_STOP_SECONDS:g} s together with {PREFIX}WITHDRAW_WINDOW, because "
            "Modal ends a container after 30 s."
        )
    if deployment.has_server and server.port == 0:
        raise ValueError(f"{DEPLOY_PREFIX}ADDRESS: must name a port, because Modal forwards that of a server.")
    for kind, least, most in (
        ("GATEWAY", deployment.gateway_min_containers, deployment.gateway_max_containers),
        ("MODEL", deployment.model_min_containers, deployment.model_max_containers),
    ):
        if most is not None and least > most:
            raise ValueError(
                f"{DEPLOY_PREFIX}{kind}_MIN_CONTAINERS: must be at most {DEPLOY_PREFIX}{kind}_MAX_CONTAINERS, which is {most}."
            )


def _check_model(weights: Weights, server: Settings) -> None:
    """Raises `ValueError` if the gateway would not call the Model of this deployment, or its GPU is too small."""
    if server.modal_class != MODEL_CLASS:
        raise ValueError(
            f"{PREFIX}MODAL_CLASS: must be {MODEL_CLASS}, or {PREFIX}MODAL_APP must name the app that has the class."
        )
    if server.modal_environment:
        raise ValueError(
            f"{PREFIX}MODAL_ENVIRONMENT: must not be set, unless {PREFIX}MODAL_APP names another app, because a gateway calls "
            "the Model beside it. To deploy to an environment of Modal: modal deploy -e ENVIRONMENT."
        )
    if server.modal_context < MIN_CONTEXT:
        raise ValueError(f"{PREFIX}MODAL_CONTEXT: must be at least {MIN_CONTEXT} for the Model of this deployment.")
    try:
        check_fit(weights, server.modal_gpu, server.modal_context)
    except DoesNotFitError as error:
        raise ValueError(
            f"{error}\nThe variables are {DEPLOY_PREFIX}WEIGHTS, {PREFIX}MODAL_GPU and {PREFIX}MODAL_CONTEXT."
        ) from None
    except ValueError as error:
        raise ValueError(f"{PREFIX}MODAL_GPU: {error}") from None


def relevant_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns the environment variables that `configured` reads, without blank ones."""
    names = [f"{DEPLOY_PREFIX}{name.upper()}" for name in Deployment.model_fields]
    names += [f"{PREFIX}{name.upper()}" for name in Settings.model_fields if name not in EXCLUDED_SETTINGS]
    return {name: environment[name] for name in names if not is_blank(environment.get(name))}


def _values_of(environment: Mapping[str, str], prefix: str, settings: type[BaseModel]) -> dict[str, Any]:
    names = {name: f"{prefix}{name.upper()}" for name in settings.model_fields}
    return {name: environment[variable].strip() for name, variable in names.items() if not is_blank(environment.get(variable))}


def _server_environment(deployment: Deployment, environment: Mapping[str, str]) -> dict[str, str]:
    chosen = _values_of(environment, PREFIX, Settings)
    chosen = {name: value for name, value in chosen.items() if name not in EXCLUDED_SETTINGS}
    has_own_model = chosen.get("modal_app", deployment.app) == deployment.app
    settings = {
        "engine": "flywheel",
        "address": deployment.address,
        "modal_app": deployment.app,
        # This deployment's Model already has the options that the gateway would request.
        "modal_as_deployed": str(has_own_model).lower(),
        "drain_timeout": "20",
        "log_format": "json",
        **({"model": deployment.weights} if has_own_model else {}),
        **chosen,
    }
    deployed = _values_of(environment, DEPLOY_PREFIX, Deployment)
    return {
        **{f"{PREFIX}{name.upper()}": value for name, value in settings.items()},
        **{f"{DEPLOY_PREFIX}{name.upper()}": value for name, value in deployed.items()},
        # grpc reads these two when it is imported; see flywheel_server.serve_command.
        "GRPC_EXPERIMENTS": "-event_engine_listener",
        "GRPC_VERBOSITY": "ERROR",
        # Seconds. By default, Modal's client waits for as long as Modal throttles it, and the caller gets no error.
        "MODAL_MAX_THROTTLE_WAIT": "0",
    }
