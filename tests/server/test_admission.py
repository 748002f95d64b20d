"""Admission: which calls start, which wait, and which are refused."""

import asyncio

import pytest
from flywheel_server.errors import ServerFullError

from tests.server.crowd import crowd
from tests.serving import settled


async def test_first_come_first_served() -> None:
    async with crowd(2) as people:
        for name in "abcd":
            await people.come(name)
        assert people.inside == ["a", "b"]
        assert (people.admission.active, people.admission.queued) == (2, 2)
        await people.leave("b")
        assert people.inside == ["a", "c"]
        await people.leave("a")
        assert people.inside == ["c", "d"]


async def test_a_call_weighs_its_samples_and_nobody_overtakes_it() -> None:
    async with crowd(4) as people:
        await people.come("a", 3)
        await people.come("big", 3)
        await people.come("small", 1)
        assert people.inside == ["a"], "there is a slot for the small call, but the big one is first"
        await people.leave("a")
        assert people.inside == ["big", "small"]


async def test_a_call_that_gives_up_lets_the_calls_behind_it_in() -> None:
    async with crowd(4) as people:
        await people.come("a", 3)
        await people.come("big", 3)
        await people.come("small", 1)
        await people.give_up("big")
        assert people.inside == ["a", "small"]


async def test_a_call_with_more_samples_than_may_ever_run_runs_alone() -> None:
    async with crowd(4) as people:
        await people.come("a")
        await people.come("huge", 9)
        assert people.inside == ["a"]
        await people.leave("a")
        assert people.inside == ["huge"]
        await people.come("b")
        assert people.inside == ["huge"]


async def test_a_higher_priority_is_served_first() -> None:
    async with crowd(1) as people:
        await people.come("a")
        await people.come("low")
        await people.come("high", priority=5)
        await people.come("high too", priority=5)
        await people.come("lowest", priority=-1)
        for expected in ("high", "high too", "low", "lowest"):
            await people.leave(people.inside[0])
            assert people.inside == [expected]


async def test_a_higher_priority_does_not_wait_for_a_large_call_of_a_lower_one() -> None:
    async with crowd(4) as people:
        await people.come("a", 3)
        await people.come("large", 4)
        await people.come("urgent", 1, priority=1)
        assert people.inside == ["a", "urgent"]


async def test_a_call_for_which_the_queue_has_no_place_is_refused() -> None:
    async with crowd(1, max_queued=3) as people:
        await people.come("a")
        await people.come("b", 1)
        await people.come("c", 1)
        await people.come("d", 1)
        with pytest.raises(ServerFullError):
            await people.come("e")
        await people.give_up("c")
        await people.come("f")
        assert people.admission.queued == 3


async def test_without_a_queue_a_call_that_cannot_start_is_refused() -> None:
    async with crowd(2, max_queued=0) as people:
        await people.come("a")
        await people.come("b")
        with pytest.raises(ServerFullError):
            await people.come("c")
        await people.leave("a")
        await people.come("c")
        assert people.inside == ["b", "c"]


async def test_a_call_whose_prompt_is_being_read_is_overtaken_but_keeps_its_place() -> None:
    async with crowd(1, max_queued=3) as people:
        is_read = asyncio.Event()
        await people.come("unread", prompt_is_read=is_read)
        await people.come("a")
        await people.come("b")
        assert people.inside == ["a"]
        assert people.admission.queued == 2
        is_read.set()
        await settled()
        await people.leave("a")
        assert people.inside == ["unread"], "it came first"
        await people.leave("unread")
        assert people.inside == ["b"]


async def test_while_its_prompt_is_read_a_call_holds_a_place_in_the_queue() -> None:
    async with crowd(1, max_queued=1) as people:
        is_read = asyncio.Event()
        await people.come("unread", prompt_is_read=is_read)
        await people.come("unread too", prompt_is_read=is_read)
        with pytest.raises(ServerFullError):
            await people.come("c")
        await people.come("urgent", priority=1)
        assert people.inside == ["urgent"]
        is_read.set()
        with pytest.raises(ServerFullError):
            await people.rejected("unread too")


async def test_a_higher_priority_evicts_lower_ones_from_a_full_queue() -> None:
    async with crowd(2, max_queued=3) as people:
        await people.come("a", 2)
        await people.come("low", priority=-1)
        await people.come("low too", priority=-1)
        await people.come("middle")
        await people.come("high", priority=1)
        with pytest.raises(ServerFullError):
            await people.rejected("low too")
        assert people.admission.queued == 3
        for name in ("nobody", "nobody else"):
            with pytest.raises(ServerFullError):
                await people.come(name, 2)
        await people.come("highest", 2, priority=2)
        for name in ("low", "middle"):
            with pytest.raises(ServerFullError):
                await people.rejected(name)
        await people.leave("a")
        assert people.inside == ["highest"]
        await people.leave("highest")
        assert people.inside == ["high"]


async def test_no_more_samples_are_admitted_than_the_engine_has_slots() -> None:
    async with crowd(10) as people:
        people.admission.set_capacity(2, None)
        for name in "abc":
            await people.come(name)
        assert people.inside == ["a", "b"]
        people.admission.set_capacity(None, None)
        await settled()
        assert people.inside == ["a", "b", "c"]
        people.admission.set_capacity(50, None)
        for name in "defghijk":
            await people.come(name)
        assert len(people.inside) == 10
