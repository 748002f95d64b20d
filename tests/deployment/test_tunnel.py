"""The tunnel of a gateway is probed from outside, and replaced if it does not answer."""

import asyncio
from pathlib import Path

import grpc.aio
import pytest
from flywheel_proto.v1 import generation_pb2 as pb
from flywheel_server.deployment import tunnel
from flywheel_server.engines.scripted import Script, ScriptedEngine

from tests.deployment.conftest import AUTHORIZATION, current, deployed, published, through
from tests.modal_cloud import ModalCloud, Tunnel, scripted
from tests.serving import serving, through_a_cable, until

REQUEST = pb.GenerationRequest(text="hello", max_tokens=12)


@pytest.mark.thorough
async def test_a_tunnel_that_does_not_answer_is_replaced_and_calls_through_it_go_on(
    prepared: ModalCloud, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    authority = tmp_path / "authority.pem"
    authority.write_bytes(prepared.ca_certificate)
    monkeypatch.setenv("GRPC_DEFAULT_SSL_ROOTS_FILE_PATH", str(authority))  # for containers
    await asyncio.to_thread(scripted.deploy, prepared, "steady", Script(token_delay=0.01))
    await deployed(prepared, "watched", FLYWHEEL_MODAL_APP="steady", FLYWHEEL_DEPLOY_TUNNEL_INTERVAL="0.2")
    (first,) = await published(prepared, "watched")
    (container,) = current(prepared, "watched/Gateway")

    async def another_than(*dead: Tunnel) -> Tunnel:
        async def there() -> bool:
            return bool(set(await published(prepared, "watched")) - set(dead))

        await until(there, "another tunnel is published")
        (found,) = await published(prepared, "watched")
        return found

    async with through(first, prepared) as target:
        stream = target.stub.GenerateDeltas(pb.GenerationRequest(text="hello", max_tokens=800), metadata=AUTHORIZATION)
        await anext(aiter(stream))
        first.refuse_new()
        second = await another_than(first)
        async with through(second, prepared) as other:
            assert (await other.stub.GenerateAll(REQUEST, metadata=AUTHORIZATION)).num_samples == 1
        second.refuse_new()
        third = await another_than(first, second)
        async with through(third, prepared) as other:
            assert (await other.stub.GenerateAll(REQUEST, metadata=AUTHORIZATION)).num_samples == 1
        assert container.alive
        # Something else is wrong with the container: it ends as at a preemption, and its calls may finish.
        third.refuse_new()
        assert [message async for message in stream][-1].finish_reason == "length"
    assert await asyncio.to_thread(container.wait, 30) == 0
    last = await another_than(first, second, third)
    assert last.task_id != container.task_id


@pytest.mark.parametrize(
    ("seen", "dead"),
    [
        ("+---", True),
        ("+--+---", True),
        ("+--+--+--+", False),  # never three in a row
        ("-" * 12, False),  # the container cannot reach its own tunnel: that proves nothing
        ("---+---", True),
        ("+" + "?" * 12, False),  # the server does not answer either
        ("+--?-", True),
    ],
)
async def test_when_a_tunnel_counts_as_dead(monkeypatch: pytest.MonkeyPatch, seen: str, dead: bool) -> None:
    """A probe gets an answer (+), an answer only from within the container (-), or no answer at all (?)."""
    probes = iter(seen)
    all_seen = asyncio.Event()
    found = ""

    async def answers(channel: grpc.aio.Channel | None) -> bool:
        nonlocal found
        from_outside = channel is None
        if from_outside:
            found = next(probes, "")
        if not found:
            all_seen.set()
            await asyncio.Event().wait()
        return found == "+" if from_outside else found == "-"

    monkeypatch.setattr(tunnel, "_answers", answers)
    monkeypatch.setattr(tunnel, "_tunnel_channel", {"tunnel.example:1": None}.get)
    probing = asyncio.create_task(tunnel.TunnelProbe("127.0.0.1:1", 0.001).until_dead("tunnel.example:1"))
    ended = asyncio.create_task(all_seen.wait())
    await asyncio.wait({probing, ended}, return_when=asyncio.FIRST_COMPLETED, timeout=10)
    assert (probing.done(), next(probes, "")) == (dead, "")
    assert all_seen.is_set() != dead
    probing.cancel()
    ended.cancel()
    await asyncio.gather(probing, ended, return_exceptions=True)


async def test_a_silent_tunnel_is_dead_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tunnel, "PROBE_TIMEOUT", 0.3)
    monkeypatch.setattr(tunnel, "_tunnel_channel", grpc.aio.insecure_channel)
    async with serving(ScriptedEngine()) as target, through_a_cable(target.address) as cable:
        probe = tunnel.TunnelProbe(target.address, 0.01)
        probing = asyncio.create_task(probe.until_dead(cable.address))
        await until(lambda: probe._has_succeeded, "it answers")
        cable.unplug()
        await asyncio.wait_for(probing, 10)


async def test_a_gateway_that_does_not_look_waits_for_ever() -> None:
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(tunnel.TunnelProbe("127.0.0.1:1", 0).until_dead("127.0.0.1:1"), 0.05)
