"""Deploys the service on Modal: `modal deploy modal_deploy.py`. docs/modal.md explains it step by step.

    Gateway         the gRPC server in a container, behind a tunnel of its own
    GatewayServer   the gRPC server behind one stable address, which Modal balances and scales
    endpoints       a public HTTPS page with the addresses of the gateways
    Model           llama.cpp on a GPU, with the methods of MK1 Flywheel's class
    fetch_weights   downloads the weights of the Model into its volume: `modal run modal_deploy.py::fetch_weights`

The settings are environment variables of this command; `flywheel_server.deployment.settings` defines them.
"""

import os
import sys
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import modal
from flywheel_proto._extras import loading
from modal.config import config

with loading("modal_deploy.py"):
    from flywheel_server.deployment.gateway_settings import KEYS_SECRET, KEYS_VARIABLE, create_secret_commands, gateway_settings
    from flywheel_server.deployment.redeployment import (
        ALWAYS_TAGGED,
        APP_VARIABLE,
        refusal_message,
        tags,
        unconfirmed_changes,
        unknown_app_message,
    )
    from flywheel_server.deployment.settings import configured, relevant_variables
    from flywheel_server.deployment.signature import takes_fields
    from flywheel_server.deployment.weights import find_gpu
    from flywheel_server.messages import CONSTRAINT_FIELDS

if TYPE_CHECKING:
    from flywheel_server.deployment.gateway import GatewayThread
    from flywheel_server.deployment.model import RemoteModel
    from flywheel_server.deployment.supervised import SupervisedEngine

VOLUME = "flywheel-grpc-weights"
PYTHON = "3.12"
CUDA_IMAGE = "nvidia/cuda:12.8.1-devel-ubuntu22.04"
SOURCES = ("flywheel_proto", "flywheel_server", "flywheel_client")
# By default Modal copies only Python files, but the gRPC service config is JSON.
IGNORED_FILES = ~modal.FilePatternMatcher("**/*.py", "**/*.json")
LOCKS = Path(__file__).parent / "requirements"

try:
    # In a container, the environment has the configuration of the deployment.
    configuration = configured(os.environ)
except ValueError as error:
    sys.exit(str(error))
deployment, settings = configuration.deployment, configuration.server
environment: dict[str, str | None] = {**configuration.environment}

keys = modal.Secret.from_name(KEYS_SECRET, required_keys=[KEYS_VARIABLE])
# The rest of OpenTelemetry's configuration, which may have a key of the receiver. In a container, the secret sets it.
otel_variables = {name: value for name, value in os.environ.items() if settings.otlp_endpoint and name.startswith("OTEL_")}
otel = [modal.Secret.from_dict({**otel_variables})] if otel_variables else []
app = modal.App(deployment.app, tags=tags(configuration, os.environ))


def check_secret() -> None:
    """Exits with a message if there is no secret with API keys."""
    try:
        keys.hydrate()
    except modal.exception.NotFoundError as error:
        environment = config.get("environment") or ""
        sys.exit(
            f'There is no modal.Secret "{KEYS_SECRET}" with {KEYS_VARIABLE} in it, so nothing was done. ({error})\n'
            "The gateway is on the open Internet, so it accepts only callers with a key. Make a key, and note it for your "
            f"callers:\n\n{create_secret_commands(environment, replace=has_secret_without_keys())}"
        )


def has_secret_without_keys() -> bool:
    """Returns whether there is a secret of that name, whatever it contains."""
    try:
        modal.Secret.from_name(KEYS_SECRET).hydrate()
    except modal.exception.NotFoundError:
        return False
    return True


