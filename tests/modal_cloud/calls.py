"""Function calls: from the client that makes them, through a container, and back."""

import asyncio
from collections.abc import AsyncIterator

from google.protobuf.empty_pb2 import Empty
from grpclib import GRPCError, Status
from modal_proto import api_pb2

from tests.modal_cloud.container import Container
from tests.modal_cloud.fleet import Fleet
from tests.modal_cloud.state import Call, Function, calling_container, not_found

REDELIVERY = 1.0  # seconds after which an unheeded cancellation is sent again
SETTLING = 0.2  # seconds
HEARTBEAT = 14.9  # seconds; the container sends the next one 15 s after the last, and waits 15.1 s for an answer


class Calls:
    """Plays the RPCs of calls, and of the containers that run them."""

    def __init__(self, functions: dict[str, Function], fleet: Fleet) -> None:
        self._functions = functions
        self._fleet = fleet
        self._by_id: dict[str, Call] = {}
        self._by_input: dict[str, Call] = {}
        self.all: list[Call] = []
        self.cancelled: list[str] = []
        self.stats: tuple[int, int] | None = None

    # Clients

    def make(self, call: Call) -> None:
        """Queues the call, and sees that there is a container for it."""
        self._by_id[call.id] = self._by_input[call.input_id] = call
        self.all.append(call)
        call.target.pending.append(call)
        call.target.changes.notify()
        self._fleet.scale(call.target)

    def _function(self, function_id: str) -> Function:
        function = self._functions.get(function_id)
        if function is None or function.app.stopped:
            raise not_found(f"Function {function_id} not found")
        return function

    def _call(self, call_id: str) -> Call:
        if call_id not in self._by_id:
            raise not_found(f"Function call {call_id} not found")
        return self._by_id[call_id]

    async def FunctionMap(self, request: api_pb2.FunctionMapRequest) -> api_pb2.FunctionMapResponse:
        if len(request.pipelined_inputs) != 1:
            raise GRPCError(Status.UNIMPLEMENTED, "the stand-in of Modal's cloud plays calls of one input only")
        (item,) = request.pipelined_inputs
        call = Call(self._function(request.function_id), item.input, request.function_call_invocation_type)
        self.make(call)
        return api_pb2.FunctionMapResponse(
            function_call_id=call.id,
            pipelined_inputs=[
                api_pb2.FunctionPutInputsResponseItem(idx=item.idx, input_id=call.input_id, input_jwt=call.input_id)
            ],
            retry_policy=call.target.definition.retry_policy,
            function_call_jwt=call.id,
        )

    async def FunctionCallFromId(self, request: api_pb2.FunctionCallFromIdRequest) -> api_pb2.FunctionCallFromIdResponse:
        call = self._call(request.function_call_id)
        metadata = api_pb2.FunctionCallHandleMetadata(app_id=call.target.app.id, function_id=call.target.id)
        return api_pb2.FunctionCallFromIdResponse(function_call_id=call.id, num_inputs=1, metadata=metadata)

    async def FunctionGetOutputs(self, request: api_pb2.FunctionGetOutputsRequest) -> api_pb2.FunctionGetOutputsResponse:
        call = self._call(request.function_call_id)
        await call.changes.until(lambda: call.finished, request.timeout)
        if call.output is None:
            return api_pb2.FunctionGetOutputsResponse(num_unfinished_inputs=1)
        return api_pb2.FunctionGetOutputsResponse(idxs=[0], outputs=[call.output])

    async def FunctionCallCancel(self, request: api_pb2.FunctionCallCancelRequest) -> Empty:
        self.cancelled.append(request.function_call_id)
        call = self._call(request.function_call_id)
        if call.finished:
            return Empty()
        if call.state == "pending":
            call.target.pending.remove(call)
        elif call.container is not None:
            if request.terminate_containers:
                call.container.interrupt()
            else:
                call.container.cancel(call.input_id)
        status = api_pb2.GenericResult.GENERIC_STATUS_TERMINATED
        call.finish(api_pb2.GenericResult(status=status, exception="the function call was cancelled"))
        return Empty()

    async def FunctionGetCurrentStats(self, request: api_pb2.FunctionGetCurrentStatsRequest) -> api_pb2.FunctionStats:
        function = self._function(request.function_id)
        containers = self._fleet.of(function)
        running = sum(len(container.inputs) for container in containers)
        backlog, runners = self.stats or (len(function.pending), sum(container.ready for container in containers))
        headroom = max(0, function.concurrency * len(containers) - running)
        return api_pb2.FunctionStats(
            backlog=backlog, num_total_tasks=runners, num_running_inputs=running, input_headroom=headroom
        )

    async def FunctionCallGetDataOut(self, request: api_pb2.FunctionCallGetDataRequest) -> AsyncIterator[api_pb2.DataChunk]:
        call = self._call(request.function_call_id)
        async for chunk in _stream(call, call.data_out, request.last_index):
            yield chunk

    # Containers

    async def ContainerServerLifecycleReady(self, request: api_pb2.ContainerServerLifecycleReadyRequest) -> Empty:
        # Its entry point says so just before it begins to heed SIGTERM, which would kill it until then.
        asyncio.get_running_loop().call_later(SETTLING, _ready, calling_container())
        return Empty()

    async def ContainerHeartbeat(
        self, request: api_pb2.ContainerHeartbeatRequest
    ) -> AsyncIterator[api_pb2.ContainerHeartbeatResponse]:
        container = calling_container()
        if not await container.changes.until(lambda: container.to_cancel, HEARTBEAT):
            yield api_pb2.ContainerHeartbeatResponse()
            return
        input_ids, container.to_cancel = container.to_cancel, set()
        # A container does not heed what arrives before it has unpacked the input.
        asyncio.get_running_loop().call_later(REDELIVERY, container.cancel, *input_ids)
        event = api_pb2.CancelInputEvent(input_ids=input_ids)
        yield api_pb2.ContainerHeartbeatResponse(cancel_input_event=event)

    async def ContainerStop(self, request: api_pb2.ContainerStopRequest) -> api_pb2.ContainerStopResponse:
        container = next((container for container in self._fleet.live if container.task_id == request.task_id), None)
        if container is None:
            raise not_found(f"Container {request.task_id} not found")
        if request.graceful:
            container.drain()
        else:
            container.stop()
        return api_pb2.ContainerStopResponse()

    async def TaskResult(self, request: api_pb2.TaskResultRequest) -> Empty:
        calling_container().failure = request.result
        return Empty()

    async def FunctionGetDynamicConcurrency(
        self, request: api_pb2.FunctionGetDynamicConcurrencyRequest
    ) -> api_pb2.FunctionGetDynamicConcurrencyResponse:
        return api_pb2.FunctionGetDynamicConcurrencyResponse(concurrency=request.max_concurrency)

    async def FunctionGetInputs(
        self, request: api_pb2.FunctionGetInputsRequest
    ) -> AsyncIterator[api_pb2.FunctionGetInputsResponse]:
        container = calling_container()
        function = container.function
        _ready(container)
        await function.changes.until(lambda: container.draining or function.pending)
        if container.draining:
            yield api_pb2.FunctionGetInputsResponse(inputs=[api_pb2.FunctionGetInputsItem(kill_switch=True)])
            return
        call = function.pending.popleft()
        self._hand_over(call, container)
        item = api_pb2.FunctionGetInputsItem(
            input_id=call.input_id,
            input=call.input,
            function_call_id=call.id,
            function_call_invocation_type=call.invocation,
            retry_count=call.attempt,
        )
        try:
            yield api_pb2.FunctionGetInputsResponse(inputs=[item])
        except GeneratorExit:  # it was not sent
            if container.inputs.pop(call.input_id, None) and not call.finished:
                call.state = "pending"
                function.pending.appendleft(call)
                function.changes.notify()
            raise

    def _hand_over(self, call: Call, container: Container) -> None:
        call.state, call.container = "running", container
        container.inputs[call.input_id] = call
        seconds = container.definition.timeout_secs
        if seconds:
            call.expiry = asyncio.get_running_loop().call_later(seconds, self._expire, call, container, seconds)

    def _expire(self, call: Call, container: Container, seconds: int) -> None:
        if call.container is container and not call.finished:
            what = f"Task's current input {call.input_id} hit its timeout of {seconds}s"
            call.finish(api_pb2.GenericResult(status=api_pb2.GenericResult.GENERIC_STATUS_TIMEOUT, exception=what))
            container.cancel(call.input_id)

    async def FunctionPutOutputs(self, request: api_pb2.FunctionPutOutputsRequest) -> Empty:
        container = calling_container()
        for item in request.outputs:
            if container.ending and item.result.status == api_pb2.GenericResult.GENERIC_STATUS_TERMINATED:
                continue  # the call was interrupted with its container, whose end decides about the call
            call = container.inputs.pop(item.input_id, None)
            container.to_cancel.discard(item.input_id)
            if call is not None:
                call.finish(
                    item.result,
                    data_format=item.data_format,
                    input_started_at=item.input_started_at,
                    output_created_at=item.output_created_at,
                    retry_count=item.retry_count,
                )
        self._fleet.scale(container.function)
        return Empty()

    async def FunctionCallPutDataOut(self, request: api_pb2.FunctionCallPutDataRequest) -> Empty:
        call = self._call(request.function_call_id)
        call.data_out.extend(request.data_chunks)
        call.changes.notify()
        return Empty()

    async def FunctionCallGetDataIn(self, request: api_pb2.FunctionCallGetDataRequest) -> AsyncIterator[api_pb2.DataChunk]:
        call = self._call(request.function_call_id)
        async for chunk in _stream(call, call.data_in, request.last_index):
            yield chunk


def _ready(container: Container) -> None:
    if not container.ready:
        container.ready = True
        container.changes.notify()
        container.function.changes.notify()


async def _stream(call: Call, chunks: list[api_pb2.DataChunk], sent: int) -> AsyncIterator[api_pb2.DataChunk]:
    """Yields the chunks after so many, until the call has finished."""

    def more() -> bool:
        return call.finished or len(chunks) > sent

    while await call.changes.until(more) and len(chunks) > sent:
        for chunk in chunks[sent:]:
            sent += 1
            yield chunk
