"""Adds rarely called methods to a gRPC server in a way that does not slow the other methods down."""

from collections.abc import Sequence

import grpc
import grpc.aio


class Unregistered:
    """Wraps a gRPC server so that methods are added without registering them; gRPC finds them by name.

    Newer versions of grpc.aio (such as 1.85.1) wait for calls of each registered method separately, and for calls of all other
    methods together. Each of these waits costs every call of any method one or two microseconds.
    """

    def __init__(self, server: grpc.aio.Server) -> None:
        self._server = server

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        """See `grpc.aio.Server.add_generic_rpc_handlers`."""
        self._server.add_generic_rpc_handlers(handlers)

    def add_registered_method_handlers(self, service_name: str, method_handlers: object) -> None:
        """Does nothing, because generated code adds the same handlers with `add_generic_rpc_handlers` too."""
