"""What befalls the deployment while it is called, and what that may cost."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from grpclib import Status

from chaos.stage import APP, Stage, wait_for
from chaos.verdict import Cost, Times, broken
from tests.modal_cloud import Container, Fault

UNAVAILABLE: Final = frozenset({"UNAVAILABLE"})
REFUSALS: Final = (
    Status.RESOURCE_EXHAUSTED,
    Status.UNAUTHENTICATED,
    Status.PERMISSION_DENIED,
    Status.NOT_FOUND,
    Status.ABORTED,
    Status.FAILED_PRECONDITION,
    Status.INTERNAL,
)

# What gateways, the Model and clients ask of Modal. If it refuses a call as such, the caller may have to repeat that call.
# Whatever else it refuses should cost no call.
OF_EACH_CALL: Final = ("FunctionMap",)
OF_ALL_CALLS: Final = (
    "DictContents",
    "DictGetOrCreate",
    "DictUpdate",
    "FunctionCallCancel",
    "FunctionGet",
    "FunctionGetCurrentStats",
    "FunctionGetOutputs",
    "QueueGet",
    "QueueLen",
    "QueuePut",
)
# What it is asked once, when a gateway or a client begins.
OF_THE_START: Final = (
    "ClassGet",
    "ClientHello",
    "DictGetOrCreate",
    "DictUpdate",
    "EnvironmentGetOrCreate",
    "FunctionBindParams",
    "FunctionCallFromId",
    "FunctionGet",
    "QueueGetOrCreate",
    "QueueHeartbeat",
    "TunnelStart",
)


def _nothing(stage: Stage) -> None:
    """Lets it run undisturbed."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """One thing that befalls the deployment.

    Attributes:
        name: By which it is chosen.
        befall: What it does while calls are made; it returns when that is over.
        cost: What it may cost.
        prepare: What it does before calls are made.
        calm_after: The seconds for which calls go on after it is over.
        clock: By how many seconds the callers' clock is wrong.
        rebuild: Whether the deployment is put up anew after it.
        load: What is different about the calls, as attributes of `Load`; with `calls`, it lasts until they are made.
    """

    name: str
    befall: Callable[[Stage], None] = _nothing
    cost: Cost = field(default_factory=Cost)
    prepare: Callable[[Stage], None] = _nothing
    calm_after: float = 2.0
    clock: float = 0.0
    rebuild: bool = False
    load: Mapping[str, Any] = field(default_factory=dict)


def _any_model(stage: Stage) -> Container:
    wait_for(lambda: any(model.inputs for model in stage.models()), "the Model works")
    return next(model for model in stage.models() if model.inputs)


def _new_model(stage: Stage, before: Container) -> None:
    def replaced() -> bool:
        return any(model.ready and model.inputs for model in stage.models() if model is not before)

    wait_for(replaced, "another container of the Model works", 20)


def preempt_a_gateway(stage: Stage) -> None:
    """Lets a gateway end itself, as at preemption."""
    gateway = stage.gateways()[0]
    gateway.interrupt()
    gateway.wait(40)
    stage.wait_until_whole()


def kill_a_gateway(stage: Stage) -> None:
    """Ends a gateway without a warning."""
    gateway = stage.gateways()[0]
    gateway.kill()
    gateway.wait()
    stage.wait_until_whole()


def kill_all_gateways(stage: Stage) -> None:
    """Ends all gateways without a warning."""
    for gateway in stage.gateways():
        gateway.kill()
        gateway.wait()
    stage.wait_until_whole()


def preempt_the_model(stage: Stage) -> None:
    """Lets the Model end itself; Modal runs its calls again in another container."""
    model = _any_model(stage)
    model.interrupt()
    model.wait(40)
    _new_model(stage, model)


def kill_the_model(stage: Stage) -> None:
    """Ends the Model without a warning; Modal runs its calls again in another container."""
    model = _any_model(stage)
    model.kill()
    model.wait()
    _new_model(stage, model)


def redeploy(stage: Stage) -> None:
    """Deploys both apps again."""
    old = [*stage.gateways(), *stage.models()]
    stage.deploy_engine()
    stage.deploy_gateways()
    wait_for(lambda: not any(container.alive for container in old), "the old containers have ended", 45)
    stage.wait_until_whole()


def control_plane_down(stage: Stage) -> None:
    """Cuts all connections to Modal, and refuses new ones for some seconds."""
    stage.cloud.down()
    time.sleep(4)
    stage.cloud.up()


def slow(seconds: float, lasting: float) -> Callable[[Stage], None]:
    """Returns what lets each RPC take so many seconds longer."""

    def befall(stage: Stage) -> None:
        fault = stage.disturb(delay=seconds)
        time.sleep(lasting)
        stage.check_serving()
        fault.end()

    return befall


def throttled(rpc: str, *, serving: bool) -> Callable[[Stage], None]:
    """Returns what limits an RPC to nothing for some seconds, without and with a time after which to repeat it.

    The gateways should be `serving` meanwhile if they can make calls without it.
    """

    def befall(stage: Stage) -> None:
        for retry_after in (None, 0.5):
            limit = stage.disturb(rpc, status=Status.RESOURCE_EXHAUSTED, retry_after=retry_after)
            _wait_until_struck([limit])
            time.sleep(3)
            if serving:
                stage.check_serving()
            limit.end()

    return befall


def refused(rpc: str) -> Callable[[Stage], None]:
    """Returns what lets an RPC fail once with each status."""

    def befall(stage: Stage) -> None:
        faults = [stage.disturb(rpc, status=status, times=1) for status in REFUSALS]
        _wait_until_struck(faults)
        time.sleep(1)
        for fault in faults:
            fault.end()

    return befall


def throttled_and_refused(rpc: str) -> Callable[[Stage], None]:
    """Returns what limits an RPC, and lets it fail with each status afterwards."""

    def befall(stage: Stage) -> None:
        throttled(rpc, serving=True)(stage)
        refused(rpc)(stage)

    return befall


def _wait_until_struck(faults: Sequence[Fault]) -> None:
    """Returns when each has struck, or after a while: some RPCs are made only now and then."""
    until = time.monotonic() + 12
    while time.monotonic() < until and not all(fault.befallen for fault in faults):
        time.sleep(0.02)


def limited_at_the_start(stage: Stage) -> None:
    """Puts a new gateway in the place of one that was killed, whose first RPC of each kind is limited."""
    for rpc in OF_THE_START:
        stage.disturb(rpc, status=Status.RESOURCE_EXHAUSTED, times=1)
    kill_a_gateway(stage)


def wrong_clocks(seconds: float) -> Callable[[Stage], None]:
    """Returns what puts gateways in the place of the old ones whose clocks are wrong: one is ahead, the other behind."""

    def prepare(stage: Stage) -> None:
        for gateway, offset in zip(stage.gateways(), (seconds, -seconds), strict=True):
            stage.cloud.set_clock(APP, offset)
            gateway.interrupt()
            gateway.wait(40)
            stage.wait_until_whole()

    return prepare


def both_are_called(stage: Stage) -> None:
    """Waits until each gateway has had a call, wherever callers think that it is to be found."""
    for gateway in stage.gateways():
        wait_for(lambda gateway=gateway: stage.active(gateway) > 0, "each gateway has calls", 8)  # type: ignore[misc]


def delete_the_directory(stage: Stage) -> None:
    """Deletes the Dict of the addresses, with the command that the documentation names."""
    for name in stage.directories():
        done = stage.cloud.cli("dict", "delete", "--yes", name)
        assert done.returncode == 0, done.stderr
    wait_for(lambda: bool(stage.directories()), "there is a directory again", 45)


def expire_the_queue(stage: Stage) -> None:
    """Removes what is ephemeral, as if no heartbeat had come for too long."""
    stage.cloud.expire_ephemeral()


def silence_a_tunnel(stage: Stage) -> None:
    """Lets no byte through to a gateway that is published, which callers that are new then should hardly notice."""
    tunnel = stage.tunnel(stage.gateways()[0])
    tunnel.silence()
    now = time.monotonic()
    with stage.callers(replace(stage.load(), streams=8, deadline=10.0)) as callers:
        callers.wait_for_answers(10)
        time.sleep(3)
        promises = broken(callers.finish(20), Times(now, time.monotonic()), Cost())
    assert not promises, f"of new callers: {promises}"
    tunnel.restore()


def limit_cancels(stage: Stage) -> None:
    """Limits cancels to nothing for some seconds."""
    limit = stage.disturb("FunctionCallCancel", status=Status.RESOURCE_EXHAUSTED)
    time.sleep(5)
    limit.end()


def lasting(seconds: float) -> Callable[[Stage], None]:
    """Returns what lets so much time pass."""
    return lambda _: time.sleep(seconds)


def scenarios(cancels: int) -> list[Scenario]:
    """Returns all, in the order in which they run; one of them cancels so many calls."""
    lost = Cost(under_way=UNAVAILABLE)
    absent = Cost(under_way=UNAVAILABLE, meanwhile=UNAVAILABLE)
    several = Cost(meanwhile=UNAVAILABLE | {"RESOURCE_EXHAUSTED", "FAILED_PRECONDITION"}, most=len(REFUSALS))
    silent = Cost(meanwhile=UNAVAILABLE | {"DEADLINE_EXCEEDED"})
    limited = Cost(meanwhile=UNAVAILABLE | {"RESOURCE_EXHAUSTED"})
    return [
        Scenario("calm", lasting(6)),
        Scenario("gateway-preempted", preempt_a_gateway),
        Scenario("gateway-killed", kill_a_gateway, lost),
        Scenario("all-gateways-killed", kill_all_gateways, absent),
        Scenario("model-preempted", preempt_the_model, lost),
        Scenario("model-killed", kill_the_model, lost),
        Scenario("redeployed", redeploy),
        Scenario("control-plane-down", control_plane_down, absent),
        Scenario("slow-1s", slow(1, 6)),
        Scenario("slow-5s", slow(5, 12)),
        *(Scenario(f"throttled-{rpc}", throttled(rpc, serving=False), limited) for rpc in OF_EACH_CALL),
        *(Scenario(f"refused-{rpc}", refused(rpc), several) for rpc in OF_EACH_CALL),
        *(Scenario(f"rpc-{rpc}", throttled_and_refused(rpc)) for rpc in OF_ALL_CALLS),
        Scenario("throttled-at-the-start", limited_at_the_start, lost),
        *(
            Scenario(f"gateway-clocks-{offset}s", both_are_called, prepare=wrong_clocks(offset), rebuild=True)
            for offset in (100, 600)
        ),
        *(Scenario(f"client-clock-{offset:+}s", lasting(2), clock=offset) for offset in (100, -100, 600, -600)),
        Scenario("directory-deleted", delete_the_directory),
        Scenario("queue-expired", expire_the_queue, lost),
        Scenario("tunnel-silent", silence_a_tunnel, silent),
        Scenario("cancels-limited", limit_cancels, load={"cancelled": 0.7}),
        Scenario("cancels", load={"calls": cancels, "cancelled": 1.0, "cut_short": 0.0, "soon": 0.5, "seconds": 110}),
    ]
