"""Images: every one counts as built; what it would be built of is kept.

The steps that are given secrets are run, since they look at what only the build gets to see.
"""

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path

from modal_proto import api_pb2

from tests.modal_cloud.state import new_id, not_found
from tests.modal_cloud.storage import Storage

SUCCESS = api_pb2.GenericResult(status=api_pb2.GenericResult.GENERIC_STATUS_SUCCESS)
FAILURE = api_pb2.GenericResult(status=api_pb2.GenericResult.GENERIC_STATUS_FAILURE)


class Images:
    """Plays the RPCs of images."""

    def __init__(self, storage: Storage, directory: Path) -> None:
        self._storage = storage
        self._directory = directory
        self._images: dict[str, api_pb2.Image] = {}
        self._ids: dict[bytes, str] = {}

    async def ImageGetOrCreate(self, request: api_pb2.ImageGetOrCreateRequest) -> api_pb2.ImageGetOrCreateResponse:
        definition = request.image.SerializeToString(deterministic=True)
        image_id = new_id("im") if request.force_build else self._ids.setdefault(definition, new_id("im"))
        self._images[image_id] = request.image
        return api_pb2.ImageGetOrCreateResponse(
            image_id=image_id,
            result=None if self._steps_with_secrets(request.image) else SUCCESS,
            metadata=api_pb2.ImageMetadata(image_builder_version=request.builder_version),
        )

    async def ImageJoinStreaming(
        self, request: api_pb2.ImageJoinStreamingRequest
    ) -> AsyncIterator[api_pb2.ImageJoinStreamingResponse]:
        """Builds the image."""
        directory = self._directory / request.image_id / "root"
        directory.mkdir(parents=True, exist_ok=True)
        for mount_id in self.context_mounts(request.image_id):
            self._storage.lay_out(mount_id, directory.parent)
        image = self._images[request.image_id]
        environ = {name: value for name, value in os.environ.items() if not name.startswith(("FLYWHEEL_", "MODAL_"))}
        environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environ.get('PATH', os.defpath)}"
        for secret_id in image.secret_ids:
            environ.update(self._storage.secrets[secret_id])
        for step in self._steps_with_secrets(image):
            process = await asyncio.create_subprocess_shell(
                step,
                cwd=directory,
                env=environ,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
            )
            output, _ = await process.communicate()
            log = api_pb2.TaskLogs(data=output.decode(), file_descriptor=api_pb2.FILE_DESCRIPTOR_STDOUT)
            yield api_pb2.ImageJoinStreamingResponse(task_logs=[log])
            if process.returncode:
                yield api_pb2.ImageJoinStreamingResponse(result=FAILURE, eof=True)
                return
        yield api_pb2.ImageJoinStreamingResponse(result=SUCCESS, eof=True)

    def _steps_with_secrets(self, image: api_pb2.Image) -> list[str]:
        steps = [command.removeprefix("RUN ") for command in image.dockerfile_commands if command.startswith("RUN ")]
        return steps if image.secret_ids else []

    def _layers(self, image_id: str) -> list[api_pb2.Image]:
        """Returns the image and the images that it is based on, the lowest first."""
        if not image_id:
            return []
        if image_id not in self._images:
            raise not_found(f"Image {image_id} not found")
        image = self._images[image_id]
        return [layer for base in image.base_images for layer in self._layers(base.image_id)] + [image]

    def commands(self, image_id: str) -> list[str]:
        return [command for layer in self._layers(image_id) for command in layer.dockerfile_commands]

    def context_mounts(self, image_id: str) -> list[str]:
        """Returns the mounts that are copied into the image as a whole, at its root."""
        return [layer.context_mount_id for layer in self._layers(image_id) if "COPY . /" in layer.dockerfile_commands]
