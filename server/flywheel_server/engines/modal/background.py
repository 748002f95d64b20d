"""Tasks that belong to no call."""

import asyncio
import contextvars
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


def start_in_background(work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    """Starts a task in an empty context, so that its log lines do not have the request id of the call that starts it."""
    return asyncio.create_task(work, context=contextvars.Context())
