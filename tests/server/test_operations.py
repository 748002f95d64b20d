"""Operations of gRPC go on when nobody waits for them any more, and no wait for an operation outlasts its timeout."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
import pytest
from flywheel_server import running_time
from flywheel_server.engines.base import EngineUnavailableError
from flywheel_server.errors import IncompleteRequestError
from flywheel_server.operations import Operation, OperationWaiter

from tests.serving import settled, until

TIMEOUT = 0.3


class Steps:
    """An operation in steps, each of which the test lets it make."""

    def __init__(self, *steps: Any) -> None:
        self.steps = [asyncio.get_running_loop().create_future() for _ in steps]
        self.seen: list[Any] = []
        self._outcome = steps

    async def run(self) -> Any:
        for step, outcome in zip(self.steps, self._outcome, strict=True):
            await step
            self.seen.append(outcome)
            if isinstance(outcome, Exception):
                raise outcome
        return self.seen[-1] if self.seen else "at once"


async def finish(steps: Steps) -> None:
    for step in steps.steps:
        step.set_result(None)
        await settled()


@pytest.mark.parametrize("outcomes", [(), (1,), (1, 2)])
async def test_an_operation_has_a_result(outcomes: tuple[int, ...]) -> None:
    steps = Steps(*outcomes)
    operation = Operation(steps.run())
    await finish(steps)
    assert operation.is_over
    assert await operation.result == (outcomes[-1] if outcomes else "at once")
    await operation.end()


@pytest.mark.parametrize("outcomes", [(KeyError("x"),), (1, KeyError("x"))])
async def test_an_operation_that_fails_raises_and_nobody_complains_if_nobody_looks(outcomes: tuple[Any, ...]) -> None:
    complaints: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    for is_looked_at in (True, False):
        steps = Steps(*outcomes)
        operation = Operation(steps.run())
        await finish(steps)
        if is_looked_at:
            with pytest.raises(KeyError):
                await operation.result
        await operation.end()
        del operation, steps
    await settled()
    assert not complaints


GIVE_UP: dict[str, Callable[[asyncio.Task[Any], Operation[Any]], object]] = {
    "the task is cancelled": lambda task, _: task.cancel(),
    "the wait gets an error": lambda _, operation: operation.result.set_exception(TimeoutError()),
}


@pytest.mark.parametrize("how", GIVE_UP)
@pytest.mark.parametrize("after", [0, 1])
@pytest.mark.parametrize("outcome", [2, KeyError("x")])
async def test_an_operation_goes_on_when_nobody_waits_for_it_any_more(how: str, after: int, outcome: Any) -> None:
    steps = Steps(1, outcome)
    operation = Operation(steps.run())

    async def wait() -> Any:
        return await operation.result

    task = asyncio.create_task(wait())
    await settled()
    for step in steps.steps[:after]:
        step.set_result(None)
        await settled()
    GIVE_UP[how](task, operation)
    with pytest.raises((asyncio.CancelledError, TimeoutError)):
        await task
    assert not operation.is_over
    end = operation.end()
    for step in steps.steps[after:]:
        assert not step.cancelled()
        step.set_result(None)
        await settled()
    assert steps.seen == [1, outcome]
    assert operation.is_over
    assert end.done()


def never() -> Operation[Any]:
    return Operation(Steps(1).run())


async def ending(waiting: Awaitable[Any]) -> tuple[type[BaseException] | None, float]:
    """Returns how a wait ended, and after how many seconds."""
    began = time.monotonic()
    try:
        await waiting
    except (IncompleteRequestError, EngineUnavailableError) as error:
        return type(error), time.monotonic() - began
    return None, time.monotonic() - began


async def test_each_wait_ends_in_its_own_time() -> None:
    waits = OperationWaiter(TIMEOUT, IncompleteRequestError)
    endings = []
    for _ in range(6):
        endings.append(asyncio.ensure_future(ending(waits.wait(never()))))
        await asyncio.sleep(TIMEOUT / 4)
    for error, seconds in await asyncio.gather(*endings):
        assert error is IncompleteRequestError
        # The two seconds are for a busy machine.
        assert TIMEOUT * 0.9 <= seconds < TIMEOUT + running_time.TICK + 2


async def test_a_wait_whose_operation_ends_in_time_has_its_result_and_bounds_no_other() -> None:
    waits = OperationWaiter(TIMEOUT, IncompleteRequestError)
    steps = Steps("done")
    first = asyncio.ensure_future(waits.wait(Operation(steps.run())))
    second = asyncio.ensure_future(ending(waits.wait(never())))
    await settled()
    await finish(steps)
    assert await first == "done"
    assert (await second)[0] is IncompleteRequestError
    # A later wait, for which the timer must be set again, ends too.
    assert (await ending(waits.wait(never())))[0] is IncompleteRequestError


async def test_a_result_that_arrives_while_the_event_loop_is_held_up_is_in_time() -> None:
    waits = OperationWaiter(TIMEOUT, IncompleteRequestError)
    arrives = Steps("in time")
    waiting = asyncio.ensure_future(waits.wait(Operation(arrives.run())))
    loop = asyncio.get_running_loop()

    def hold_up() -> None:
        time.sleep(2 * TIMEOUT)
        loop.call_soon(arrives.steps[0].set_result, None)

    loop.call_later(TIMEOUT / 3, hold_up)
    assert await waiting == "in time"


async def test_end_ends_all_waits_present_and_future() -> None:
    waits = OperationWaiter(60, IncompleteRequestError)
    endings = [asyncio.ensure_future(ending(waits.wait(never()))) for _ in range(3)]
    await settled()
    waits.end(lambda: EngineUnavailableError("the server is stopping"))
    endings.append(asyncio.ensure_future(ending(waits.wait(never()))))
    assert {error for error, _ in await asyncio.gather(*endings)} == {EngineUnavailableError}
    assert await waits.wait(Operation(Steps().run())) == "at once", "there is nothing to wait for"


async def test_a_cancelled_wait_is_forgotten() -> None:
    waits = OperationWaiter(TIMEOUT, IncompleteRequestError)
    task = asyncio.create_task(waits.wait(never()))
    await settled()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    waits.end(lambda: EngineUnavailableError("the server is stopping"))
    await asyncio.sleep(TIMEOUT + running_time.TICK)


async def test_a_message_that_comes_after_its_read_was_given_up_is_taken_from_grpc() -> None:
    """Otherwise, grpc would keep it forever. Goes over the wire, because the coroutine must be grpc's own."""
    reads: list[Operation[Any]] = []

    async def handle(_: object, context: Any) -> None:
        reads.append(Operation(context.read()))
        reads[0].result.set_exception(TimeoutError())
        with pytest.raises(TimeoutError):
            await reads[0].result
        await until(lambda: reads[0].is_over, "the message has come")
        await context.write(await Operation(context.read()).result)

    server = grpc.aio.server()
    handler = grpc.method_handlers_generic_handler("a", {"b": grpc.stream_stream_rpc_method_handler(handle)})
    server.add_generic_rpc_handlers((handler,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            call: Any = channel.stream_stream("/a/b")()
            await until(lambda: bool(reads), "it reads")
            for message in (b"given up", b"second"):
                await call.write(message)
            assert await asyncio.wait_for(call.read(), 20) == b"second", "the first was taken by the read that was given up"
    finally:
        await server.stop(0)