def check_command(verb: str, options: list[str]) -> None:
    """Exits with a message if the command would start further gateways, or deploy under a name that gateways do not know."""
    if verb == "serve" or (verb == "run" and not any(option.endswith("::fetch_weights") for option in options)):
        sys.exit(
            f"modal {verb} would start a second gateway, and clients of the app {deployment.app} would find its address. Use "
            f"`modal deploy`, with another {APP_VARIABLE} to try something out, or `modal run modal_deploy.py::fetch_weights`."
        )
    if verb == "deploy" and any(option.partition("=")[0] == "--name" for option in options):
        sys.exit(
            "The gateway would not know a name that is given with --name. "
            f"Use {APP_VARIABLE}=NAME instead. Nothing was deployed."
        )


def check_class() -> None:
    """Exits with a message if the gateway would call a class of another app, and that class does not exist."""
    environment = settings.modal_environment or config.get("environment") or ""
    try:
        modal.Cls.from_name(settings.modal_app, settings.modal_class, environment_name=environment or None).hydrate()
    except (modal.exception.NotFoundError, modal.exception.InvalidError) as error:
        sys.exit(
            f"FLYWHEEL_MODAL_APP is {settings.modal_app}, and Modal has no class {settings.modal_class} in an app of that name"
            f"{f' in the environment {environment}' if environment else ''}, so nothing was deployed: {error}\n"
            f"To deploy a Model of ours, leave FLYWHEEL_MODAL_APP unset."
        )


def check_redeployment(command: list[str]) -> None:
    """Exits with a message if the command would change settings of the app whose variables are not set."""
    try:
        running = modal.App.lookup(deployment.app).get_tags()
    except modal.exception.NotFoundError:
        return
    except modal.exception.Error as error:
        sys.exit(f"Modal does not say with which settings the app {deployment.app} runs, so nothing was done: {error}")
    changes = unconfirmed_changes(running, os.environ)
    if "run" in command[1:2] and ALWAYS_TAGGED[0] not in {change.variable for change in changes}:
        return  # fetch_weights, with the same weights
    if changes:
        sys.exit(refusal_message(deployment.app, changes, command, os.environ))
    if not relevant_variables(running) and (message := unknown_app_message(deployment.app, configuration, command, os.environ)):
        sys.exit(message)


if modal.is_local() and sys.argv[1:2] and sys.argv[1] in {"deploy", "run", "serve"}:
    check_command(sys.argv[1], sys.argv[2:])
    try:
        check_secret()
        if sys.argv[1] == "deploy" and configuration.weights is None:
            check_class()
    except modal.exception.ConnectionError as error:
        sys.exit(f"{error} Nothing was done.")  # Modal's client has tried for a minute
    except modal.exception.Error:
        pass  # the following requests fail too, with better messages
    check_redeployment([sys.argv[0] if Path(sys.argv[0]).name == "modal" else "modal", *sys.argv[1:]])


def locked(image: modal.Image, lock: str, options: str = "--only-binary :all:") -> modal.Image:
    """Returns the image with the packages of a lock file, in the locked versions, with their hashes checked."""
    return image.pip_install_from_requirements(str(LOCKS / lock), extra_options=f"--no-deps --require-hashes {options}")


slim_image = modal.Image.debian_slim(PYTHON)
gateway_packages = locked(slim_image, "modal-gateway.txt")
page_image = gateway_packages.add_local_python_source(*SOURCES, ignore=IGNORED_FILES)
gateway_image = (
    gateway_packages.add_local_python_source(*SOURCES, copy=True, ignore=IGNORED_FILES)
    .workdir("/root")
    .run_commands(
        "python -m flywheel_server.deployment.gateway_settings",
        env={**environment, "MODAL_ENVIRONMENT": config.get("environment") or ""},
        secrets=[keys],
        force_build=True,  # Modal does not rebuild an image when a secret changes
    )
)


class Serving:
    """Starts and stops the server of a gateway; base class of both gateway classes."""

    gateway: "GatewayThread"

    def serve(self, tunnelled_app: str | None) -> None:
        """Starts the server, and returns when it can be reached.

        Arguments:
            tunnelled_app: The app for which to publish a tunnel; None if Modal itself forwards the port.
        """
        from flywheel_server.deployment.gateway import GatewayThread

        self.gateway = GatewayThread(gateway_settings(), tunnelled_app, deployment.tunnel_interval)
        self.gateway.start()

    @modal.exit()
    def stop(self) -> None:
        """Withdraws the address, and lets running calls finish."""
        self.gateway.stop()


