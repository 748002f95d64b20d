"""What outlives containers: dicts, volumes, secrets, mounted files, blobs."""

import hashlib
import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from aiohttp import web
from google.protobuf.empty_pb2 import Empty
from grpclib import GRPCError, Status
from modal_proto import api_pb2

from tests.modal_cloud.registry import Lifetime, Record, Registry
from tests.modal_cloud.state import new_id, not_found


def _dict_metadata(record: Record[dict[bytes, bytes]]) -> api_pb2.DictMetadata:
    return api_pb2.DictMetadata(name=record.name, creation_info=record.creation_info)


def _volume_metadata(record: Record[Path], version: Any = None) -> api_pb2.VolumeMetadata:
    return api_pb2.VolumeMetadata(version=version, name=record.name, creation_info=record.creation_info)


def _secret_metadata(record: Record[dict[str, str]]) -> api_pb2.SecretMetadata:
    return api_pb2.SecretMetadata(
        name=record.name,
        creation_info=record.creation_info,
        keys=record.thing.keys(),
        environment_name=record.environment,
    )


def _remove(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)


class Storage:
    """Plays the RPCs of everything that is kept."""

    def __init__(self, directory: Path, lifetime: Lifetime) -> None:
        self.secrets: Registry[dict[str, str]] = Registry("Secret", "st")
        self.volumes: Registry[Path] = Registry("Volume", "vo", lifetime, _remove)
        self.dicts: Registry[dict[bytes, bytes]] = Registry("Dict", "di", lifetime)
        self._mounts: Registry[dict[str, str]] = Registry("Mount", "mo")
        self._volumes_directory = directory / "volumes"
        self._files = directory / "files"
        self._files.mkdir()
        self._blobs: dict[str, bytes] = {}
        self._blob_url = ""
        self._runner: web.AppRunner | None = None

    # Dicts

    async def DictGetOrCreate(self, request: api_pb2.DictGetOrCreateRequest) -> api_pb2.DictGetOrCreateResponse:
        record = self.dicts.get_or_create(request, lambda: {entry.key: entry.value for entry in request.data})
        return api_pb2.DictGetOrCreateResponse(dict_id=record.id, metadata=_dict_metadata(record))

    async def DictGetById(self, request: api_pb2.DictGetByIdRequest) -> api_pb2.DictGetByIdResponse:
        record = self.dicts.record(request.dict_id)
        return api_pb2.DictGetByIdResponse(dict_id=record.id, metadata=_dict_metadata(record))

    async def DictHeartbeat(self, request: api_pb2.DictHeartbeatRequest) -> Empty:
        self.dicts.heartbeat(request.dict_id)
        return Empty()

    async def DictDelete(self, request: api_pb2.DictDeleteRequest) -> Empty:
        self.dicts.delete(request.dict_id)
        return Empty()

    async def DictList(self, request: api_pb2.DictListRequest) -> api_pb2.DictListResponse:
        response = api_pb2.DictListResponse(environment_name=request.environment_name)
        for record in self.dicts.page(request):
            metadata = _dict_metadata(record)
            response.dicts.add(name=record.name, created_at=record.created, dict_id=record.id, metadata=metadata)
        return response

    async def DictGet(self, request: api_pb2.DictGetRequest) -> api_pb2.DictGetResponse:
        value = self.dicts[request.dict_id].get(request.key)
        return api_pb2.DictGetResponse(found=value is not None, value=value)

    async def DictContains(self, request: api_pb2.DictContainsRequest) -> api_pb2.DictContainsResponse:
        return api_pb2.DictContainsResponse(found=request.key in self.dicts[request.dict_id])

    async def DictLen(self, request: api_pb2.DictLenRequest) -> api_pb2.DictLenResponse:
        return api_pb2.DictLenResponse(len=len(self.dicts[request.dict_id]))

    async def DictUpdate(self, request: api_pb2.DictUpdateRequest) -> api_pb2.DictUpdateResponse:
        values = self.dicts[request.dict_id]
        if request.if_not_exists and any(entry.key in values for entry in request.updates):
            return api_pb2.DictUpdateResponse(created=False)
        values.update((entry.key, entry.value) for entry in request.updates)
        return api_pb2.DictUpdateResponse(created=True)

    async def DictPop(self, request: api_pb2.DictPopRequest) -> api_pb2.DictPopResponse:
        value = self.dicts[request.dict_id].pop(request.key, None)
        return api_pb2.DictPopResponse(found=value is not None, value=value)

    async def DictClear(self, request: api_pb2.DictClearRequest) -> Empty:
        self.dicts[request.dict_id].clear()
        return Empty()

    async def DictContents(self, request: api_pb2.DictContentsRequest) -> AsyncIterator[api_pb2.DictEntry]:
        for key, value in list(self.dicts[request.dict_id].items()):
            yield api_pb2.DictEntry(key=key if request.keys else b"", value=value if request.values else b"")

    # Volumes

    def volume_directory(self, name: str) -> Path:
        directory = self._volumes_directory / name
        directory.mkdir(parents=True, exist_ok=True)
        return directory

    async def VolumeGetOrCreate(self, request: api_pb2.VolumeGetOrCreateRequest) -> api_pb2.VolumeGetOrCreateResponse:
        record = self.volumes.get_or_create(
            request, lambda: self.volume_directory(request.deployment_name or new_id("unnamed"))
        )
        return api_pb2.VolumeGetOrCreateResponse(
            volume_id=record.id, version=request.version, metadata=_volume_metadata(record, request.version)
        )

    async def VolumeGetById(self, request: api_pb2.VolumeGetByIdRequest) -> api_pb2.VolumeGetByIdResponse:
        record = self.volumes.record(request.volume_id)
        return api_pb2.VolumeGetByIdResponse(volume_id=record.id, metadata=_volume_metadata(record))

    async def VolumeHeartbeat(self, request: api_pb2.VolumeHeartbeatRequest) -> Empty:
        self.volumes.heartbeat(request.volume_id)
        return Empty()

    async def VolumeCommit(self, request: api_pb2.VolumeCommitRequest) -> api_pb2.VolumeCommitResponse:
        self.volumes.record(request.volume_id)  # a directory of this machine: all see at once what is written
        return api_pb2.VolumeCommitResponse()

    async def VolumeReload(self, request: api_pb2.VolumeReloadRequest) -> Empty:
        self.volumes.record(request.volume_id)
        return Empty()

    async def VolumeDelete(self, request: api_pb2.VolumeDeleteRequest) -> Empty:
        self.volumes.delete(request.volume_id)
        return Empty()

    async def VolumeList(self, request: api_pb2.VolumeListRequest) -> api_pb2.VolumeListResponse:
        response = api_pb2.VolumeListResponse(environment_name=request.environment_name)
        for record in self.volumes.page(request):
            metadata = _volume_metadata(record)
            response.items.add(label=record.name, volume_id=record.id, created_at=record.created, metadata=metadata)
        return response

    # Secrets

    async def SecretGetOrCreate(self, request: api_pb2.SecretGetOrCreateRequest) -> api_pb2.SecretGetOrCreateResponse:
        record = self.secrets.get_or_create(request, lambda: dict(request.env_dict))
        if missing := [key for key in request.required_keys if key not in record.thing]:
            raise not_found(f"Secret '{request.deployment_name}' is missing required key(s): {', '.join(missing)}")
        return api_pb2.SecretGetOrCreateResponse(secret_id=record.id, metadata=_secret_metadata(record))

    async def SecretDelete(self, request: api_pb2.SecretDeleteRequest) -> Empty:
        self.secrets.delete(request.secret_id)
        return Empty()

    async def SecretList(self, request: api_pb2.SecretListRequest) -> api_pb2.SecretListResponse:
        response = api_pb2.SecretListResponse(environment_name=request.environment_name)
        for record in self.secrets.page(request):
            response.items.add(
                label=record.name,
                created_at=record.created,
                environment_name=record.environment,
                secret_id=record.id,
                metadata=_secret_metadata(record),
            )
        return response

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
            files = {file.filename: file.sha256_hex for file in request.files}
            mount_id = self._mounts.get_or_create(request, lambda: files).id
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
