"""Many calls of a class on Modal that are cancelled at random moments, on busy cores, and what is left of them.

python -m tests.modal_cloud.cancelling [CALLS]
"""

import asyncio
import collections
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import grpc.aio
import modal.client
from flywheel_proto.v1 import generation_pb2 as pb
from flywheel_server.engines.modal import remote_call
from flywheel_server.engines.scripted import Script

from tests.modal_cloud import ModalCloud, scripted
from tests.serving import Target, drained, serving

METHODS = ("Generate", "GenerateDeltas", "GenerateAll")
AT_A_TIME = 50
LONGEST = 1.0  # seconds until a call is cancelled
LOOK = 0.05  # seconds
"""How long a poll of a call lasts: a cancel can get lost at the moment when a poll ends, so there are many polls."""
TOKENS = 3000
SCRIPT = Script(token_delay=0.01)
SETTLING = 60.0  # seconds at most


@dataclass(frozen=True)
class Left:
    """What is left once all is quiet, or after `SETTLING` seconds.

    Attributes:
        states: How many calls Modal has in each state.
        active: Calls that the server still works on.
        running: Generations that the class still works on.
    """

    states: dict[str, int]
    active: int
    running: int

    @property
    def nothing(self) -> bool:
        """Whether no call goes on, and each one that Modal accepted was cancelled."""
        return set(self.states) <= {"cancelled"} and not self.active and not self.running


@contextmanager
def busy_cores(processes: int = 2) -> Iterator[None]:
    """Keeps so many cores busy for the length of the context."""
    burning = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in burning:
            process.kill()
            process.wait()


@contextmanager
def short_looks() -> Iterator[None]:
    """Makes the engines of this process poll their calls all the time."""
    usual = remote_call.POLL_TIMEOUT, remote_call.SILENCE_BEFORE_POLL_SECONDS
    remote_call.POLL_TIMEOUT, remote_call.SILENCE_BEFORE_POLL_SECONDS = LOOK, 0.0  # type: ignore[misc]
    try:
        yield
    finally:
        remote_call.POLL_TIMEOUT, remote_call.SILENCE_BEFORE_POLL_SECONDS = usual  # type: ignore[misc]


async def cancel_at_random(target: Target, cloud: ModalCloud, app: str, calls: int, seed: int = 0) -> Left:
    """Makes so many calls, cancels each at a random moment, and returns what is left of them.

    Arguments:
        target: A server whose engine calls the class `Model` of the app; see `scripted.engine`.
        cloud: Where the app is deployed, with `SCRIPT`.
        app: Its name.
        calls: How many.
        seed: The same seed gives the same moments.
    """
    chance = random.Random(seed)
    before = len(cloud.calls)
    free = asyncio.Semaphore(AT_A_TIME)

    async def one(method: str, seconds: float) -> None:
        async with free:
            call = getattr(target.stub, method)(pb.GenerationRequest(text="hello", max_tokens=TOKENS))
            reading = asyncio.ensure_future(drained(call))
            await asyncio.sleep(seconds)
            call.cancel()
            with suppress(asyncio.CancelledError, grpc.aio.AioRpcError):
                await reading

    await asyncio.gather(*(one(chance.choice(METHODS), chance.uniform(0, LONGEST)) for _ in range(calls)))
    deadline = time.monotonic() + SETTLING
    while True:
        stats = await target.stub.GetStats(pb.GetStatsRequest())
        running = await scripted.running(app)
        states = collections.Counter(call.state for call in cloud.calls[before:] if call.method != "running")
        left = Left(dict(states), stats.active + stats.queued, running)
        if left.nothing or time.monotonic() > deadline:
            return left
        await asyncio.sleep(0.1)


async def _main(cloud: ModalCloud, calls: int) -> Left:
    async with serving(scripted.engine("cancelling"), max_concurrent=AT_A_TIME) as target:
        await target.stub.GetStats(pb.GetStatsRequest())
        with busy_cores(), short_looks():
            return await cancel_at_random(target, cloud, "cancelling", calls)


def main() -> int:
    """Prints what is left of as many calls as the first argument says; returns 1 if anything is left."""
    calls = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    with tempfile.TemporaryDirectory() as directory, ModalCloud(Path(directory)) as cloud:
        os.environ.update(cloud.environ)
        modal.client._Client._set_env_client(None)
        scripted.deploy(cloud, "cancelling", SCRIPT)
        began = time.monotonic()
        left = asyncio.run(_main(cloud, calls))
        sys.stdout.write(f"{calls} calls cancelled in {time.monotonic() - began:.0f} s, and left: {left}\n")
    return 0 if left.nothing else 1


if __name__ == "__main__":
    sys.exit(main())
