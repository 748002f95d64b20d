"""In small doses, what `make fuzz` sends to a server for minutes: it answers by the contract, and goes on serving others."""

import gc
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from flywheel_proto.v1 import generation_pb2 as pb
from flywheel_server.engines.base import Engine
from flywheel_server.engines.llama_cpp.default_model import default_model
from flywheel_server.engines.llama_cpp.engine import EmbeddedEngine
from flywheel_server.engines.scripted import Script, ScriptedEngine
from flywheel_server.interceptors.context import CallContext

from fuzz.attacks import ATTACKS, Attack, idle_connections, ping_flood, unfinished_calls
from fuzz.calls import CALL_ATTACKS, CONTEXT_TOKENS, CallAttack, unexpected_answers
from fuzz.embedded import attackers_keys
from fuzz.targets import LIMITS
from fuzz.under_attack import KEY
from fuzz.wire import send
from tests.serving import connected, serving, until
from tests.thorough import further


def embedded_engine(context_tokens: int, slots: int) -> EmbeddedEngine:
    return EmbeddedEngine(
        default_model(), context_tokens=context_tokens, slots=slots, threads=1, batch_tokens=32, prompt_format="chat"
    )


@pytest.mark.parametrize(
    ("engine", "messages"),
    [
        (ScriptedEngine(Script(context_tokens=LIMITS.context_tokens)), 1500),
        (embedded_engine(LIMITS.context_tokens, slots=8), 100),
    ],
    ids=["scripted", "embedded"],
)
async def test_every_answer_to_random_messages_is_one_of_the_contract(engine: Engine, messages: int) -> None:
    limits = {"max_text_bytes": LIMITS.max_text_bytes, "max_num_samples": LIMITS.max_num_samples}
    async with serving(engine, max_queued=1000, **limits) as target:
        statuses, unexpected = await send(target.address, messages, seed=3)
    assert not unexpected
    assert {code for method, code in statuses if method != "Tokenize"} == {"OK", "INVALID_ARGUMENT"}
    assert len(statuses) == 12, "each of six methods has answered both, or that the engine does not have it"


async def test_a_refused_request_leaves_nothing_behind() -> None:
    def contexts() -> int:
        """Returns how many contexts of calls there are, each of which whatever is left of its call holds on to."""
        gc.collect()
        return sum(type(thing) is CallContext for thing in gc.get_objects())

    calls, before = 20, contexts()
    async with serving(ScriptedEngine()) as target:
        for _ in range(calls):
            with pytest.raises(grpc.aio.AioRpcError):
                await target.stub.GenerateAll(pb.GenerationRequest(stop=[""], num_samples=99))
    assert contexts() - before < calls


async def attacked(attack: Attack, **settings: Any) -> tuple[dict[str, int], int]:
    """Returns what the server answered to the attack, and how many samples it then gave another client."""
    async with serving(ScriptedEngine(), **settings) as target:
        host, _, port = target.address.rpartition(":")
        tally = await attack.run(host, int(port), seconds=0.2)
        async with connected(target.address) as other:
            response = await other.stub.GenerateAll(
                pb.GenerationRequest(text="x", max_tokens=1), timeout=30, wait_for_ready=True
            )
    assert tally.connections
    return dict(tally.answers), response.num_samples


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
async def test_it_survives(attack: Attack) -> None:
    _, samples = await attacked(Attack(attack.name, attack.script, connections=min(attack.connections, 4)))
    assert samples == 1


async def test_who_pings_too_often_is_told_to_calm_down() -> None:
    answers, _ = await attacked(Attack("ping flood", ping_flood))
    assert answers["GOAWAY ENHANCE_YOUR_CALM"]


async def test_calls_beyond_max_streams_are_refused() -> None:
    answers, _ = await attacked(Attack("unfinished calls", unfinished_calls), max_streams=10)
    assert answers["RST_STREAM REFUSED_STREAM"]


async def test_connections_beyond_max_connections_are_closed() -> None:
    answers, _ = await attacked(Attack("idle connections", idle_connections, connections=20), max_connections=10)
    assert answers["closed"]


@pytest.mark.parametrize(
    "attack", [*CALL_ATTACKS[4:6], *further(CALL_ATTACKS, but=CALL_ATTACKS[4:6])], ids=lambda attack: attack.name
)
async def test_the_embedded_engine_survives(attack: CallAttack, tmp_path: Path) -> None:
    keys = attackers_keys(tmp_path)
    async with serving(embedded_engine(CONTEXT_TOKENS, slots=8), api_keys=KEY, api_keys_file=str(keys)) as target:
        host, _, port = target.address.rpartition(":")
        tally = await attack.run(host, int(port), seconds=0.5)
        metadata = (("authorization", f"Bearer {KEY}"),)
        request = pb.GenerationRequest(text="x", max_tokens=1)
        assert (await target.stub.GenerateAll(request, timeout=30, metadata=metadata)).num_samples == 1

        async def at_rest() -> bool:
            stats = await target.stub.GetStats(pb.GetStatsRequest(), metadata=metadata)
            return (stats.active, stats.queued, stats.backlog) == (0, 0, 0)

        await until(at_rest, "nothing of the attack is under way")
    assert tally.sent >= 8, "each has called"
    assert not unexpected_answers(tally)
