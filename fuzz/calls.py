"""Attacks of hostile callers with a key on an engine. Each attack repeats one kind of request, cancelled or not."""

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import grpc.aio
from flywheel_proto.v1 import generation_pb2 as pb
from flywheel_proto.v1 import generation_pb2_grpc

from fuzz.http2 import Tally

CONCURRENCY: Final = 8
"""Calls that one caller has at a time."""
KIBIBYTE: Final = 2**10
STORY: Final = "<|im_start|>user\nWrite a very long story about a llama.<|im_end|>\n<|im_start|>assistant\n"
"""The special tokens keep this text out of the chat template, so that its number of tokens is known."""
STORY_TOKENS: Final = 20
CONTEXT_TOKENS: Final = 8192

Metadata = tuple[tuple[str, str], ...]


def without_spaces(rng: random.Random) -> pb.GenerationRequest:
    """Returns up to 1 MiB of text without word boundaries, so that the tokenizer must take all of it."""
    size = rng.randrange(256 * KIBIBYTE, 1024 * KIBIBYTE)
    few = rng.choice((" ", "1", "a", "xyz", "aA1!", "\n\t "))
    return pb.GenerationRequest(text=few * (size // len(few)), max_tokens=1, max_input_tokens=16)


def long_texts(rng: random.Random) -> pb.GenerationRequest:
    """Returns up to 1 MiB of words: too many, or only the last of them are to be read."""
    words = "llama " * rng.randrange(10_000, 170_000)
    return pb.GenerationRequest(text=words, max_tokens=1, max_input_tokens=rng.choice((0, 100)))


def any_moment(rng: random.Random) -> pb.GenerationRequest:
    """Returns a request that takes its time in the tokenizer, in reading the prompt, or in generating. Other calls wait."""
    match rng.randrange(3):
        case 0:
            return pb.GenerationRequest(text="x" * rng.randrange(64 * KIBIBYTE), max_tokens=1, max_input_tokens=16)
        case 1:
            return pb.GenerationRequest(text="llama " * rng.randrange(100, 3000), max_tokens=1)
        case _:
            return pb.GenerationRequest(text=STORY, max_tokens=500, num_samples=rng.randrange(1, 4))


def whole_context(rng: random.Random) -> pb.GenerationRequest:
    """Returns a request for one sample that needs all tokens of the context, or nearly all."""
    return pb.GenerationRequest(text=STORY, max_tokens=CONTEXT_TOKENS - STORY_TOKENS - rng.randrange(10))


ANSWERS: Final = ("OK", "CANCELLED", "INVALID_ARGUMENT", "RESOURCE_EXHAUSTED")
"""How the calls of attackers may end."""


def unexpected_answers(tally: Tally) -> list[str]:
    """Returns the answers that no attacker may get."""
    return [answer for answer in tally.answers if not answer.startswith(ANSWERS)]


@dataclass(frozen=True)
class CallAttack:
    """An attack of hostile callers.

    Attributes:
        name: The name of the attack in the table.
        request: Returns the next request.
        patience: The seconds within which each call is cancelled, at a random moment; None cancels no call.
        callers: The number of callers.
    """

    name: str
    request: Callable[[random.Random], pb.GenerationRequest]
    patience: float | None = None
    callers: int = 1

    async def run(self, host: str, port: int, seconds: float) -> Tally:
        """Attacks for so many seconds. Returns how many calls were made, and how they ended."""
        tally = Tally()
        callers = [asyncio.create_task(self._keep_calling(f"{host}:{port}", key, tally)) for key in KEYS[: self.callers]]
        done, _ = await asyncio.wait(callers, timeout=seconds)
        for caller in callers:
            caller.cancel()
        await asyncio.gather(*callers, return_exceptions=True)
        for caller in done:
            caller.result()
        return tally

    async def _keep_calling(self, address: str, key: str, tally: Tally) -> None:
        rng = random.Random(key)
        metadata = (("authorization", f"Bearer {key}"),)

        async def caller(stub: Any) -> None:  # noqa: ANN401 - the generated types know only the synchronous stub
            while True:
                request = self.request(rng)
                patience = None if self.patience is None else rng.uniform(0, self.patience)
                tally.sent += 1
                tally.answers[await _end_of(stub, request, metadata, patience)] += 1

        tally.connections += 1
        async with grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
            stub = generation_pb2_grpc.GenerationServiceStub(channel)
            await asyncio.gather(*(caller(stub) for _ in range(CONCURRENCY)))


async def _end_of(stub: Any, request: pb.GenerationRequest, metadata: Metadata, patience: float | None) -> str:  # noqa: ANN401
    """Makes a call, and returns its status and, if it was cancelled, how far it had come."""
    call = stub.GenerateDeltas(request, metadata=metadata)
    reached = "before it began"
    try:
        async with asyncio.timeout(patience):
            if "x-request-id" in {key for key, _ in await call.initial_metadata()}:
                reached = "while its prompt was read"
            async for _ in call:
                reached = "while text was made"
    except TimeoutError:
        call.cancel()
    except grpc.aio.AioRpcError:
        pass  # the code of the call says it too
    code = await call.code()
    return f"{code.name} {reached}" if code is grpc.StatusCode.CANCELLED else str(code.name)


KEYS: Final = ("fw_the-key-of-the-first-attacker", "fw_the-key-of-the-second-attacker")
"""The keys of the callers."""

CALL_ATTACKS: Final = (
    CallAttack("texts without spaces", without_spaces),
    CallAttack("the same, cancelled", without_spaces, patience=1.0),
    CallAttack("the same of two callers", without_spaces, patience=10.0, callers=2),
    CallAttack("long texts", long_texts),
    CallAttack("cancelled at any moment", any_moment, patience=2.0),
    CallAttack("the whole context, cancelled", whole_context, patience=2.0),
    CallAttack("the whole context", whole_context),
)
