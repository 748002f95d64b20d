"""Adds methods to a server of gRPC that are called seldom, so that the others do not pay for them."""

from collections.abc import Sequence

import grpc
import grpc.aio


class Unregistered:
    """A server of gRPC that does not register the methods that are added to it. They are found by their name all the same.

    grpc.aio waits for the next call of each registered method separately, in the newer versions that it supports (such as
    1.85.1), and for those of all other methods together. Each of these waits costs every call a microsecond or two, whichever
    its method.
    """

    def __init__(self, server: grpc.aio.Server) -> None:
        self._server = server

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        """Adds handlers; see `grpc.aio.Server`."""
        self._server.add_generic_rpc_handlers(handlers)

    def add_registered_method_handlers(self, service_name: str, method_handlers: object) -> None:
        """Does nothing: generated code adds the same handlers with `add_generic_rpc_handlers` too."""
