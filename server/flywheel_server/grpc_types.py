"""Short names for types of grpc."""

from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

import grpc
import grpc.aio

GrpcContext = grpc.aio.ServicerContext[Any, Any]
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"  # not subscriptable at run time
Continuation = Callable[[grpc.HandlerCallDetails], Awaitable[Any]]