if deployment.has_tunnels:

    @app.cls(
        image=gateway_image,
        env=environment,
        secrets=[keys, *otel],
        cpu=deployment.gateway_cpu,
        memory=deployment.gateway_memory,
        min_containers=deployment.gateway_min_containers,
        max_containers=deployment.gateway_max_containers,
        startup_timeout=120,
    )
    class Gateway(Serving):
        """The server on a port that is tunnelled to the Internet."""

        @modal.enter()
        def start(self) -> None:
            """Starts the server, and publishes the address of its tunnel."""
            self.serve(deployment.app)

        @modal.method()
        def ping(self) -> None:
            """Does nothing. Without a method, Modal might not keep containers of the class warm."""


if deployment.has_server:

    @app.server(
        image=gateway_image,
        env=environment,
        secrets=[keys, *otel],
        cpu=deployment.gateway_cpu,
        memory=deployment.gateway_memory,
        min_containers=deployment.gateway_min_containers,
        max_containers=deployment.gateway_max_containers,
        target_concurrency=deployment.gateway_concurrency,
        port=settings.port,
        h2_enabled=True,
        unauthenticated=True,  # at Modal's proxy: gRPC clients send an API key instead
        exit_grace_period=30,
        startup_timeout=120,
        routing_region=deployment.routing_region,
    )
    class GatewayServer(Serving):
        """The server on a port that Modal forwards, balances and scales."""

        @modal.enter()
        def start(self) -> None:
            """Starts the server."""
            self.serve(None)


@app.function(image=page_image, env=environment, max_containers=1)
@modal.concurrent(max_inputs=100)
@modal.asgi_app()
def endpoints() -> Any:  # noqa: ANN401 - an ASGI application
    """Returns the addresses of the gateways, without authentication: `{"endpoints": [{"address": "HOST:PORT", …}]}`."""
    from flywheel_client import ModalDirectory
    from flywheel_server.deployment.page import json_page

    # One directory for all requests: it compares each read with earlier ones, to see which records still change.
    return json_page(ModalDirectory(deployment.app).endpoints)


