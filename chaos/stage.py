"""A deployment on the stand-in of Modal's cloud: two gateways, a Model that plays a script, and callers in another process."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Final

import grpc
from flywheel_proto.v1 import generation_pb2, generation_pb2_grpc
from flywheel_server.engines.scripted import Script
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpclib import Status

from chaos.callers import FIRST
from chaos.load import BYTES_PER_TOKEN, TOKEN_DELAY, Load, Outcome
from tests.deployment.conftest import AUTHORIZATION, KEY, ROOT, deploy
from tests.modal_cloud import Container, Fault, ModalCloud, Tunnel, scripted, with_clock

APP: Final = "service"
ENGINE: Final = "engine"
GATEWAYS: Final = 2
SCRIPT: Final = Script(plays_prompt=True, bytes_per_token=BYTES_PER_TOKEN, token_delay=TOKEN_DELAY)
SETTINGS: Final = {
    "FLYWHEEL_MODAL_APP": ENGINE,
    "FLYWHEEL_DEPLOY_GATEWAY_MIN_CONTAINERS": str(GATEWAYS),
    "FLYWHEEL_WITHDRAW_WINDOW": "2",
    "FLYWHEEL_HEALTH_INTERVAL": "1",
}


class NotInTimeError(Exception):
    """Something that should have come about did not."""


def wait_for(condition: Callable[[], bool], what: str, within: float = 30.0) -> None:
    """Returns when the condition holds; raises `NotInTimeError`."""
    until = time.monotonic() + within
    while not condition():
        if time.monotonic() >= until:
            raise NotInTimeError(f"not within {within:g} s: {what}")
        time.sleep(0.02)


class Stage:
    """The deployment, and what can befall it."""

    def __init__(self, cloud: ModalCloud) -> None:
        self.cloud = cloud
        self._faults: list[Fault] = []
        self._authority = cloud.directory / "authority.pem"
        self._authority.write_bytes(cloud.ca_certificate)
        self._credentials = grpc.ssl_channel_credentials(cloud.ca_certificate)

    # What there is

    def deploy_gateways(self) -> None:
        """Deploys the gateways with the real command; raises `NotInTimeError` where that fails."""
        done = deploy(self.cloud, APP, **SETTINGS)
        if done.returncode:
            raise NotInTimeError(done.stdout + done.stderr)

    def deploy_engine(self) -> None:
        """Deploys the class that the gateways call."""
        scripted.deploy(self.cloud, ENGINE, SCRIPT)

    def gateways(self) -> list[Container]:
        """Returns the containers of gateways that have been published and have not been told to end."""
        published = [each for each in self.cloud.containers(f"{APP}/Gateway") if each.ready and each.alive]
        return [each for each in published if not each.ending and not each.stopping]

    def models(self) -> list[Container]:
        """Returns the containers of the Model."""
        return self.cloud.containers(f"{ENGINE}/Model")

    def tunnel(self, gateway: Container) -> Tunnel:
        """Returns the tunnel to a gateway."""
        return next(tunnel for tunnel in self.cloud.tunnels if tunnel.task_id == gateway.task_id and tunnel.open)

    def active(self, gateway: Container) -> int:
        """Returns how many calls the gateway works on, as it says itself."""
        with self._channel(gateway) as channel:
            stub = generation_pb2_grpc.GenerationServiceStub(channel)
            return int(stub.GetStats(generation_pb2.GetStatsRequest(), metadata=AUTHORIZATION, timeout=5).active)

    def _channel(self, gateway: Container) -> grpc.Channel:
        tunnel = self.tunnel(gateway)
        return grpc.secure_channel(f"{tunnel.host}:{tunnel.port}", self._credentials)

    def directories(self) -> list[str]:
        """Returns the names of the Dicts in which gateways publish their addresses."""
        return [name for name in self.cloud.dicts if name.endswith("-endpoints")]

    def left(self) -> int:
        """Returns how many calls Modal still has: in containers, or waiting for one."""
        running = sum(len(model.inputs) for model in self.models())
        return running + sum(call.state == "pending" for call in self.cloud.calls)

    # What is expected of it

    def check_serving(self) -> None:
        """Raises `NotInTimeError` unless all gateways are SERVING, as they should be while calls can be made."""
        for gateway in self.gateways():
            if not self._serving(gateway):
                raise NotInTimeError("a gateway is not SERVING, while calls can be made")

    def wait_until_whole(self, within: float = 30.0) -> None:
        """Returns when there are as many gateways as there should be, and all are SERVING; raises `NotInTimeError`."""
        until = time.monotonic() + within
        wait_for(lambda: len(self.gateways()) == GATEWAYS, "two gateways", within)
        for gateway in self.gateways():
            wait_for(lambda gateway=gateway: self._serving(gateway), "SERVING", max(1.0, until - time.monotonic()))  # type: ignore[misc]

    def _serving(self, gateway: Container) -> bool:
        with self._channel(gateway) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            try:
                answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=3)
            except grpc.RpcError:
                return False
            return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    def wait_until_nothing_is_left(self, within: float) -> None:
        """Returns when Modal has no call any more; raises `NotInTimeError`."""
        wait_for(lambda: self.left() == 0, "no call left on Modal", within)

    def disturb(
        self,
        *rpcs: str,
        status: Status | None = None,
        delay: float = 0.0,
        times: int | None = None,
        retry_after: float | None = None,
    ) -> Fault:
        """Has something befall the named RPCs, or all if none is named, of clients and containers; see `Fault`."""
        fault = self.cloud.disturb(
            *rpcs, side="both", status=status, message="chaos", delay=delay, times=times, retry_after=retry_after
        )
        self._faults.append(fault)
        return fault

    def calm(self) -> int:
        """Ends whatever disturbs it, and returns how many RPCs that has struck."""
        struck = sum(fault.befallen for fault in self._faults)
        self._faults.clear()
        self.cloud.calm()
        self.cloud.up()
        self.cloud.set_clock(APP, 0)
        for tunnel in self.cloud.tunnels:
            if tunnel.open:
                tunnel.restore()
        return struck

    def rebuild(self) -> None:
        """Puts new containers in the place of all, whatever state they are in."""
        self.calm()
        for gateway in self.gateways():
            gateway.kill()
            gateway.wait()
        self.cloud.reschedules_inputs = False
        try:
            self._end_all_calls()
        finally:
            self.cloud.reschedules_inputs = True
        self.wait_until_whole(60)

    def _end_all_calls(self) -> None:
        def ended() -> bool:
            for model in self.models():
                if model.inputs:
                    model.kill()
                    model.wait()
            return self.left() == 0

        wait_for(ended, "no call left", 30)

    # Callers

    @contextmanager
    def callers(self, load: Load, clock: float = 0.0) -> Iterator["Callers"]:
        """Lets callers call, whose clock is wrong by so many seconds, and waits for their first answer."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("MODAL_", "FLYWHEEL_"))}
        quiet = {"MODAL_LOGLEVEL": "ERROR"}  # it would tell of each RPC that it tries again
        callers = Callers(load, with_clock(kept | self.cloud.environ | quiet, clock))
        try:
            yield callers
        finally:
            callers.kill()

    def load(self) -> Load:
        """Returns calls to the gateways."""
        return Load(app=APP, key=KEY, authority=str(self._authority))


