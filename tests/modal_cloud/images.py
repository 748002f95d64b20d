"""Images: every one counts as built; what it would be built of is kept."""

from modal_proto import api_pb2

from tests.modal_cloud.state import new_id, not_found


class Images:
    """Plays the RPCs of images."""

    def __init__(self) -> None:
        self._images: dict[str, api_pb2.Image] = {}
        self._ids: dict[bytes, str] = {}

    async def ImageGetOrCreate(self, request: api_pb2.ImageGetOrCreateRequest) -> api_pb2.ImageGetOrCreateResponse:
        image_id = self._ids.setdefault(request.image.SerializeToString(deterministic=True), new_id("im"))
        self._images[image_id] = request.image
        return api_pb2.ImageGetOrCreateResponse(
            image_id=image_id,
            result=api_pb2.GenericResult(status=api_pb2.GenericResult.GENERIC_STATUS_SUCCESS),
            metadata=api_pb2.ImageMetadata(image_builder_version=request.builder_version),
        )

    def _layers(self, image_id: str) -> list[api_pb2.Image]:
        """Returns the image and those it is based on, the first first."""
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
