"""Events from threads reach the event loop in order, and wake the loop once for each step."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
from flywheel_server.engines.llama_cpp import handover
from flywheel_server.engines.llama_cpp.handover import Handover

from tests.serving import until

THREADS = 8


class Loop:
    """Counts how often the event loop is woken."""

    def __init__(self) -> None:
        self.wakes = 0
        self._loop = asyncio.get_running_loop()

    def call_soon_threadsafe(self, *arguments: object) -> None:
        self.wakes += 1
        self._loop.call_soon_threadsafe(*arguments)  # type: ignore[arg-type]


async def test_a_step_wakes_the_loop_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handover, "STEP_WAIT_SECONDS", 0.5)
    loop = Loop()
    given = Handover(loop)  # type: ignore[arg-type]
    given.threads = THREADS
    taken: list[int] = []
    step = Barrier(THREADS)

    def give(number: int) -> None:
        step.wait()
        given.call_soon(taken.append, number)

    with ThreadPoolExecutor(THREADS) as threads:
        for thread in range(THREADS):
            threads.submit(give, thread)
        await until(lambda: len(taken) == THREADS, "all events have arrived")
    assert sorted(taken) == list(range(THREADS))
    assert loop.wakes == 1


async def test_one_thread_waits_for_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handover, "STEP_WAIT_SECONDS", 3600)
    given = Handover(asyncio.get_running_loop())
    given.threads = 1
    taken: list[int] = []
    with ThreadPoolExecutor(1) as threads:
        for number in range(100):
            threads.submit(given.call_soon, taken.append, number)
        await until(lambda: len(taken) == 100, "all events have arrived")
    assert taken == list(range(100))