if configuration.weights is not None:
    weights = configuration.weights
    volume = modal.Volume.from_name(VOLUME, create_if_missing=True)
    volumes: dict[str | PurePosixPath, modal.Volume | modal.CloudBucketMount] = {deployment.weights_path: volume}
    if settings.modal_gpu:
        # PyPI has no wheel of xllamacpp with CUDA, so the image builds it from the sources of the same release.
        cuda_image = (
            modal.Image.from_registry(CUDA_IMAGE, add_python=PYTHON)
            .entrypoint([])  # NVIDIA's entry point prints a banner
            .apt_install("build-essential", "cmake")
            .env(
                {
                    "CC": "gcc",  # not the compiler with which the added Python was built
                    "CXX": "g++",
                    "XLLAMACPP_BUILD_CUDA": "1",
                    "XLLAMACPP_RELEASE": "1",  # the build machine may have another CPU than the container
                    "CUDA_ARCHITECTURES": str(find_gpu(settings.modal_gpu)[0].architecture),
                    # Leaves out features for which the build would download further sources. LLGuidance also needs Rust.
                    "CMAKE_ARGS": "-DLLAMA_LLGUIDANCE=OFF -DLLAMA_BUILD_BORINGSSL=OFF -DLLAMA_USE_PREBUILT_UI=OFF "
                    "-DGGML_CUDA_NCCL=OFF",
                }
            )
        )
        # By default pip downloads build tools in their newest versions, without hashes.
        build_image = locked(cuda_image, "modal-build.txt")
        model_image = locked(build_image, "modal-model.txt", "--no-binary xllamacpp --no-build-isolation")
    else:
        model_image = locked(slim_image, "modal-model.txt")
    model_image = model_image.add_local_python_source(*SOURCES, ignore=IGNORED_FILES)
    # A conversation needs the chat template, and a constraint needs LLGuidance, which the build for CUDA leaves out.
    refused_fields = [
        *(["messages"] if settings.modal_prompt == "raw" else []),
        *(CONSTRAINT_FIELDS if settings.modal_gpu else []),
    ]

    @app.cls(
        image=model_image,
        env=environment,
        secrets=otel,
        gpu=settings.modal_gpu,
        volumes=volumes,
        cpu=deployment.model_cpu,
        memory=configuration.model_memory,
        timeout=settings.modal_timeout,
        min_containers=deployment.model_min_containers,
        max_containers=deployment.model_max_containers,
        scaledown_window=deployment.model_scaledown,
        startup_timeout=1200,
    )
    @modal.concurrent(max_inputs=deployment.model_concurrency)
    class Model:
        """Generates on a GPU. `generate` has the arguments and the result of MK1 Flywheel's `generate`."""

        engine: "SupervisedEngine"
        remote: "RemoteModel"

        @modal.enter()
        async def load(self) -> None:
            """Loads the weights into the GPU's memory, and generates a first token."""
            from flywheel_server.deployment.model import RemoteModel, start_engine

            self.engine = await start_engine(weights, deployment, settings)
            self.remote = RemoteModel(self.engine, settings.otlp_endpoint)

        @modal.exit()
        async def unload(self) -> None:
            """Ends the running calls, tells their gateways, and stops the engine."""
            await self.remote.leave()
            await self.engine.__aexit__()
            await self.remote.stop_tracing()

        @modal.method()
        @takes_fields(refused=refused_fields)
        async def generate(self, /, **fields: Any) -> dict[str, Any]:  # noqa: ANN401 - RemoteModel checks them
            """Returns the samples of a request. The keyword arguments are the fields of `GenerationRequest`."""
            return await self.remote.generate(**fields)

        @modal.method()
        @takes_fields("queue", "partition", "call", refused=refused_fields)
        async def generate_deltas(self, /, **arguments: Any) -> dict[str, Any]:  # noqa: ANN401 - as above
            """Sends the samples of a request to a queue while they are generated."""
            return await self.remote.generate_deltas(**arguments)

        @modal.method()
        @takes_fields(refused=refused_fields)
        async def tokenize(self, /, **fields: Any) -> dict[str, Any]:  # noqa: ANN401 - as above
            """Returns the tokens of the prompt of a request."""
            return await self.remote.tokenize(**fields)

    # The token of the Hugging Face hub, for gated or private weights.
    hub_token = [modal.Secret.from_dict({"HF_TOKEN": os.environ["HF_TOKEN"]})] if os.environ.get("HF_TOKEN") else []
    hub_image = (
        locked(slim_image, "modal-hub.txt")
        .env(
            {
                "HF_XET_HIGH_PERFORMANCE": "1",
                # By default the buffer is a share of the machine's memory, of which the container has only a small part.
                "HF_XET_RECONSTRUCTION_DOWNLOAD_BUFFER_SIZE": "3gb",
                "HF_XET_RECONSTRUCTION_DOWNLOAD_BUFFER_LIMIT": "4gb",
            }
        )
        .add_local_python_source(*SOURCES, ignore=IGNORED_FILES)
    )
    # A separate app, because `modal run` on the main app would start gateways.
    weights_app = modal.App(f"{deployment.app}-weights")

    @weights_app.function(
        image=hub_image, env=environment, secrets=hub_token, volumes=volumes, cpu=4, memory=6144, timeout=4 * 3600
    )
    def fetch_weights() -> None:
        """Downloads the weights of the Model into its volume, unless the volume has them."""
        from flywheel_server.deployment.download import fetch

        fetch(weights, Path(deployment.weights_path), print)
        volume.commit()
