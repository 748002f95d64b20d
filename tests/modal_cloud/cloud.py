"""Modal's cloud on this machine, as tests use it."""

import asyncio
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Coroutine
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypedDict, TypeVar, Unpack

from grpclib import Status
from modal_proto import api_pb2

from tests.modal_cloud.apps import Apps
from tests.modal_cloud.calls import Calls
from tests.modal_cloud.container import Container
from tests.modal_cloud.control_plane import ControlPlane
from tests.modal_cloud.faults import Fault, Side
from tests.modal_cloud.fleet import Fleet
from tests.modal_cloud.images import Images
from tests.modal_cloud.launching import Launcher
from tests.modal_cloud.queues import Queues
from tests.modal_cloud.registry import Lifetime
from tests.modal_cloud.state import Call
from tests.modal_cloud.storage import Storage
from tests.modal_cloud.tunnels import Certificates, Tunnel, Tunnels
from tests.modal_cloud.web import fetch

Result = TypeVar("Result")


class FaultOptions(TypedDict, total=False):
    """The attributes of a `Fault`, except for the names of the RPCs."""

    side: Side
    status: Status | None
    message: str
    delay: float
    share: float
    times: int | None
    per_second: float | None
    retry_after: float | None
    of_answers: bool


class ModalCloud:
    """A stand-in of Modal's cloud, behind the real client and the real container entry point.

    It runs on an event loop in a thread of its own, and lets each connection have `max_streams` RPCs at a time. Its methods are
    called from any other thread, and raise TimeoutError where something takes longer than it says. They take the name of a
    class, a function or a server, as `name` of the app that was deployed last, or as `app/name`; they raise KeyError where
    there is none.
    """

    def __init__(self, directory: Path, max_streams: int = 10_000) -> None:
        self._directory = directory.resolve()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="modal-cloud", daemon=True)
        self._certificates = Certificates()
        self._lifetime = Lifetime()
        self._storage = Storage(self._directory, self._lifetime)
        self._queues = Queues(self._lifetime)
        self._images = Images(self._storage, self._directory / "images")
        self._launcher = Launcher(self._directory, self._storage, self._images)
        self._fleet = Fleet(self._launcher)
        self._apps = Apps(self._fleet, self._certificates)
        self._calls = Calls(self._apps.functions, self._fleet)
        self._tunnels = Tunnels(self._certificates)
        rooms = (self._storage, self._queues, self._images, self._apps, self._calls, self._tunnels)
        self._control_plane = ControlPlane(rooms, self._live, max_streams)

    def __enter__(self) -> Self:
        self._thread.start()
        self._run(self._start())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._run(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _start(self) -> None:
        await self._storage.start()
        await self._control_plane.start()
        self._launcher.server_url = self._control_plane.url_for_containers

    async def _stop(self) -> None:
        await self._fleet.stop()
        await self._control_plane.stop()
        await self._storage.stop()
        for function in self._apps.functions.values():
            if function.relay is not None:
                function.relay.close()
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    def _run(self, work: Coroutine[Any, Any, Result], timeout: float = 60.0) -> Result:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout)

    def _live(self, task_id: str) -> Container | None:
        return next((container for container in self._fleet.live if container.task_id == task_id), None)

    @property
    def directory(self) -> Path:
        """Where everything of this cloud is kept; volumes are mounted nowhere else."""
        return self._directory

    # For clients

    @property
    def environ(self) -> dict[str, str]:
        """The environment variables with which a client process finds this cloud."""
        return {
            "MODAL_SERVER_URL": self._control_plane.url,
            "MODAL_TOKEN_ID": "ak-stand-in",
            "MODAL_TOKEN_SECRET": "as-stand-in",
            "MODAL_CONFIG_PATH": str(self._directory / "no-modal.toml"),
            "NO_PROXY": "127.0.0.1,localhost",
            "NO_COLOR": "1",
            "COLUMNS": "200",
        }

    def cli(
        self, *arguments: str, env: dict[str, str] | None = None, cwd: Path | None = None, timeout: float = 120.0
    ) -> subprocess.CompletedProcess[str]:
        """Runs the `modal` command."""
        environ = {name: value for name, value in os.environ.items() if not name.startswith("MODAL_")}
        return subprocess.run(
            [sys.executable, "-m", "modal", *arguments],
            env={**environ, **self.environ, **(env or {})},
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    @property
    def ca_certificate(self) -> bytes:
        """The certificate (PEM) of the authority that signs the certificates of the relays."""
        return self._certificates.authority

    # What there is

    def create_secret(self, name: str, values: dict[str, str], environment: str = "") -> None:
        self._storage.secrets.put(dict(values), name, environment)

    def replace_secret(self, name: str, values: dict[str, str]) -> None:
        """Changes the values of a secret, as for apps that were deployed with it."""
        secret = self._storage.secrets[self._storage.secrets.named(name)]
        secret.clear()
        secret.update(values)

    def volume_dir(self, name: str) -> Path:
        """Returns the directory of the named volume."""
        return self._storage.volume_directory(name)

    def tags(self, app: str) -> dict[str, str]:
        """Returns the tags of the app of this name, as they arrived at deployment."""
        return dict(self._apps.app_named(app).tags)

    @property
    def dicts(self) -> list[str]:
        """The names of the dicts that have one."""
        return [record.name for record in self._storage.dicts if record.name]

    @property
    def ephemeral_lifetime(self) -> float:
        """Seconds without a heartbeat after which ephemeral queues, dicts and volumes are gone; counts from the next one."""
        return self._lifetime.seconds

    @ephemeral_lifetime.setter
    def ephemeral_lifetime(self, seconds: float) -> None:
        self._lifetime.seconds = seconds

    def expire_ephemeral(self) -> None:
        """Removes all ephemeral queues, dicts and volumes, as if their heartbeats had not come for too long."""

        async def expire() -> None:
            for registry in (self._queues.registry, self._storage.dicts, self._storage.volumes):
                registry.expire()

        self._run(expire())

    def printed(self, since: float) -> str:
        """Returns what all containers have printed since that time, in seconds since the epoch."""
        return "".join(
            f"[{app.description} {batch.task_id}] {log.data}"
            for app in self._apps.apps()
            for batch in list(app.logs)
            for log in batch.items
            if log.timestamp >= since
        )

    @property
    def functions(self) -> dict[str, api_pb2.Function]:
        """The definitions by tag, as they arrived at deployment."""
        return {tag: function.definition for tag, function in self._apps.by_tag().items()}

    def function(self, name: str) -> api_pb2.Function:
        """Returns the definition as it arrived at deployment."""
        return self._apps.named(name).definition

    def image_commands(self, name: str) -> list[str]:
        """Returns the Dockerfile commands of the function's image, after the commands of the images that it is based on."""
        return self._images.commands(self.function(name).image_id)

    def mounted_files(self, name: str) -> set[str]:
        """Returns the absolute names of the files in the function's containers."""
        definition = self.function(name)
        mount_ids = (*definition.mount_ids, *self._images.context_mounts(definition.image_id))
        return {file for mount_id in mount_ids for file in self._storage.mounted(mount_id)}

    @property
    def tunnels(self) -> list[Tunnel]:
        return list(self._tunnels.all)

    @property
    def calls(self) -> list[Call]:
        return list(self._calls.all)

    @property
    def cancelled(self) -> list[str]:
        """The ids of the function calls whose cancellation was asked for."""
        return list(self._calls.cancelled)

    @property
    def rpcs(self) -> Counter[str]:
        """How many RPCs arrived, by name."""
        return self._control_plane.rpcs

    @property
    def unimplemented(self) -> set[str]:
        """The RPCs that arrived and are not played."""
        return self._control_plane.unimplemented

    def address(self, name: str) -> str:
        """Returns HOST:PORT of the server's relay."""
        return self._apps.named(name).url.removeprefix("https://")

    # Containers

    def containers(self, name: str) -> list[Container]:
        """Returns the live containers of the function and its variants."""
        family = self._apps.family(name)
        return [container for container in list(self._fleet.live) if container.function in family]

    def start_container(self, name: str) -> Container:
        async def start() -> Container:
            return self._fleet.start(self._apps.named(name))

        return self._run(start())

    def scale_to_zero(self, name: str) -> None:
        """Ends the idle containers of the function and its variants, and waits until they have ended."""

        async def end() -> None:
            idle = [container for container in self.containers(name) if not container.inputs]
            for container in idle:
                container.drain()
            await self._fleet.ended(idle)

        self._run(end())

    @property
    def reschedules_inputs(self) -> bool:
        """Whether inputs of a container that is lost run again in another one, as on Modal, or fail."""
        return self._fleet.reschedules

    @reschedules_inputs.setter
    def reschedules_inputs(self, reschedules: bool) -> None:
        self._fleet.reschedules = reschedules

    @property
    def replaces_containers(self) -> bool:
        """Whether a container that is lost is replaced if its function keeps some warm, as on Modal."""
        return self._fleet.replaces

    @replaces_containers.setter
    def replaces_containers(self, replaces: bool) -> None:
        self._fleet.replaces = replaces

    # Faults

    def set_stats(self, backlog: int | None, runners: int = 0) -> None:
        """Has `get_current_stats` answer this, or the truth with None."""
        self._calls.stats = None if backlog is None else (backlog, runners)

    def set_clock(self, name: str, seconds: float) -> None:
        """Sets the wall clock wrong in containers of an app, or of one function (`app/name`), that start from now on."""
        self._launcher.clocks.set(name, seconds)

    def down(self) -> None:
        """Closes the connections, and refuses new ones; containers go on, but reach nothing outside themselves."""
        self._run(self._control_plane.down())

    def up(self) -> None:
        self._run(self._control_plane.up())

    def disturb(self, *rpcs: str, **fault: Unpack[FaultOptions]) -> Fault:
        """Has something befall the named RPCs, or all if none is named, until the end of the fault or `calm()`; see `Fault`."""
        return self._control_plane.faults.add(Fault(frozenset(rpcs), **fault))

    def calm(self) -> None:
        """Ends all that was set by `disturb`."""
        self._control_plane.faults.clear()

    def limit(self, *rpcs: str, per_second: float = 0.0, retry_after: float | None = None, side: Side = "clients") -> Fault:
        """Limits the rate of RPCs as Modal does: further RPCs get RESOURCE_EXHAUSTED, which may say when to repeat them."""
        return self.disturb(
            *rpcs,
            status=Status.RESOURCE_EXHAUSTED,
            message="rate limit exceeded",
            per_second=per_second or None,
            retry_after=retry_after,
            side=side,
        )

    def web_get(self, name: str, path: str, timeout: float = 60.0) -> tuple[int, dict[str, str], bytes]:
        """Returns the status, the headers and the body of a GET to a web function."""
        return self._run(fetch(self._calls, self._apps.named(name), path), timeout)
