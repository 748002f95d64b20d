"""What outlives containers: dicts, queues, volumes, secrets, mounted files, blobs."""

import hashlib
import os
import time
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, Generic, TypeVar

from aiohttp import web
from google.protobuf.empty_pb2 import Empty
from grpclib import GRPCError, Status
from modal_proto import api_pb2

from tests.modal_cloud.state import Changes, new_id, not_found

Stored = TypeVar("Stored")
UNNAMED = {api_pb2.OBJECT_CREATION_TYPE_EPHEMERAL, api_pb2.OBJECT_CREATION_TYPE_ANONYMOUS_OWNED_BY_APP}
DEFAULT_ENVIRONMENT = "main"
LONGEST_QUEUE = 5_000  # Modal's limit of a partition


class Registry(Generic[Stored]):
    """Things of one kind, by id, and by name within an environment."""

    def __init__(self, kind: str, prefix: str) -> None:
        self._kind = kind
        self._prefix = prefix
        self._ids: dict[tuple[str, str], str] = {}
        self._things: dict[str, Stored] = {}

    def __getitem__(self, thing_id: str) -> Stored:
        if thing_id not in self._things:
            raise not_found(f"{self._kind} {thing_id} not found")
        return self._things[thing_id]

    def put(self, thing: Stored, name: str = "", environment: str = "") -> str:
        thing_id = new_id(self._prefix)
        self._things[thing_id] = thing
        if name:
            self._ids[environment or DEFAULT_ENVIRONMENT, name] = thing_id
        return thing_id

    def named(self, name: str, environment: str = "") -> str:
        environment = environment or DEFAULT_ENVIRONMENT
        if (environment, name) not in self._ids:
            raise not_found(f"{self._kind} '{name}' not found in environment '{environment}'")
        return self._ids[environment, name]

    def get_or_create(self, request: Any, make: Callable[[], Stored]) -> str:
        """Returns the id of what a request with a name, an environment and an object creation type asks for."""
        name, environment, how = request.deployment_name, request.environment_name, request.object_creation_type
        if how in UNNAMED:
            return self.put(make())
        known = (environment or DEFAULT_ENVIRONMENT, name) in self._ids
        if known and how == api_pb2.OBJECT_CREATION_TYPE_CREATE_FAIL_IF_EXISTS:
            raise GRPCError(Status.ALREADY_EXISTS, f"{self._kind} '{name}' already exists")
        overwrite = how == api_pb2.OBJECT_CREATION_TYPE_CREATE_OVERWRITE_IF_EXISTS
        if how == api_pb2.OBJECT_CREATION_TYPE_UNSPECIFIED or (known and not overwrite):
            return self.named(name, environment)
        return self.put(make(), name, environment)


class Partition:
    """The values of one partition of a queue."""

    def __init__(self) -> None:
        self.values: deque[bytes] = deque()
        self.changes = Changes()


def _created() -> api_pb2.CreationInfo:
    return api_pb2.CreationInfo(created_at=time.time(), created_by="stand-in")


