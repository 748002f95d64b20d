"""How long calls are expected to wait: service times, retry delays, and deadlines that cannot be met."""

import pytest
from flywheel_server.admission import (
    DEFAULT_SERVICE_TIME,
    MAX_MEASURED_CALLERS,
    MAX_MEASURED_CALLS,
    MIN_MEASURED_CALLS,
    ServiceTimes,
)
from flywheel_server.errors import DeadlineExceededError, ServerFullError

from tests.server.crowd import Clock, crowd, learn


async def test_each_refused_call_gets_a_later_time_to_retry_until_all_have_left() -> None:
    clock = Clock()
    async with crowd(4, max_queued=2, clock=clock) as people:
        await learn(people, clock, *[8] * MIN_MEASURED_CALLS)
        for name in "abcd":
            await people.come(name)
        await people.come("e", 2)
        delays = []
        for _ in range(9):
            with pytest.raises(ServerFullError) as caught:
                await people.come("f")
            delays.append(caught.value.retry_delay)
        # One of the four leaves every two seconds, so all six samples have left after 12 seconds.
        assert delays == pytest.approx([2, 4, 6, 8, 10, 12, 12, 12, 12])
        clock.now += 100
        with pytest.raises(ServerFullError) as caught:
            await people.come("g", 2)
        assert caught.value.retry_delay == pytest.approx(4)


async def test_before_anything_is_known_the_retry_delay_is_a_guess() -> None:
    async with crowd(1, max_queued=0) as people:
        await people.come("a")
        with pytest.raises(ServerFullError) as caught:
            await people.come("b")
        assert caught.value.retry_delay == DEFAULT_SERVICE_TIME


async def test_a_deadline_that_cannot_be_met_is_refused_at_once() -> None:
    clock = Clock()
    async with crowd(2, clock=clock) as people:
        await learn(people, clock, *[10] * MIN_MEASURED_CALLS)
        for name in "abc":
            await people.come(name)
        # One leaves every five seconds: c starts after five, and the next call after ten.
        with pytest.raises(DeadlineExceededError) as caught:
            await people.come("hasty", time_remaining=9.9)
        assert caught.value.reason == "IN_QUEUE"
        await people.come("patient", time_remaining=10.1)
        await people.come("urgent", time_remaining=5.1, priority=1)
        assert people.admission.queued == 3


async def test_a_deadline_that_has_passed_does_not_wait() -> None:
    async with crowd(1) as people:
        await people.come("a")
        with pytest.raises(DeadlineExceededError):
            await people.come("late", time_remaining=-0.1)
        await people.come("unbounded")
        assert people.admission.queued == 1


async def test_the_service_time_follows_what_is_measured() -> None:
    clock = Clock()
    async with crowd(2, clock=clock) as people:
        await learn(people, clock, *[10] * (MIN_MEASURED_CALLS - 1))
        assert people.admission.service_times.of("") is None
        await learn(people, clock, 10)
        assert people.admission.service_times.of("") == 10
        await learn(people, clock, 600)
        assert people.admission.service_times.of("") == 10, "one long call does not change the median"
        await learn(people, clock, *[20] * MAX_MEASURED_CALLS)
        assert people.admission.service_times.of("") == 20


def test_each_caller_has_a_service_time_of_its_own() -> None:
    times = ServiceTimes()
    for _ in range(MIN_MEASURED_CALLS):
        times.add("slow", 600)
    assert (times.of("slow"), times.of("quick")) == (600, None)
    for _ in range(MIN_MEASURED_CALLS):
        times.add("quick", 1)
    assert (times.of("slow"), times.of("quick")) == (600, 1)


def test_the_service_times_of_the_least_recently_active_callers_are_dropped() -> None:
    times = ServiceTimes()
    for caller in range(MAX_MEASURED_CALLERS + 1):
        for _ in range(MIN_MEASURED_CALLS):
            times.add(str(caller), 1)
    assert times.of("0") is None
    assert times.of("1") == times.of(str(MAX_MEASURED_CALLERS)) == 1


async def test_one_call_of_many_samples_is_one_call() -> None:
    clock = Clock()
    async with crowd(8, clock=clock) as people:
        await people.come("many", 8)
        clock.now += 60
        await people.leave("many")
        assert people.admission.service_times.of("") is None
        for number in range(16):
            await people.come(str(number), time_remaining=2)
        assert len(people.inside) == 8


@pytest.mark.parametrize("samples", [1, 8])
async def test_no_caller_sets_how_long_the_others_seem_to_take(samples: int) -> None:
    clock = Clock()
    async with crowd(8, clock=clock) as people:
        for _ in range(MAX_MEASURED_CALLS):
            await people.come("long", samples, of="heavy")
            clock.now += 600
            await people.leave("long")
        for number in range(16):
            await people.come(str(number), of="light", time_remaining=2)
        assert (len(people.inside), people.admission.queued) == (8, 8)


async def test_a_wait_behind_the_long_calls_of_another_caller_is_long() -> None:
    clock = Clock()
    async with crowd(2, clock=clock) as people:
        for _ in range(MIN_MEASURED_CALLS):
            await people.come("long", of="heavy")
            clock.now += 600
            await people.leave("long")
        await people.come("a", of="heavy")
        await people.come("b", of="heavy")
        with pytest.raises(DeadlineExceededError):
            await people.come("hasty", of="light", time_remaining=100)
        await people.come("patient", of="light", time_remaining=1000)


async def test_cancelled_calls_do_not_count_for_the_service_time() -> None:
    clock = Clock()
    async with crowd(2, clock=clock) as people:
        await learn(people, clock, *[10] * MIN_MEASURED_CALLS)
        for _ in range(MAX_MEASURED_CALLS):
            await people.come("hasty")
            await people.give_up("hasty")
        assert people.admission.service_times.of("") == 10
