"""What the rooms of the cloud share: identifiers, waiting, and the things that are deployed, called and run."""

import asyncio
import itertools
import time
from collections import deque
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from grpclib import GRPCError, Status
from modal_proto import api_pb2

if TYPE_CHECKING:
    from tests.modal_cloud.container import Container
    from tests.modal_cloud.tunnels import Relay

_numbers = itertools.count(1)

calling: ContextVar["Container | None"] = ContextVar("calling", default=None)
"""The container that makes the RPC being served; None if a client makes it."""


def new_id(prefix: str) -> str:
    """Returns an id as long as Modal's: by the length, Modal's command line tells ids from names."""
    return f"{prefix}-{next(_numbers):022d}"


def calling_container() -> "Container":
    """Returns the container that makes the RPC being served, which no client may make."""
    container = calling.get()
    if container is None:
        raise GRPCError(Status.PERMISSION_DENIED, "only a container may do this")
    return container


def not_found(what: str) -> GRPCError:
    return GRPCError(Status.NOT_FOUND, what)


class Changes:
    """Wakes the tasks that wait for conditions, each time one may have come to hold."""

    def __init__(self) -> None:
        self._waiting: set[asyncio.Future[None]] = set()

    def notify(self) -> None:
        for waiter in self._waiting:
            if not waiter.done():
                waiter.set_result(None)
        self._waiting.clear()

    async def until(self, holds: Callable[[], Any], timeout: float | None = None) -> bool:  # noqa: ASYNC109
        """Returns True once the condition holds, and False if it does not within so many seconds."""
        try:
            async with asyncio.timeout(timeout):
                while not holds():
                    waiter = asyncio.get_running_loop().create_future()
                    self._waiting.add(waiter)
                    try:
                        await waiter
                    finally:
                        self._waiting.discard(waiter)
        except TimeoutError:
            return bool(holds())
        return True


@dataclass(eq=False)
class App:
    """An app: its functions and classes by tag, and what its containers have printed."""

    id: str
    environment: str
    description: str = ""
    state: Any = api_pb2.APP_STATE_INITIALIZING
    version: int = 0
    functions: dict[str, "Function"] = field(default_factory=dict)
    class_ids: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    created: float = field(default_factory=time.time)
    logs: list[api_pb2.TaskLogsBatch] = field(default_factory=list)
    changes: Changes = field(default_factory=Changes)

    @property
    def stopped(self) -> bool:
        return bool(self.state == api_pb2.APP_STATE_STOPPED)


@dataclass(eq=False)
class Function:
    """A function as deployed, or a variant of one: with parameters or options of its own."""

    id: str
    app: App
    tag: str
    base: "Function | None" = None
    serialized_params: bytes = b""
    options: api_pb2.FunctionOptions | None = None
    deployed: api_pb2.Function = field(default_factory=api_pb2.Function)
    definition_id: str = ""
    pending: deque["Call"] = field(default_factory=deque)
    changes: Changes = field(default_factory=Changes)
    relay: "Relay | None" = None
    url: str = ""
    """Where a server is reached: at its relay."""

    @property
    def definition(self) -> api_pb2.Function:
        """The definition as deployed, with the options of this variant."""
        if self.base is None:
            return self.deployed
        definition = api_pb2.Function()
        definition.CopyFrom(self.base.deployed)
        definition.warm_pool_size = 0
        for option, value in self.options.ListFields() if self.options else ():
            if option.name not in definition.DESCRIPTOR.fields_by_name:
                continue
            if option.is_repeated:
                del getattr(definition, option.name)[:]
                getattr(definition, option.name).extend(value)
            elif option.message_type is not None:
                getattr(definition, option.name).CopyFrom(value)
            else:
                setattr(definition, option.name, value)
        return definition

    @property
    def min_containers(self) -> int:
        return 0 if self.app.stopped else self.definition.warm_pool_size

    @property
    def concurrency(self) -> int:
        return self.definition.max_concurrent_inputs or 1


@dataclass(eq=False)
class Call:
    """A function call, which has a single input."""

    target: Function
    input: api_pb2.FunctionInput
    invocation: Any = api_pb2.FUNCTION_CALL_INVOCATION_TYPE_ASYNC
    id: str = field(default_factory=lambda: new_id("fc"))
    input_id: str = field(default_factory=lambda: new_id("in"))
    state: str = "pending"
    """One of pending, running, done, cancelled, failed."""
    output: api_pb2.FunctionGetOutputsItem | None = None
    attempt: int = 0
    container: "Container | None" = None
    """The one that runs it, or ran it last."""
    data_in: list[api_pb2.DataChunk] = field(default_factory=list)
    data_out: list[api_pb2.DataChunk] = field(default_factory=list)
    changes: Changes = field(default_factory=Changes)
    expiry: asyncio.TimerHandle | None = None

    @property
    def function(self) -> str:
        return self.target.tag

    @property
    def method(self) -> str:
        return self.input.method_name

    @property
    def finished(self) -> bool:
        return self.output is not None

    def finish(self, result: api_pb2.GenericResult, **item: Any) -> None:
        """Records the outcome, unless there is one."""
        if self.output is not None:
            return
        self.output = api_pb2.FunctionGetOutputsItem(
            result=result, input_id=self.input_id, task_id=self.container.task_id if self.container else "", **item
        )
        outcomes = {
            api_pb2.GenericResult.GENERIC_STATUS_SUCCESS: "done",
            api_pb2.GenericResult.GENERIC_STATUS_TERMINATED: "cancelled",
        }
        self.state = outcomes.get(result.status, "failed")
        if self.expiry is not None:
            self.expiry.cancel()
        self.changes.notify()