class Storage:
    """Plays the RPCs of everything that is kept."""

    def __init__(self, directory: Path) -> None:
        self.secrets: Registry[dict[str, str]] = Registry("Secret", "st")
        self.volumes: Registry[Path] = Registry("Volume", "vo")
        self._dicts: Registry[dict[bytes, bytes]] = Registry("Dict", "di")
        self._queues: Registry[defaultdict[bytes, Partition]] = Registry("Queue", "qu")
        self._mounts: Registry[dict[str, str]] = Registry("Mount", "mo")
        self._volumes_directory = directory / "volumes"
        self._files = directory / "files"
        self._files.mkdir()
        self._blobs: dict[str, bytes] = {}
        self._blob_url = ""
        self._runner: web.AppRunner | None = None

    # Dicts

    async def DictGetOrCreate(self, request: api_pb2.DictGetOrCreateRequest) -> api_pb2.DictGetOrCreateResponse:
        dict_id = self._dicts.get_or_create(request, lambda: {entry.key: entry.value for entry in request.data})
        metadata = api_pb2.DictMetadata(name=request.deployment_name, creation_info=_created())
        return api_pb2.DictGetOrCreateResponse(dict_id=dict_id, metadata=metadata)

    async def DictGet(self, request: api_pb2.DictGetRequest) -> api_pb2.DictGetResponse:
        value = self._dicts[request.dict_id].get(request.key)
        return api_pb2.DictGetResponse(found=value is not None, value=value)

    async def DictContains(self, request: api_pb2.DictContainsRequest) -> api_pb2.DictContainsResponse:
        return api_pb2.DictContainsResponse(found=request.key in self._dicts[request.dict_id])

    async def DictLen(self, request: api_pb2.DictLenRequest) -> api_pb2.DictLenResponse:
        return api_pb2.DictLenResponse(len=len(self._dicts[request.dict_id]))

    async def DictUpdate(self, request: api_pb2.DictUpdateRequest) -> api_pb2.DictUpdateResponse:
        values = self._dicts[request.dict_id]
        if request.if_not_exists and any(entry.key in values for entry in request.updates):
            return api_pb2.DictUpdateResponse(created=False)
        values.update((entry.key, entry.value) for entry in request.updates)
        return api_pb2.DictUpdateResponse(created=True)

    async def DictPop(self, request: api_pb2.DictPopRequest) -> api_pb2.DictPopResponse:
        value = self._dicts[request.dict_id].pop(request.key, None)
        return api_pb2.DictPopResponse(found=value is not None, value=value)

    async def DictClear(self, request: api_pb2.DictClearRequest) -> Empty:
        self._dicts[request.dict_id].clear()
        return Empty()

    async def DictContents(self, request: api_pb2.DictContentsRequest) -> AsyncIterator[api_pb2.DictEntry]:
        for key, value in list(self._dicts[request.dict_id].items()):
            yield api_pb2.DictEntry(key=key if request.keys else b"", value=value if request.values else b"")

    # Queues

    async def QueueGetOrCreate(self, request: api_pb2.QueueGetOrCreateRequest) -> api_pb2.QueueGetOrCreateResponse:
        queue_id = self._queues.get_or_create(request, lambda: defaultdict(Partition))
        metadata = api_pb2.QueueMetadata(name=request.deployment_name, creation_info=_created())
        return api_pb2.QueueGetOrCreateResponse(queue_id=queue_id, metadata=metadata)

    async def QueuePut(self, request: api_pb2.QueuePutRequest) -> Empty:
        partition = self._queues[request.queue_id][request.partition_key]
        if len(partition.values) + len(request.values) > LONGEST_QUEUE:
            raise GRPCError(Status.RESOURCE_EXHAUSTED, "the queue is full")
        partition.values.extend(request.values)
        partition.changes.notify()
        return Empty()

    async def QueueGet(self, request: api_pb2.QueueGetRequest) -> AsyncIterator[api_pb2.QueueGetResponse]:
        partition = self._queues[request.queue_id][request.partition_key]
        await partition.changes.until(lambda: partition.values, max(0.0, request.timeout))
        values = [partition.values.popleft() for _ in range(min(request.n_values or 1, len(partition.values)))]
        try:
            yield api_pb2.QueueGetResponse(values=values)
        except GeneratorExit:  # it was not sent: whoever asked is gone
            partition.values.extendleft(reversed(values))
            partition.changes.notify()
            raise

    async def QueueLen(self, request: api_pb2.QueueLenRequest) -> api_pb2.QueueLenResponse:
        partitions = self._queues[request.queue_id]
        counted = list(partitions.values()) if request.total else [partitions[request.partition_key]]
        return api_pb2.QueueLenResponse(len=sum(len(partition.values) for partition in counted))

    async def QueueClear(self, request: api_pb2.QueueClearRequest) -> Empty:
        partitions = self._queues[request.queue_id]
        for partition in list(partitions.values()) if request.all_partitions else [partitions[request.partition_key]]:
            partition.values.clear()
        return Empty()

    # Volumes

    def volume_directory(self, name: str) -> Path:
        directory = self._volumes_directory / name
        directory.mkdir(parents=True, exist_ok=True)
        return directory

    async def VolumeGetOrCreate(self, request: api_pb2.VolumeGetOrCreateRequest) -> api_pb2.VolumeGetOrCreateResponse:
        volume_id = self.volumes.get_or_create(
            request, lambda: self.volume_directory(request.deployment_name or new_id("unnamed"))
        )
        metadata = api_pb2.VolumeMetadata(version=request.version, name=request.deployment_name, creation_info=_created())
        return api_pb2.VolumeGetOrCreateResponse(volume_id=volume_id, version=request.version, metadata=metadata)

    async def SecretGetOrCreate(self, request: api_pb2.SecretGetOrCreateRequest) -> api_pb2.SecretGetOrCreateResponse:
        secret_id = self.secrets.get_or_create(request, lambda: dict(request.env_dict))
        keys = self.secrets[secret_id].keys()
        if missing := [key for key in request.required_keys if key not in keys]:
            raise not_found(f"Secret '{request.deployment_name}' is missing required key(s): {', '.join(missing)}")
        metadata = api_pb2.SecretMetadata(name=request.deployment_name, creation_info=_created(), keys=keys)
        return api_pb2.SecretGetOrCreateResponse(secret_id=secret_id, metadata=metadata)

    # Mounts

    async def MountBatchedCheckExistence(
        self, request: api_pb2.MountBatchedCheckExistenceRequest
    ) -> api_pb2.MountBatchedCheckExistenceResponse:
        missing = [sha256 for sha256 in request.sha256_hex_hashes if not (self._files / sha256).exists()]
        return api_pb2.MountBatchedCheckExistenceResponse(missing_sha256_hex_hashes=missing)

    async def MountPutFile(self, request: api_pb2.MountPutFileRequest) -> api_pb2.MountPutFileResponse:
        if request.WhichOneof("data_oneof") is not None:
            data = self._blobs[request.data_blob_id] if request.data_blob_id else request.data
            if hashlib.sha256(data).hexdigest() != request.sha256_hex:
                raise GRPCError(Status.INVALID_ARGUMENT, f"the file's digest is not {request.sha256_hex}")
            (self._files / request.sha256_hex).write_bytes(data)
        return api_pb2.MountPutFileResponse(exists=(self._files / request.sha256_hex).exists())

    async def MountGetOrCreate(self, request: api_pb2.MountGetOrCreateRequest) -> api_pb2.MountGetOrCreateResponse:
        if request.namespace == api_pb2.DEPLOYMENT_NAMESPACE_GLOBAL:
            # Modal publishes its client's code so; containers here import the one that is installed.
            mount_id = self._mounts.put({})
        else:
            mount_id = self._mounts.get_or_create(request, lambda: {file.filename: file.sha256_hex for file in request.files})
        digest = hashlib.sha256(repr(sorted(self._mounts[mount_id].items())).encode()).hexdigest()
        metadata = api_pb2.MountHandleMetadata(content_checksum_sha256_hex=digest)
        return api_pb2.MountGetOrCreateResponse(mount_id=mount_id, handle_metadata=metadata)

    def mounted(self, mount_id: str) -> dict[str, str]:
        """Returns the digests of the mount's files by their absolute names in the container."""
        return {f"/{name.lstrip('/')}": sha256 for name, sha256 in self._mounts[mount_id].items()}

    def lay_out(self, mount_id: str, root: Path) -> None:
        """Puts the files of the mount where they belong under a container's root."""
        for name, sha256 in self.mounted(mount_id).items():
            path = root / name.lstrip("/")
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                os.link(self._files / sha256, path)

    # Blobs: arguments and results beyond what the client sends within a message

    async def BlobCreate(self, request: api_pb2.BlobCreateRequest) -> api_pb2.BlobCreateResponse:
        blob_id = new_id("bl")
        urls = api_pb2.UploadUrlList(items=[f"{self._blob_url}/{blob_id}"])
        return api_pb2.BlobCreateResponse(blob_ids=[blob_id], upload_urls=urls)

    async def BlobGet(self, request: api_pb2.BlobGetRequest) -> api_pb2.BlobGetResponse:
        if request.blob_id not in self._blobs:
            raise not_found(f"Blob {request.blob_id} not found")
        return api_pb2.BlobGetResponse(download_url=f"{self._blob_url}/{request.blob_id}")

    async def _upload(self, request: web.Request) -> web.Response:
        data = await request.read()
        self._blobs[request.match_info["blob_id"]] = data
        return web.Response(headers={"ETag": f'"{hashlib.md5(data, usedforsecurity=False).hexdigest()}"'})

    async def _download(self, request: web.Request) -> web.Response:
        return web.Response(body=self._blobs[request.match_info["blob_id"]])

    async def start(self) -> None:
        blobs = web.Application(client_max_size=2**31)
        blobs.add_routes([web.put("/{blob_id}", self._upload), web.get("/{blob_id}", self._download)])
        self._runner = web.AppRunner(blobs, access_log=None)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self._blob_url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
