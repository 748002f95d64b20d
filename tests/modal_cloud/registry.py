"""Things of one kind, by id and by name: made, found, kept alive by heartbeats, listed and deleted."""

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from grpclib import GRPCError, Status
from modal_proto import api_pb2

from tests.modal_cloud.state import new_id, not_found

Thing = TypeVar("Thing")
DEFAULT_ENVIRONMENT = "main"
UNNAMED = {api_pb2.OBJECT_CREATION_TYPE_EPHEMERAL, api_pb2.OBJECT_CREATION_TYPE_ANONYMOUS_OWNED_BY_APP}
CREATOR = "stand-in"


@dataclass
class Lifetime:
    """How long what is ephemeral lives after its last heartbeat, of which the client sends one each 300 s."""

    seconds: float = 900.0


@dataclass(eq=False)
class Record(Generic[Thing]):
    """A thing, with what Modal knows of any."""

    id: str
    thing: Thing
    name: str = ""
    environment: str = ""
    created: float = field(default_factory=time.time)
    expiry: asyncio.TimerHandle | None = None
    """What removes the thing, if it is ephemeral."""

    @property
    def creation_info(self) -> api_pb2.CreationInfo:
        return api_pb2.CreationInfo(created_at=self.created, created_by=CREATOR)


class Registry(Generic[Thing]):
    """Things of one kind.

    Arguments:
        kind: What messages to callers call one.
        prefix: What ids begin with.
        lifetime: That of what is ephemeral.
        removed: Is told of a thing that was deleted or has expired.
    """

    def __init__(
        self, kind: str, prefix: str, lifetime: Lifetime | None = None, removed: Callable[[Thing], None] = lambda _: None
    ) -> None:
        self._kind = kind
        self._prefix = prefix
        self._lifetime = lifetime or Lifetime()
        self._removed = removed
        self._ids: dict[tuple[str, str], str] = {}
        self._records: dict[str, Record[Thing]] = {}

    def __getitem__(self, thing_id: str) -> Thing:
        return self.record(thing_id).thing

    def __iter__(self) -> Iterator[Record[Thing]]:
        return iter(list(self._records.values()))

    def record(self, thing_id: str) -> Record[Thing]:
        """Returns what is known of the thing; raises NOT_FOUND."""
        if thing_id not in self._records:
            raise not_found(f"{self._kind} {thing_id} not found")
        return self._records[thing_id]

    def put(self, thing: Thing, name: str = "", environment: str = "") -> str:
        record = Record(new_id(self._prefix), thing, name, environment or DEFAULT_ENVIRONMENT)
        self._records[record.id] = record
        if name:
            self._ids[record.environment, name] = record.id
        return record.id

    def named(self, name: str, environment: str = "") -> str:
        environment = environment or DEFAULT_ENVIRONMENT
        if (environment, name) not in self._ids:
            raise not_found(f"{self._kind} '{name}' not found in environment '{environment}'")
        return self._ids[environment, name]

    def get_or_create(self, request: Any, make: Callable[[], Thing]) -> Record[Thing]:
        """Returns the record of what a request with a name, an environment and an object creation type asks for."""
        name, environment, how = request.deployment_name, request.environment_name, request.object_creation_type
        if how in UNNAMED:
            record = self.record(self.put(make()))
            if how == api_pb2.OBJECT_CREATION_TYPE_EPHEMERAL:
                self._expire_later(record)
            return record
        known = (environment or DEFAULT_ENVIRONMENT, name) in self._ids
        if known and how == api_pb2.OBJECT_CREATION_TYPE_CREATE_FAIL_IF_EXISTS:
            raise GRPCError(Status.ALREADY_EXISTS, f"{self._kind} '{name}' already exists")
        overwrite = how == api_pb2.OBJECT_CREATION_TYPE_CREATE_OVERWRITE_IF_EXISTS
        if how == api_pb2.OBJECT_CREATION_TYPE_UNSPECIFIED or (known and not overwrite):
            return self.record(self.named(name, environment))
        return self.record(self.put(make(), name, environment))

    def heartbeat(self, thing_id: str) -> None:
        """Lets an ephemeral thing live on; raises NOT_FOUND if it is too late."""
        record = self.record(thing_id)
        if record.expiry is not None:
            record.expiry.cancel()
            self._expire_later(record)

    def _expire_later(self, record: Record[Thing]) -> None:
        loop = asyncio.get_running_loop()
        record.expiry = loop.call_later(self._lifetime.seconds, self.delete, record.id)

    def expire(self) -> None:
        """Removes all that is ephemeral, as if no heartbeat had come for too long."""
        for record in self:
            if record.expiry is not None:
                self.delete(record.id)

    def delete(self, thing_id: str) -> None:
        """Removes the thing; raises NOT_FOUND."""
        record = self.record(thing_id)
        del self._records[thing_id]
        if record.expiry is not None:
            record.expiry.cancel()
        if self._ids.get((record.environment, record.name)) == thing_id:
            del self._ids[record.environment, record.name]
        self._removed(record.thing)

    def page(self, request: Any) -> list[Record[Thing]]:
        """Returns the named things that a request with an environment and a pagination asks for, the newest first."""
        environment, before = request.environment_name or DEFAULT_ENVIRONMENT, request.pagination.created_before
        found = [record for record in self if record.name and record.environment == environment]
        earlier = [record for record in found if not before or record.created < before]
        newest_first = sorted(earlier, key=lambda record: record.created, reverse=True)
        return newest_first[: request.pagination.max_objects or None]
