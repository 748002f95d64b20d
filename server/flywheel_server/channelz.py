"""Serves grpc.channelz.v1, which shows the connections of this process, of all callers."""

import asyncio
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any, Final

import grpc
import grpc.aio
from grpc_channelz.v1 import channelz, channelz_pb2, channelz_pb2_grpc

from flywheel_server.interceptors.context import CallContext

SERVICE_NAME: Final[str] = channelz_pb2.DESCRIPTOR.services_by_name["Channelz"].full_name


def add_channelz(server: grpc.aio.Server) -> None:
    """Adds channelz to the server. The server itself is shown if it has the channel argument `grpc.enable_channelz`."""
    methods = [method.name for method in channelz_pb2.DESCRIPTOR.services_by_name["Channelz"].methods]
    servicer = SimpleNamespace(**{name: _writing(getattr(channelz.ChannelzServicer, name)) for name in methods})
    channelz_pb2_grpc.add_ChannelzServicer_to_server(servicer, server)


class _Status:
    """The status of a call of grpcio-channelz; a part of gRPC's `ServicerContext`."""

    def __init__(self) -> None:
        self.code = grpc.StatusCode.INTERNAL
        self.details = ""

    def set_code(self, code: grpc.StatusCode) -> None:
        self.code = code

    def set_details(self, details: str) -> None:
        self.details = details


def _writing(method: Callable[[Any, _Status], Any]) -> Callable[[Any, CallContext], Awaitable[None]]:
    """Returns a method of grpcio-channelz as one that writes its answer to the context, as all methods of this server do."""

    async def answer(request: Any, context: CallContext) -> None:  # noqa: ANN401 - any method's request
        status = _Status()
        # In a thread: gRPC describes up to a hundred connections in JSON, which has to be parsed.
        message = await asyncio.to_thread(method, request, status)
        if message is None:
            await context.abort(status.code, status.details)
        context.begin()
        await context.write(message)

    return answer
