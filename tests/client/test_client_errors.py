"""Statuses with google.rpc details become exceptions, alike in both clients."""

from __future__ import annotations

import copy
import pickle
from typing import TYPE_CHECKING

import flywheel_client
import grpc
import pytest
from flywheel_client import AsyncClient, Client, FieldViolation, FlywheelError, InvalidArgumentError, QuotaViolation
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, Help, QuotaFailure, RetryInfo

if TYPE_CHECKING:
    from tests.client.conftest import FakeService

EXCEPTIONS = {
    grpc.StatusCode.INVALID_ARGUMENT: flywheel_client.InvalidArgumentError,
    grpc.StatusCode.UNAUTHENTICATED: flywheel_client.UnauthenticatedError,
    grpc.StatusCode.FAILED_PRECONDITION: flywheel_client.FailedPreconditionError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: flywheel_client.ResourceExhaustedError,
    grpc.StatusCode.DEADLINE_EXCEEDED: flywheel_client.DeadlineExceededError,
    grpc.StatusCode.UNAVAILABLE: flywheel_client.UnavailableError,
    grpc.StatusCode.CANCELLED: flywheel_client.CallCancelledError,
    grpc.StatusCode.INTERNAL: flywheel_client.InternalError,
    grpc.StatusCode.UNIMPLEMENTED: FlywheelError,
}


async def errors_of(fake: FakeService) -> list[FlywheelError]:
    """Returns what every way to make the failing call raises."""
    caught = []
    with Client(fake.address, retry=None) as client:
        with pytest.raises(FlywheelError) as stream:
            list(client.generate("p", max_tokens=1, request_id="r1"))
        with pytest.raises(FlywheelError) as unary:
            client.generate_all("p", max_tokens=1, request_id="r1")
        caught += [stream.value, unary.value]
    async with AsyncClient(fake.address, retry=None) as async_client:
        with pytest.raises(FlywheelError) as stream:
            assert [sample async for sample in async_client.generate("p", max_tokens=1, request_id="r1")]
        with pytest.raises(FlywheelError) as unary:
            await async_client.generate_all("p", max_tokens=1, request_id="r1")
        caught += [stream.value, unary.value]
    return caught


def test_every_exception_is_tested() -> None:
    public = {value for name in flywheel_client.__all__ if isinstance(value := getattr(flywheel_client, name), type)}
    assert {value for value in public if issubclass(value, Exception)} == set(EXCEPTIONS.values())


@pytest.mark.parametrize("code", EXCEPTIONS, ids=lambda code: code.name)
async def test_status_becomes_its_exception(fake: FakeService, code: grpc.StatusCode) -> None:
    fake.fail(code, "what to do", ErrorInfo(reason="WHY", domain="flywheel.v1"))
    for error in await errors_of(fake):
        assert type(error) is EXCEPTIONS[code]
        assert (error.code, error.message, error.reason, error.request_id) == (code, "what to do", "WHY", "r1")
        assert error.retry_delay is None
        assert str(error) == f"{code.name}: what to do"


async def test_an_error_after_messages(fake: FakeService) -> None:
    fake.fail(grpc.StatusCode.INTERNAL, "the engine failed", ErrorInfo(reason="ENGINE_FAILED", domain="flywheel.v1"))
    with Client(fake.address, retry=None) as client, client.generate_deltas("p", max_tokens=1) as deltas:
        assert [next(deltas).text, next(deltas).text] == ["ab", "c"]
        with pytest.raises(flywheel_client.InternalError):
            next(deltas)
        assert list(deltas) == []


async def test_violations(fake: FakeService) -> None:
    violations = [
        BadRequest.FieldViolation(field="max_tokens", description="must be 1 to 2048"),
        BadRequest.FieldViolation(field="stop[1]", description="must not be empty"),
    ]
    fake.fail(grpc.StatusCode.INVALID_ARGUMENT, "two fields", BadRequest(field_violations=violations))
    for error in await errors_of(fake):
        assert isinstance(error, InvalidArgumentError)
        assert error.violations == [
            FieldViolation("max_tokens", "must be 1 to 2048"),
            FieldViolation("stop[1]", "must not be empty"),
        ]


async def test_retry_delay_in_seconds(fake: FakeService) -> None:
    retry = RetryInfo(retry_delay=Duration(seconds=1, nanos=500_000_000))
    fake.fail(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", Help(), retry, ErrorInfo(reason="OVERLOADED"))
    for error in await errors_of(fake):
        assert (error.retry_delay, error.reason) == (1.5, "OVERLOADED")


async def test_quotas(fake: FakeService) -> None:
    failure = QuotaFailure(violations=[QuotaFailure.Violation(subject="ci", description="100 tokens per minute")])
    fake.fail(grpc.StatusCode.RESOURCE_EXHAUSTED, "used up", failure, ErrorInfo(reason="QUOTA_EXCEEDED"))
    for error in await errors_of(fake):
        assert isinstance(error, flywheel_client.ResourceExhaustedError)
        assert error.quota_violations == [QuotaViolation("ci", "100 tokens per minute")]
        assert error.retry_delay is None


async def test_the_request_id_of_a_refusal_is_in_its_trailers(fake: FakeService) -> None:
    fake.refuses = True
    fake.request_id = "theirs"
    fake.fail(grpc.StatusCode.UNAVAILABLE, "stopping")
    assert {error.request_id for error in await errors_of(fake)} == {"theirs"}


@pytest.mark.parametrize("garbled", [b"\xff\xff\xff", b""])
async def test_garbled_status_details_do_not_hide_the_status(fake: FakeService, garbled: bytes) -> None:
    fake.failure = (grpc.StatusCode.UNAVAILABLE, "starting", (("grpc-status-details-bin", garbled),))
    for error in await errors_of(fake):
        assert isinstance(error, flywheel_client.UnavailableError)
        assert (error.message, error.retry_delay) == ("starting", None)


async def test_one_garbled_detail_does_not_hide_the_others(fake: FakeService) -> None:
    retry = RetryInfo(retry_delay=Duration(seconds=7))
    fake.fail(grpc.StatusCode.UNAVAILABLE, "starting", retry, ErrorInfo(reason="ENGINE_UNAVAILABLE"))
    assert fake.failure is not None
    code, message, ((key, details),) = fake.failure
    # The length of the duration within RetryInfo now exceeds the RetryInfo.
    garbled = details.replace(b"\n\x02\x08\x07", b"\n\x09\x08\x07")
    assert garbled != details
    fake.failure = (code, message, ((key, garbled),))
    for error in await errors_of(fake):
        assert (error.reason, error.retry_delay) == ("ENGINE_UNAVAILABLE", None)


async def test_an_unreachable_server_is_unavailable() -> None:
    with Client("127.0.0.1:1", retry=None) as client, pytest.raises(flywheel_client.UnavailableError) as caught:
        client.generate_all("p", max_tokens=1, request_id="r1")
    assert caught.value.request_id == "r1"


def test_errors_travel_between_processes() -> None:
    error = InvalidArgumentError(
        grpc.StatusCode.INVALID_ARGUMENT, "no", violations=[FieldViolation("top_p", "must be at most 1")], reason="WHY"
    )
    for copied in (pickle.loads(pickle.dumps(error)), copy.copy(error)):  # noqa: S301 - our own bytes
        assert isinstance(copied, InvalidArgumentError)
        assert (str(copied), copied.reason, copied.violations) == (str(error), "WHY", error.violations)
