"""A cancellation reaches the task that waits for Modal's client, even if the client would swallow it."""

import ast
import asyncio
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from flywheel_server.engines.modal.waits import modal_result
from modal import exception
from modal._utils.async_utils import synchronize_api

ROOT = Path(__file__).parent.parent.parent.parent
WAIT = "modal_result"
SOURCES = sorted((ROOT / "server").rglob("*.py"))
"""The client waits for whole readings of a directory, and may not import this helper; see `flywheel_client._modal`."""


class Race:
    """Work of Modal's client that is at its end when it is cancelled."""

    def __init__(self, outcome: BaseException | None) -> None:
        self.at_its_end = threading.Event()
        self.may_end = threading.Event()
        self.outcome = outcome

        async def work() -> str:
            self.at_its_end.set()
            # It holds the event loop of Modal's thread, so that a cancellation from outside arrives behind its end.
            self.may_end.wait(10)
            if self.outcome is not None:
                raise self.outcome
            return "the result"

        # It is run by Modal's own synchronizer, as each method of its client is.
        self.aio: Callable[[], Awaitable[str]] = synchronize_api(work).aio  # type: ignore[no-untyped-call]

    async def cancelled_by(self, cancel: Callable[[], object]) -> None:
        await asyncio.to_thread(self.at_its_end.wait, 10)
        cancel()
        await asyncio.sleep(0.05)
        self.may_end.set()


OUTCOMES = [None, TimeoutError("no result yet"), exception.ServiceError("unavailable")]


@pytest.mark.parametrize("outcome", OUTCOMES[1:])
async def test_modal_itself_swallows_a_cancellation(outcome: BaseException | None) -> None:
    """If this fails, Modal's client no longer needs `modal_result`."""
    race = Race(outcome)
    waiting = asyncio.ensure_future(race.aio())
    await race.cancelled_by(waiting.cancel)
    await asyncio.wait({waiting})
    assert not waiting.cancelled()


@pytest.mark.parametrize("outcome", OUTCOMES)
async def test_a_cancel_is_never_swallowed(outcome: BaseException | None) -> None:
    race = Race(outcome)
    waiting = asyncio.ensure_future(modal_result(race.aio()))
    await race.cancelled_by(waiting.cancel)
    await asyncio.wait({waiting})
    assert waiting.cancelled()


@pytest.mark.parametrize("outcome", OUTCOMES)
async def test_a_deadline_is_never_swallowed(outcome: BaseException | None) -> None:
    race = Race(outcome)
    loop = asyncio.get_running_loop()

    async def wait() -> str:
        async with asyncio.timeout(None) as deadline:
            passing = asyncio.ensure_future(race.cancelled_by(lambda: deadline.reschedule(loop.time())))
            await modal_result(race.aio())
            await passing
            return "went on"
        return "never"

    with pytest.raises(TimeoutError) as caught:
        await wait()
    assert caught.value is not outcome


async def test_a_cancel_does_not_wait_for_modal() -> None:
    race = Race(None)
    waiting = asyncio.ensure_future(modal_result(race.aio()))
    await asyncio.to_thread(race.at_its_end.wait, 10)
    waiting.cancel()
    await asyncio.wait({waiting}, timeout=5)
    assert waiting.cancelled()
    race.may_end.set()


async def test_results_and_errors_come_through() -> None:
    async def raise_(error: BaseException) -> None:
        raise error

    race = Race(None)
    race.may_end.set()
    assert await modal_result(race.aio()) == "the result"
    # A task that raises a SystemExit would end the event loop.
    for error in (ValueError("why"), SystemExit(1)):
        with pytest.raises(type(error)) as caught:
            await modal_result(raise_(error))
        assert caught.value is error


async def test_a_cancel_of_modals_own_is_none_of_the_callers() -> None:
    async def work() -> None:
        raise asyncio.CancelledError

    with pytest.raises(exception.ClientClosed):
        await modal_result(work())


def bare_waits(source: str) -> list[int]:
    """Returns the lines on which a method of Modal's is called outside the argument of `modal_result`.

    A function of the same module counts as inside if it is called only in such an argument.
    """
    tree = ast.parse(source)
    nodes: list[Any] = list(ast.walk(tree))
    calls = [node for node in nodes if isinstance(node, ast.Call)]
    guarded = [
        call.args[0] for call in calls if isinstance(call.func, ast.Name) and call.func.id == "modal_result" and call.args
    ]
    uses = [node.id for node in nodes if isinstance(node, ast.Name)]
    waited_for = [node.func.id for node in guarded if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    functions = [
        node
        for node in nodes
        if isinstance(node, ast.AsyncFunctionDef) and waited_for.count(node.name) == uses.count(node.name) > 0
    ]
    inside = {id(node) for root in (*guarded, *functions) for node in ast.walk(root)}
    return [
        call.lineno
        for call in calls
        if isinstance(call.func, ast.Attribute) and call.func.attr == "aio" and id(call) not in inside
    ]


@pytest.mark.parametrize(
    "line",
    [
        "await f.aio()",
        "async with asyncio.timeout(1): await f.get.aio(2)",
        "[x async for x in d.items.aio()]",
        "g(f.aio())",
        "await items(); await modal_result(items())\nasync def items(): return [x async for x in d.items.aio()]",
    ],
)
def test_the_walk_finds_a_bare_wait(line: str) -> None:
    assert bare_waits(f"async def main():\n    {line}") != []


@pytest.mark.parametrize(
    "line",
    [
        "await modal_result(f.aio())",
        "await modal_result(items())\nasync def items(): return [x async for x in d.items.aio()]",
    ],
)
def test_the_walk_takes_what_is_waited_for(line: str) -> None:
    assert bare_waits(f"async def main():\n    {line}") == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_nothing_waits_for_modal_directly(path: Path) -> None:
    assert bare_waits(path.read_text(encoding="utf-8")) == []
