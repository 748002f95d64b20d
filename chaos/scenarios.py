"""Lists the scenarios: each disrupts the deployment while calls run, and states which calls may fail."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from grpclib import Status

from chaos.stage import APP, Stage, wait_for
from chaos.verdict import Cost, Times, broken_promises
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

# The RPCs that gateways, the Model and clients send to Modal. Each call needs one of the first group, so that RPC's failure may
# make a call fail. The failure of any other RPC must not make a call fail.
RPCS_OF_EACH_CALL: Final = ("FunctionMap",)
RPCS_OF_ALL_CALLS: Final = (
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
# The RPCs that a gateway or a client sends once, when it starts.
RPCS_AT_START: Final = (
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
    """Does nothing."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """A disruption of the deployment.

    Attributes:
        name: The name on the command line.
        disrupt: Disrupts the deployment while calls run, and returns when the disruption is over.
        cost: The calls that may fail.
        prepare: Called before calls begin.
        calm_after: Seconds for which calls go on after the disruption.
        clock: Seconds by which the callers' clock is wrong.
        rebuild: Whether all containers are replaced afterwards.
        load: Attributes of `Load` that differ from the default. If `calls` is one, the scenario lasts until they are made.
    """

    name: str
    disrupt: Callable[[Stage], None] = _nothing
    cost: Cost = field(default_factory=Cost)
    prepare: Callable[[Stage], None] = _nothing
    calm_after: float = 2.0
    clock: float = 0.0
    rebuild: bool = False
    load: Mapping[str, Any] = field(default_factory=dict)


def _busy_model(stage: Stage) -> Container:
    wait_for(lambda: any(model.inputs for model in stage.models()), "the Model works")
    return next(model for model in stage.models() if model.inputs)


def _wait_for_new_model(stage: Stage, before: Container) -> None:
    def replaced() -> bool:
        return any(model.ready and model.inputs for model in stage.models() if model is not before)

    wait_for(replaced, "another container of the Model works", 20)


def preempt_a_gateway(stage: Stage) -> None:
    """Preempts a gateway, which ends itself."""
    gateway = stage.gateways()[0]
    gateway.interrupt()
    gateway.wait(40)
    stage.wait_until_healthy()


def kill_a_gateway(stage: Stage) -> None:
    """Kills a gateway."""
    gateway = stage.gateways()[0]
    gateway.kill()
    gateway.wait()
    stage.wait_until_healthy()


def kill_all_gateways(stage: Stage) -> None:
    """Kills all gateways."""
    for gateway in stage.gateways():
        gateway.kill()
        gateway.wait()
    stage.wait_until_healthy()


def preempt_the_model(stage: Stage) -> None:
    """Preempts the Model, which ends itself. Modal runs its calls again in another container."""
    model = _busy_model(stage)
    model.interrupt()
    model.wait(40)
    _wait_for_new_model(stage, model)


def kill_the_model(stage: Stage) -> None:
    """Kills the Model. Modal runs its calls again in another container."""
    model = _busy_model(stage)
    model.kill()
    model.wait()
    _wait_for_new_model(stage, model)


def redeploy(stage: Stage) -> None:
    """Deploys both apps again."""
    old = [*stage.gateways(), *stage.models()]
    stage.deploy_engine()
    stage.deploy_gateways()
    wait_for(lambda: not any(container.alive for container in old), "the old containers have ended", 45)
    stage.wait_until_healthy()


def control_plane_down(stage: Stage) -> None:
    """Cuts all connections to Modal, and refuses new ones for some seconds."""
    stage.cloud.down()
    time.sleep(4)
    stage.cloud.up()


def slow(seconds: float, lasting: float) -> Callable[[Stage], None]:
    """Returns a disruption that delays each RPC by `seconds`, for `lasting` seconds."""

    def disrupt(stage: Stage) -> None:
        fault = stage.inject(delay=seconds)
        time.sleep(lasting)
        stage.check_serving()
        fault.end()

    return disrupt


def throttled(rpc: str, *, serving: bool) -> Callable[[Stage], None]:
    """Returns a disruption that throttles every request of an RPC for some seconds, without and then with a retry delay.

    Arguments:
        rpc: The RPC.
        serving: Whether gateways must stay SERVING, because they can make calls without this RPC.
    """

    def disrupt(stage: Stage) -> None:
        for retry_after in (None, 0.5):
            limit = stage.inject(rpc, status=Status.RESOURCE_EXHAUSTED, retry_after=retry_after)
            _wait_until_affected([limit])
            time.sleep(3)
            if serving:
                stage.check_serving()
            limit.end()

    return disrupt


def refused(rpc: str) -> Callable[[Stage], None]:
    """Returns a disruption that makes an RPC fail once with each status."""

    def disrupt(stage: Stage) -> None:
        faults = [stage.inject(rpc, status=status, times=1) for status in REFUSALS]
        _wait_until_affected(faults)
        time.sleep(1)
        for fault in faults:
            fault.end()

    return disrupt


def throttled_and_refused(rpc: str) -> Callable[[Stage], None]:
    """Returns a disruption that throttles an RPC, and then makes it fail once with each status."""

    def disrupt(stage: Stage) -> None:
        throttled(rpc, serving=True)(stage)
        refused(rpc)(stage)

    return disrupt


def _wait_until_affected(faults: Sequence[Fault]) -> None:
    """Waits until each fault has affected an RPC, for at most 12 s: some RPCs are rare."""
    until = time.monotonic() + 12
    while time.monotonic() < until and not all(fault.befallen for fault in faults):
        time.sleep(0.02)


def limited_at_the_start(stage: Stage) -> None:
    """Kills a gateway, and throttles the first RPC of each kind of its replacement."""
    for rpc in RPCS_AT_START:
        stage.inject(rpc, status=Status.RESOURCE_EXHAUSTED, times=1)
    kill_a_gateway(stage)


def wrong_clocks(seconds: float) -> Callable[[Stage], None]:
    """Returns a function that replaces the gateways by two whose clocks are wrong: one is ahead, the other behind."""

    def prepare(stage: Stage) -> None:
        for gateway, offset in zip(stage.gateways(), (seconds, -seconds), strict=True):
            stage.cloud.set_clock(APP, offset)
            gateway.interrupt()
            gateway.wait(40)
            stage.wait_until_healthy()

    return prepare


def both_are_called(stage: Stage) -> None:
    """Waits until each gateway has a call."""
    for gateway in stage.gateways():
        wait_for(lambda gateway=gateway: stage.active(gateway) > 0, "each gateway has calls", 8)  # type: ignore[misc]


def delete_the_directory(stage: Stage) -> None:
    """Deletes the Dict with the addresses, with the command in the documentation."""
    for name in stage.directories():
        done = stage.cloud.cli("dict", "delete", "--yes", name)
        assert done.returncode == 0, done.stderr
    wait_for(lambda: bool(stage.directories()), "there is a directory again", 45)


def expire_the_queue(stage: Stage) -> None:
    """Removes ephemeral objects, as Modal does if their heartbeats stop."""
    stage.cloud.expire_ephemeral()


def silence_a_tunnel(stage: Stage) -> None:
    """Blocks all bytes to a published gateway. New callers must not have failed calls."""
    tunnel = stage.tunnel(stage.gateways()[0])
    tunnel.silence()
    now = time.monotonic()
    with stage.callers(replace(stage.load(), streams=8, deadline=10.0)) as callers:
        callers.wait_for_answers(10)
        time.sleep(3)
        promises = broken_promises(callers.finish(20), Times(now, time.monotonic()), Cost())
    assert not promises, f"new callers: {promises}"
    tunnel.restore()


def limit_cancels(stage: Stage) -> None:
    """Throttles all cancellations for some seconds."""
    limit = stage.inject("FunctionCallCancel", status=Status.RESOURCE_EXHAUSTED)
    time.sleep(5)
    limit.end()


def lasting(seconds: float) -> Callable[[Stage], None]:
    """Returns a disruption that only waits for so many seconds."""
    return lambda _: time.sleep(seconds)


def scenarios(cancels: int) -> list[Scenario]:
    """Returns all scenarios, in the order in which they run. One of them cancels `cancels` calls."""
    lost = Cost(running=UNAVAILABLE)
    absent = Cost(running=UNAVAILABLE, during=UNAVAILABLE)
    several = Cost(during=UNAVAILABLE | {"RESOURCE_EXHAUSTED", "FAILED_PRECONDITION"}, max_calls=len(REFUSALS))
    silent = Cost(during=UNAVAILABLE | {"DEADLINE_EXCEEDED"})
    limited = Cost(during=UNAVAILABLE | {"RESOURCE_EXHAUSTED"})
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
        *(Scenario(f"throttled-{rpc}", throttled(rpc, serving=False), limited) for rpc in RPCS_OF_EACH_CALL),
        *(Scenario(f"refused-{rpc}", refused(rpc), several) for rpc in RPCS_OF_EACH_CALL),
        *(Scenario(f"rpc-{rpc}", throttled_and_refused(rpc)) for rpc in RPCS_OF_ALL_CALLS),
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
