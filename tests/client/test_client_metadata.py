"""Metadata that gRPC cannot carry are refused when a client is made, by both clients alike."""

from typing import Any

import pytest
from flywheel_client import AsyncClient, Client

from tests.client.conftest import Caller, FakeService

INVALID: list[tuple[Any, type[Exception], str]] = [
    ([("Tenant", "a")], ValueError, "Tenant"),
    ([("", "a")], ValueError, "''"),
    ([("a b", "a")], ValueError, "a b"),
    ([("ä", "a")], ValueError, "ä"),
    ([(":path", "a")], ValueError, ":path"),
    ([("tenant\n", "a")], ValueError, "tenant"),
    ([("grpc-timeout", "1S")], ValueError, "grpc-timeout"),
    ([("grpc-own-bin", b"")], ValueError, "grpc-own-bin"),
    ([("te", "a")], ValueError, "te"),
    ([("connection", "close")], ValueError, "connection"),
    ([("tenant", "ä")], ValueError, "tenant"),
    ([("tenant", "a\nb")], ValueError, "tenant"),
    ([("tenant", "a\0")], ValueError, "tenant"),
    ([("tenant", " a")], ValueError, "tenant"),
    ([("first", "a"), ("tenant", b"a")], TypeError, "tenant"),
    ([("tenant", None)], TypeError, "tenant"),
    ([("tenant", 5)], TypeError, "tenant"),
    ([("tenant-bin", "a")], TypeError, "tenant-bin"),
    ([("tenant-bin", None)], TypeError, "tenant-bin"),
    ([(b"tenant", "a")], TypeError, "tenant"),
    ([(None, "a")], TypeError, "None"),
    ([("tenant",)], TypeError, "pairs"),
    ([("tenant", "a", "b")], TypeError, "pairs"),
    ([None], TypeError, "pairs"),
    (["ab"], TypeError, "pairs"),
    ({"tenant": "a"}, TypeError, "pairs"),
    ("ab", TypeError, "pairs"),
    (None, TypeError, "pairs"),
    (5, TypeError, "pairs"),
]


@pytest.mark.parametrize(("metadata", "kind", "named"), INVALID, ids=[repr(each[0]) for each in INVALID])
def test_metadata_that_grpc_cannot_carry_are_refused(metadata: Any, kind: type[Exception], named: str) -> None:
    messages = set()
    for client in (Client, AsyncClient):
        with pytest.raises(kind, match=named) as caught:
            client("localhost:1", metadata=metadata)
        messages.add(str(caught.value))
    (message,) = messages
    assert message.startswith("metadata")


@pytest.mark.parametrize("kind", [Client, AsyncClient])
async def test_metadata_that_grpc_can_carry_arrive(fake: FakeService, kind: type) -> None:
    metadata = [("tenant", "a, b~"), ("empty", ""), ("x_1.2-3", "c"), ("raw-bin", bytes(range(256))), ("none-bin", b"")]
    caller = Caller(kind, fake.address, metadata=metadata)
    await caller.call()
    await caller.close()
    assert dict(metadata).items() <= fake.metadata[0].items()
