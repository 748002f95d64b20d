"""Deadlines end what runs within them as `asyncio.timeout` does: in time, once, and not what comes after."""

import asyncio
from collections.abc import Callable

import pytest
from flywheel_server.deadline import Deadline

from tests.serving import settled


async def until_it_ends(deadline: Deadline, ended: Callable[[], None] = lambda: None) -> None:
    with deadline:
        try:
            await asyncio.Event().wait()
        finally:
            ended()


def now() -> float:
    return asyncio.get_running_loop().time()


@pytest.mark.parametrize("seconds", [-1, 0, 0.01])
async def test_what_runs_when_the_time_comes_ends(seconds: float) -> None:
    deadline = Deadline(now() + seconds)
    with pytest.raises(TimeoutError):
        await until_it_ends(deadline)
    assert deadline.has_expired
    await settled()
    assert not (task := asyncio.current_task()) or not task.cancelling()


async def test_what_has_ended_before_is_left_alone() -> None:
    with Deadline(now() + 0.01) as deadline:
        pass
    deadline.expire()
    await asyncio.sleep(0.02)
    assert not deadline.has_expired


async def test_to_expire_ends_what_runs_once() -> None:
    deadline = Deadline(None)
    task = asyncio.create_task(until_it_ends(deadline))
    await settled()
    deadline.expire()
    deadline.expire()
    with pytest.raises(TimeoutError):
        await task
    assert not task.cancelling()


async def test_what_expires_from_within_ends_at_its_next_wait() -> None:
    steps: list[str] = []

    async def expire_and_wait() -> None:
        with Deadline(None) as deadline:
            deadline.expire()
            steps.append("goes on")
            await asyncio.Event().wait()

    with pytest.raises(TimeoutError):
        await expire_and_wait()
    assert steps == ["goes on"]


async def test_what_expires_and_is_done_at_once_does_not_end() -> None:
    with Deadline(None) as deadline:
        deadline.expire()
    await settled()


@pytest.mark.parametrize("first", ["deadline", "others"])
async def test_a_cancellation_by_others_goes_on(first: str) -> None:
    deadline = Deadline(None)
    task = asyncio.create_task(until_it_ends(deadline))
    await settled()
    if first == "deadline":
        deadline.expire()
        asyncio.get_running_loop().call_soon(task.cancel)
    else:
        deadline.expire()
        task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_an_error_while_it_ends_is_raised() -> None:
    def fail() -> None:
        raise KeyError

    with pytest.raises(KeyError):
        await until_it_ends(Deadline(now()), fail)
