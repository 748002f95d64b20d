"""The embedded engine at the ends of the ranges of its settings: it generates, or says which setting is wrong.

Each case is a process of its own, because llama.cpp ends the process if it cannot do what it is asked for.
"""

import itertools
import random
from typing import get_args

import pytest
from annotated_types import Ge, Le
from flywheel_proto.v1 import generation_pb2 as pb
from flywheel_server.settings import MIN_CONTEXT, Settings, flag

from tests.server.test_command import command, ready_line
from tests.serving import connected
from tests.thorough import further

MEMORY = "ulimit -S -d 6000000"
"""KiB. Stacks of 512 threads fit, and the longest context does not, as on a machine with little memory."""

SAMPLES = 8
REQUEST = pb.GenerationRequest(text="Hello", max_tokens=4, num_samples=SAMPLES, temperature=0)


def ends(name: str) -> tuple[str, ...]:
    """Returns the values at the ends of a setting's range, or all of its values if it has no range."""
    field = Settings.model_fields[name]
    least, most = (
        next((getattr(each, end) for each in field.metadata if isinstance(each, kind)), None)
        for kind, end in ((Ge, "ge"), (Le, "le"))
    )
    if least is not None and most is not None:
        return (str(least), str(most))
    return ("true", "false") if field.annotation is bool else get_args(field.annotation)


EMBEDDED = [name for name in Settings.model_fields if name.startswith("embedded_") and name != "embedded_threads"]
CORNERS = [dict(zip(EMBEDDED, corner, strict=True)) for corner in itertools.product(*map(ends, EMBEDDED))]
DRAWN = random.Random(7).sample(CORNERS, 12)
"""Each two ends of two settings are in one of them: `test_the_drawn_corners_have_all_pairs`."""

SOME: list[dict[str, str]] = [
    {"embedded_slots": "1", "embedded_batch": "1"},
    {"embedded_slots": "256", "embedded_context": str(MIN_CONTEXT)},
    {"embedded_context": ends("embedded_context")[1]},
]


def name(corner: dict[str, str]) -> str:
    return " ".join(f"{name.removeprefix('embedded_')}={value}" for name, value in corner.items())


@pytest.mark.parametrize("corner", [*SOME, *further(DRAWN)], ids=name)
async def test_every_corner_generates_or_is_refused_by_name(corner: dict[str, str]) -> None:
    arguments = [f"{flag(name)}={value}" for name, value in corner.items()]
    async with command("--address=127.0.0.1:0", "--log-level=error", *arguments, setup=MEMORY) as process:
        if int(corner.get("embedded_context", 0)) > 2**20:
            _, stderr = await process.communicate()
            assert process.returncode == 1
            assert b"--embedded-context" in stderr.splitlines()[-1]
            return
        _, address = await ready_line(process)
        async with connected(address) as target:
            answer = await target.stub.GenerateAll(REQUEST)
        assert [sample.generated_tokens for sample in answer.responses] == [4] * SAMPLES


def test_the_drawn_corners_have_all_pairs() -> None:
    def pairs(corners: list[dict[str, str]]) -> set[tuple[tuple[str, str], ...]]:
        return {pair for corner in corners for pair in itertools.combinations(corner.items(), 2)}

    assert pairs(DRAWN) == pairs(CORNERS)


@pytest.mark.thorough
@pytest.mark.parametrize("threads", ends("embedded_threads"))
async def test_few_and_many_threads_generate(threads: str) -> None:
    arguments = ("--address=127.0.0.1:0", "--log-level=error", f"--embedded-threads={threads}")
    async with command(*arguments, setup=MEMORY) as process:
        # Hundreds of threads on a few cores take seconds for a token.
        _, address = await ready_line(process, within=120)
        async with connected(address) as target:
            answer = await target.stub.GenerateAll(pb.GenerationRequest(text="Hello", max_tokens=1, temperature=0))
        assert [sample.generated_tokens for sample in answer.responses] == [1]