class Callers:
    """A process of callers, and what has come of its calls so far."""

    def __init__(self, load: Load, environ: dict[str, str]) -> None:
        self.outcomes: list[Outcome] = []
        self._first = threading.Event()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "chaos.callers", json.dumps(asdict(load))],
            cwd=ROOT,
            env=environ,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._reading = threading.Thread(target=self._read)
        self._reading.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.strip() == FIRST:
                self._first.set()
            else:
                self.outcomes.append(Outcome(**json.loads(line)))

    def wait_for_answers(self, within: float = 20.0) -> None:
        """Returns when a call has begun to answer; raises `NotInTimeError`."""
        wait_for(lambda: self._first.is_set() or self._process.poll() is not None, "a first answer", within)

    def finish(self, within: float) -> list[Outcome]:
        """Returns what came of all calls, once those have ended that have begun; raises `NotInTimeError`."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        return self.wait(within)

    def wait(self, within: float) -> list[Outcome]:
        """Returns what came of all calls, once it has made as many as it should; raises `NotInTimeError`."""
        wait_for(lambda: self._process.poll() is not None, "all calls have ended", within)
        self._reading.join()
        if self._process.returncode:
            raise NotInTimeError(f"the callers ended with {self._process.returncode}")
        return self.outcomes

    def kill(self) -> None:
        """Ends the process, unless it has ended."""
        self._process.kill()
        self._process.wait()
        self._reading.join()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


@contextmanager
def stage(directory: Path) -> Iterator[Stage]:
    """Gives a deployment that is ready for calls."""
    with ModalCloud(directory) as cloud:
        cloud.create_secret("flywheel-grpc-keys", {"FLYWHEEL_API_KEYS": KEY})
        made = Stage(cloud)
        made.deploy_engine()
        made.deploy_gateways()
        made.wait_until_whole(60)
        yield made
