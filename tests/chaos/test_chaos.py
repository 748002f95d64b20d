"""The chaos suite sees what it is there to see, and its scenarios run."""

import asyncio
from collections.abc import Iterator
from dataclasses import replace

import pytest
from flywheel_proto.v1 import generation_pb2 as pb
from flywheel_server.engines.scripted import ScriptedEngine

from chaos.__main__ import main, play
from chaos.load import Outcome, Plan, Received, text_of
from chaos.scenarios import RPCS_AT_START, RPCS_OF_ALL_CALLS, RPCS_OF_EACH_CALL, lasting, scenarios
from chaos.stage import SCRIPT, Stage, stage
from chaos.verdict import Cost, Times, broken_promises
from tests.modal_cloud.control_plane import OF_THE_WORKER
from tests.serving import serving

PLAN = Plan("generate_deltas", "🦙 1/2/3: abc. ", max_tokens=9, num_samples=1, end="finish", after=1, timeout=30)
TIMES = Times(begun=100, over=110)


def outcome(end: str, status: str, begun: float, took: float = 1, **more: str) -> Outcome:
    return Outcome("threads", "generate", end, status, "", "", begun, begun + took, begun + 30, **more)  # type: ignore[arg-type]


async def test_the_text_of_a_call_is_known() -> None:
    script = SCRIPT.model_copy(update={"token_delay": 0})
    async with serving(ScriptedEngine(script)) as target:
        for max_tokens in (1, 5, 9, 100):
            plan = replace(PLAN, max_tokens=max_tokens)
            response = await target.stub.GenerateAll(pb.GenerationRequest(text=plan.prompt, max_tokens=max_tokens))
            assert response.responses[0].text == text_of(plan)


WHOLE = text_of(PLAN)


@pytest.mark.parametrize(
    ("pieces", "wrong"),
    [
        ([(0, WHOLE[:5], 2, ""), (0, WHOLE[5:], 9, "length")], ""),
        ([(0, WHOLE[:5], 2, ""), (0, WHOLE[:5], 4, "")], "not the text of its prompt"),
        ([(0, WHOLE[:5], 2, ""), (0, WHOLE[6:], 9, "length")], "not the text of its prompt"),
        ([(0, WHOLE[:5], 2, ""), (0, WHOLE[5:], 1, "")], "fewer tokens than before"),
        ([(0, WHOLE, 9, "length"), (0, "", 9, "length")], "goes on after its end"),
        ([(0, WHOLE[:5], 2, "length")], "not complete"),
        ([(0, WHOLE, 8, "length")], "not complete"),
        ([(0, WHOLE, 9, "")], "have finished"),
        ([], "have finished"),
        ([(0, WHOLE, 9, "length"), (1, WHOLE, 9, "length")], "have finished"),
    ],
)
def test_a_text_that_is_doubled_mixed_or_lost_is_noticed(pieces: list[tuple[int, str, int, str]], wrong: str) -> None:
    received = Received(PLAN)
    for piece in pieces:
        received.delta(*piece)
    received.end()
    assert (wrong in received.wrong, bool(received.wrong)) == (True, bool(wrong))


RUNNING = Cost(running=frozenset({"UNAVAILABLE"}))
DURING = Cost(during=frozenset({"UNAVAILABLE"}))


@pytest.mark.parametrize(
    ("ended", "cost", "promise"),
    [
        (outcome("finish", "OK", 90), Cost(), ""),
        (outcome("cancel", "CANCELLED", 90), Cost(), ""),
        (outcome("deadline", "DEADLINE_EXCEEDED", 90), Cost(), ""),
        (outcome("finish", "OK", 90, wrong="doubled"), RUNNING, "a text is wrong"),
        (outcome("finish", "OK", 90, took=34), RUNNING, "long after it was due"),
        (outcome("finish", "UNAVAILABLE", 99.5), Cost(), "without a reason"),
        (outcome("finish", "UNAVAILABLE", 99.5), RUNNING, ""),
        (outcome("finish", "INTERNAL", 99.5), RUNNING, "without a reason"),
        (outcome("finish", "UNAVAILABLE", 98), RUNNING, "without a reason"),
        (outcome("finish", "UNAVAILABLE", 105), RUNNING, "without a reason"),
        (outcome("cancel", "UNAVAILABLE", 105), DURING, ""),
        (outcome("finish", "UNAVAILABLE", 111), DURING, "without a reason"),
        (outcome("finish", "CANCELLED", 105), DURING, "without a reason"),
        (outcome("finish", "UNAVAILABLE", 105), replace(DURING, max_calls=0), "more than 0 calls"),
    ],
)
def test_a_broken_promise_is_told(ended: Outcome, cost: Cost, promise: str) -> None:
    told = broken_promises([ended], TIMES, cost)
    assert len(told) == bool(promise)
    assert promise in "".join(told)


def test_without_calls_nothing_is_shown() -> None:
    assert broken_promises([], TIMES, Cost()) == ["no call was made"]


def test_scenarios_are_chosen_by_their_names(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--list", "model-"])
    assert capsys.readouterr().out.split() == ["model-preempted", "model-killed"]
    with pytest.raises(SystemExit, match="2"):
        main(["--list", "other"])
    names = [scenario.name for scenario in scenarios(1)]
    assert len(names) == len(set(names))


MIXED = {"cancelled": 0.3, "cut_short": 0.3}  # so that the first call of some stream ends in each way


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with stage(tmp_path_factory.mktemp("chaos")) as deployed:
        yield deployed


@pytest.mark.thorough
async def test_calls_go_on_undisturbed_and_each_rpc_of_theirs_has_its_scenarios(deployment: Stage) -> None:
    before = deployment.cloud.rpcs.copy()
    (calm,) = [scenario for scenario in scenarios(1) if scenario.name == "calm"]
    row = await asyncio.to_thread(play, deployment, replace(calm, disrupt=lasting(1), calm_after=0, load=MIXED), 8)
    assert not row.broken_promises
    assert (row.remaining_calls, {each.status for each in row.outcomes}) == (0, {"OK", "CANCELLED", "DEADLINE_EXCEEDED"})
    assert {each.client for each in row.outcomes} == {"threads", "asyncio"}
    asked = {rpc for rpc in deployment.cloud.rpcs - before if not rpc.startswith(OF_THE_WORKER)}
    assert asked <= {*RPCS_OF_EACH_CALL, *RPCS_OF_ALL_CALLS, *RPCS_AT_START}


@pytest.mark.thorough
async def test_the_model_may_be_lost_and_nothing_is_left(deployment: Stage) -> None:
    (killed,) = [scenario for scenario in scenarios(1) if scenario.name == "model-killed"]
    row = await asyncio.to_thread(play, deployment, replace(killed, calm_after=0), 8)
    assert not row.broken_promises
    assert row.remaining_calls == deployment.remaining_calls() == 0
