"""What a container is started with: its files, its volumes, its environment, its arguments."""

import os
import shlex
import string
import subprocess
import sys
from pathlib import Path

from grpclib import GRPCError, Status
from modal_proto import api_pb2

from tests.modal_cloud.clocks import Clocks, with_clock
from tests.modal_cloud.container import Container
from tests.modal_cloud.handles import layout_of
from tests.modal_cloud.images import Images
from tests.modal_cloud.state import Function
from tests.modal_cloud.storage import Storage


class Launcher:
    """Starts the processes of containers."""

    def __init__(self, directory: Path, storage: Storage, images: Images) -> None:
        self._directory = directory
        self._storage = storage
        self._images = images
        self.clocks = Clocks()
        self.server_url = ""

    def start(self, function: Function) -> tuple[Container, int]:
        """Returns a container and the file descriptor of what it prints; raises GRPCError if a volume cannot be mounted."""
        container = Container(function, self._directory / "containers")
        definition = container.definition
        home = container.root / "root"
        home.mkdir(parents=True)
        for mount_id in (*definition.mount_ids, *self._images.context_mounts(definition.image_id)):
            self._storage.lay_out(mount_id, container.root)
        for mount in definition.volume_mounts:
            self._mount(Path(mount.mount_path), self._storage.volumes[mount.volume_id] / mount.sub_path)
        arguments = container.root / "container_arguments"
        arguments.write_bytes(self._arguments(container).SerializeToString())
        read, write = os.pipe()
        with os.fdopen(write, "wb") as output:
            container.process = subprocess.Popen(
                [sys.executable, "-m", "modal._container_entrypoint"],
                cwd=home,
                env=self._environ(container, home, arguments),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # so that what it starts can be ended with it
            )
        return container, read

    def _mount(self, path: Path, volume: Path) -> None:
        """Makes the path lead to the volume's directory."""
        if self._directory not in path.parents:
            raise GRPCError(
                Status.INVALID_ARGUMENT,
                f"a volume is mounted at {path}, which is not within {self._directory}: the stand-in mounts none there",
            )
        volume.mkdir(parents=True, exist_ok=True)
        if path.is_symlink() and path.resolve() == volume.resolve():
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(volume)

    def _arguments(self, container: Container) -> api_pb2.ContainerArguments:
        function, definition = container.function, container.definition
        layout = layout_of(function.app)
        known = {stored.object_id for stored in layout.objects}
        for dependency in definition.object_dependencies:
            if dependency.object_id not in known:
                layout.objects.add(object_id=dependency.object_id)
        return api_pb2.ContainerArguments(
            task_id=container.task_id,
            function_id=function.id,
            app_id=function.app.id,
            function_def=definition,
            serialized_params=function.serialized_params,
            environment_name=function.app.environment,
            app_layout=layout,
        )

    def _environ(self, container: Container, home: Path, arguments: Path) -> dict[str, str]:
        definition = container.definition
        environ = {name: value for name, value in os.environ.items() if not name.startswith(("FLYWHEEL_", "MODAL_"))}
        environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environ.get('PATH', os.defpath)}"
        for command in self._images.commands(definition.image_id):
            if command.startswith("ENV "):
                for assignment in shlex.split(command.removeprefix("ENV ")):
                    name, _, value = assignment.partition("=")
                    environ[name] = string.Template(value).safe_substitute(environ)
        for secret_id in definition.secret_ids:
            environ.update(self._storage.secrets[secret_id])
        environ |= {
            "PYTHONPATH": str(home),
            "PYTHONUNBUFFERED": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            "MODAL_IS_REMOTE": "1",
            "MODAL_TASK_ID": container.task_id,
            "MODAL_IMAGE_ID": definition.image_id,
            "MODAL_ENVIRONMENT": container.function.app.environment,
            "MODAL_SERVER_URL": self.server_url,
            "MODAL_CONTAINER_ARGUMENTS_PATH": str(arguments),
            "MODAL_OVERRIDE_HEADERS": f"x-task-id:{container.task_id}",
        }
        function = container.function
        return with_clock(environ, self.clocks.offset(function.app.description, function.tag))
