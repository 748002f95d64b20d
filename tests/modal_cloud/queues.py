"""Queues and their partitions."""

import itertools
import time
from collections import deque
from collections.abc import AsyncIterator
from typing import TypeAlias

from google.protobuf.empty_pb2 import Empty
from grpclib import GRPCError, Status
from modal_proto import api_pb2

from tests.modal_cloud.registry import Lifetime, Record, Registry
from tests.modal_cloud.state import Changes, not_found

LONGEST_PARTITION = 5_000  # values: Modal's limit
DAY = 24 * 3600.0

Entry: TypeAlias = tuple[int, bytes]
"""A value with its number in the partition."""


class Partition:
    """The values of one partition of a queue, which is cleared as many seconds after its last put as the put says."""

    def __init__(self) -> None:
        self.entries: deque[Entry] = deque()
        self.changes = Changes()
        self._numbers = itertools.count(1)
        self._cleared = time.monotonic() + DAY

    def put(self, values: list[bytes], ttl: float) -> None:
        self.entries.extend(zip(self._numbers, values))  # noqa: B905 - the numbers are endless
        self._cleared = time.monotonic() + (ttl or DAY)
        self.changes.notify()

    def take_back(self, entries: list[Entry]) -> None:
        self.entries.extendleft(reversed(entries))
        self.changes.notify()

    def clear_old(self) -> None:
        """Removes the values if they are too old."""
        if time.monotonic() >= self._cleared:
            self.entries.clear()


class Queue:
    """The partitions of one queue, by their keys."""

    def __init__(self) -> None:
        self.partitions: dict[bytes, Partition] = {}
        self.gone = False
        """Whether it was deleted, or has expired."""

    def __getitem__(self, key: bytes) -> Partition:
        partition = self.partitions.setdefault(key, Partition())
        partition.clear_old()
        return partition

    def end(self) -> None:
        """Tells each caller that waits for a value that the queue is gone."""
        self.gone = True
        for partition in self.partitions.values():
            partition.changes.notify()


def _metadata(record: Record[Queue]) -> api_pb2.QueueMetadata:
    return api_pb2.QueueMetadata(name=record.name, creation_info=record.creation_info)


class Queues:
    """Plays the RPCs of queues."""

    def __init__(self, lifetime: Lifetime) -> None:
        self.registry: Registry[Queue] = Registry("Queue", "qu", lifetime, Queue.end)

    async def QueueGetOrCreate(self, request: api_pb2.QueueGetOrCreateRequest) -> api_pb2.QueueGetOrCreateResponse:
        record = self.registry.get_or_create(request, Queue)
        return api_pb2.QueueGetOrCreateResponse(queue_id=record.id, metadata=_metadata(record))

    async def QueueGetById(self, request: api_pb2.QueueGetByIdRequest) -> api_pb2.QueueGetByIdResponse:
        record = self.registry.record(request.queue_id)
        return api_pb2.QueueGetByIdResponse(queue_id=record.id, metadata=_metadata(record))

    async def QueueHeartbeat(self, request: api_pb2.QueueHeartbeatRequest) -> Empty:
        self.registry.heartbeat(request.queue_id)
        return Empty()

    async def QueueDelete(self, request: api_pb2.QueueDeleteRequest) -> Empty:
        self.registry.delete(request.queue_id)
        return Empty()

    async def QueueList(self, request: api_pb2.QueueListRequest) -> api_pb2.QueueListResponse:
        response = api_pb2.QueueListResponse(environment_name=request.environment_name)
        for record in self.registry.page(request):
            partitions = record.thing.partitions.values()
            total = sum(len(partition.entries) for partition in partitions)
            response.queues.add(
                name=record.name,
                created_at=record.created,
                num_partitions=len(partitions),
                total_size=min(total, request.total_size_limit or total),
                queue_id=record.id,
                metadata=_metadata(record),
            )
        return response

    async def QueuePut(self, request: api_pb2.QueuePutRequest) -> Empty:
        partition = self.registry[request.queue_id][request.partition_key]
        if len(partition.entries) + len(request.values) > LONGEST_PARTITION:
            raise GRPCError(Status.RESOURCE_EXHAUSTED, "the queue is full")
        partition.put(list(request.values), request.partition_ttl_seconds)
        return Empty()

    async def QueueGet(self, request: api_pb2.QueueGetRequest) -> AsyncIterator[api_pb2.QueueGetResponse]:
        queue = self.registry[request.queue_id]
        partition = queue[request.partition_key]
        await partition.changes.until(lambda: partition.entries or queue.gone, max(0.0, request.timeout))
        if queue.gone:
            raise not_found(f"Queue {request.queue_id} not found")
        entries = [partition.entries.popleft() for _ in range(min(request.n_values or 1, len(partition.entries)))]
        try:
            yield api_pb2.QueueGetResponse(values=[value for _, value in entries])
        except GeneratorExit:  # the value was not sent: the caller has gone
            partition.take_back(entries)
            raise

    async def QueueNextItems(self, request: api_pb2.QueueNextItemsRequest) -> api_pb2.QueueNextItemsResponse:
        queue = self.registry[request.queue_id]
        partition = queue[request.partition_key]
        last = int(request.last_entry_id or 0)

        def later() -> list[Entry]:
            return [entry for entry in partition.entries if entry[0] > last]

        await partition.changes.until(lambda: later() or queue.gone, max(0.0, request.item_poll_timeout))
        if queue.gone:
            raise not_found(f"Queue {request.queue_id} not found")
        items = [api_pb2.QueueItem(value=value, entry_id=str(number)) for number, value in later()]
        return api_pb2.QueueNextItemsResponse(items=items)

    async def QueueLen(self, request: api_pb2.QueueLenRequest) -> api_pb2.QueueLenResponse:
        queue = self.registry[request.queue_id]
        counted = [queue[key] for key in list(queue.partitions)] if request.total else [queue[request.partition_key]]
        return api_pb2.QueueLenResponse(len=sum(len(partition.entries) for partition in counted))

    async def QueueClear(self, request: api_pb2.QueueClearRequest) -> Empty:
        queue = self.registry[request.queue_id]
        for partition in list(queue.partitions.values()) if request.all_partitions else [queue[request.partition_key]]:
            partition.entries.clear()
        return Empty()
