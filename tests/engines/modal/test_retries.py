"""How long an error of Modal's must last before it is believed, and how often a request is made again."""

from collections.abc import Iterator

import pytest
from flywheel_server import running_time
from flywheel_server.engines.base import EngineOverloadedError, EngineSetupError, EngineUnavailableError
from flywheel_server.engines.modal.retries import (
    CONFIRMATION_SECONDS,
    MAX_DELAY,
    MAX_RETRY_AFTER,
    Backoff,
    RetryPolicy,
    retry_refused,
)
from modal import exception

TRANSIENT = EngineUnavailableError("out of reach")
REFUSED = EngineSetupError("no such class", {})
TIMEOUT = 600.0


class Clock:
    now = 1000.0

    def time(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    clock = Clock()
    with monkeypatch.context() as patch:
        patch.setattr(running_time, "now", clock.time)
        yield clock


def test_delays_grow_to_a_limit_and_vary() -> None:
    backoffs = [Backoff() for _ in range(20)]
    delays = [[backoff.delay(TRANSIENT) for _ in range(50)] for backoff in backoffs]
    for first, second, *_, last in delays:
        assert first < second < last <= 1.25 * MAX_DELAY
    assert len({first for first, *_ in delays}) > 1


def test_what_modal_asks_for_comes_on_top_within_reason() -> None:
    assert Backoff().delay(EngineOverloadedError("limited", 7.0)) > 7
    assert Backoff().delay(EngineOverloadedError("limited", 1e9)) < MAX_RETRY_AFTER + MAX_DELAY


def test_a_transient_error_is_believed_after_the_timeout(clock: Clock) -> None:
    policy = RetryPolicy(TIMEOUT)
    policy.delay(TRANSIENT, is_transient=True)
    clock.now += TIMEOUT - 1
    policy.delay(TRANSIENT, is_transient=True)
    clock.now += 1
    with pytest.raises(EngineUnavailableError):
        policy.delay(TRANSIENT, is_transient=True)


def test_a_permanent_error_is_believed_once_it_has_lasted(clock: Clock) -> None:
    policy = RetryPolicy(TIMEOUT)
    policy.delay(REFUSED, is_transient=False)
    clock.now += CONFIRMATION_SECONDS - 1
    policy.delay(REFUSED, is_transient=False)
    clock.now += 1
    with pytest.raises(EngineSetupError):
        policy.delay(REFUSED, is_transient=False)


@pytest.mark.parametrize("success", [True, False])
def test_another_answer_restarts_the_confirmation(clock: Clock, *, success: bool) -> None:
    policy = RetryPolicy(TIMEOUT)
    policy.delay(REFUSED, is_transient=False)
    clock.now += CONFIRMATION_SECONDS - 1
    if success:
        policy.reset()
        assert policy.failures == 0
    else:
        policy.delay(TRANSIENT, is_transient=True)
    clock.now += 1
    policy.delay(REFUSED, is_transient=False)
    clock.now += CONFIRMATION_SECONDS - 1
    policy.delay(REFUSED, is_transient=False)


async def test_a_refused_request_is_made_three_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flywheel_server.engines.modal.retries.FIRST_DELAY", 0.001)
    made: list[int] = []

    async def request(refusals: int, error: Exception) -> str:
        made.append(1)
        if len(made) <= refusals:
            raise error
        return "done"

    assert await retry_refused(lambda: request(2, exception.ConflictError("x"))) == "done"
    made.clear()
    with pytest.raises(exception.NotFoundError):
        await retry_refused(lambda: request(3, exception.NotFoundError("x")))
    assert len(made) == 3
    made.clear()
    # Modal may have accepted a request that failed with this error.
    with pytest.raises(exception.ServiceError):
        await retry_refused(lambda: request(1, exception.ServiceError("x")))
    assert len(made) == 1
