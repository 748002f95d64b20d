"""Runs a deployment on the stand-in of Modal's cloud: two gateways and a scripted Model, with callers in another process."""

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

from chaos.callers import FIRST_ANSWER
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
    """A condition did not become true in time."""


def wait_for(condition: Callable[[], bool], what: str, within: float = 30.0) -> None:
    """Waits until the condition holds. Raises `NotInTimeError` after `within` seconds."""
    until = time.monotonic() + within
    while not condition():
        if time.monotonic() >= until:
            raise NotInTimeError(f"not within {within:g} s: {what}")
        time.sleep(0.02)


class Stage:
    """A deployment, and the means to disrupt it."""

    def __init__(self, cloud: ModalCloud) -> None:
        self.cloud = cloud
        self._faults: list[Fault] = []
        self._authority = cloud.directory / "authority.pem"
        self._authority.write_bytes(cloud.ca_certificate)
        self._credentials = grpc.ssl_channel_credentials(cloud.ca_certificate)

    # The deployment

    def deploy_gateways(self) -> None:
        """Deploys the gateways with the real command. Raises `NotInTimeError` if that fails."""
        done = deploy(self.cloud, APP, **SETTINGS)
        if done.returncode:
            raise NotInTimeError(done.stdout + done.stderr)

    def deploy_engine(self) -> None:
        """Deploys the class that the gateways call."""
        scripted.deploy(self.cloud, ENGINE, SCRIPT)

    def gateways(self) -> list[Container]:
        """Returns the gateways' containers that have been published and have not been told to end."""
        published = [each for each in self.cloud.containers(f"{APP}/Gateway") if each.ready and each.alive]
        return [each for each in published if not each.ending and not each.stopping]

    def models(self) -> list[Container]:
        """Returns the containers of the Model."""
        return self.cloud.containers(f"{ENGINE}/Model")

    def tunnel(self, gateway: Container) -> Tunnel:
        """Returns the tunnel to a gateway."""
        return next(tunnel for tunnel in self.cloud.tunnels if tunnel.task_id == gateway.task_id and tunnel.open)

    def active(self, gateway: Container) -> int:
        """Returns how many calls the gateway works on, from its GetStats."""
        with self._channel(gateway) as channel:
            stub = generation_pb2_grpc.GenerationServiceStub(channel)
            return int(stub.GetStats(generation_pb2.GetStatsRequest(), metadata=AUTHORIZATION, timeout=5).active)

    def _channel(self, gateway: Container) -> grpc.Channel:
        tunnel = self.tunnel(gateway)
        return grpc.secure_channel(f"{tunnel.host}:{tunnel.port}", self._credentials)

    def directories(self) -> list[str]:
        """Returns the names of the Dicts in which gateways publish their addresses."""
        return [name for name in self.cloud.dicts if name.endswith("-endpoints")]

    def remaining_calls(self) -> int:
        """Returns how many calls Modal still has, in containers or waiting for a container."""
        running = sum(len(model.inputs) for model in self.models())
        return running + sum(call.state == "pending" for call in self.cloud.calls)

    # Expectations

    def check_serving(self) -> None:
        """Raises `NotInTimeError` unless all gateways are SERVING."""
        for gateway in self.gateways():
            if not self._serving(gateway):
                raise NotInTimeError("a gateway is not SERVING, while calls can be made")

    def wait_until_healthy(self, within: float = 30.0) -> None:
        """Waits until all gateways run and are SERVING. Raises `NotInTimeError`."""
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

    def wait_until_no_calls(self, within: float) -> None:
        """Waits until Modal has no calls. Raises `NotInTimeError`."""
        wait_for(lambda: self.remaining_calls() == 0, "no call left on Modal", within)

    def inject(
        self,
        *rpcs: str,
        status: Status | None = None,
        delay: float = 0.0,
        times: int | None = None,
        retry_after: float | None = None,
    ) -> Fault:
        """Injects a fault into the named RPCs of clients and containers, or into all RPCs if none is named; see `Fault`."""
        fault = self.cloud.disturb(
            *rpcs, side="both", status=status, message="chaos", delay=delay, times=times, retry_after=retry_after
        )
        self._faults.append(fault)
        return fault

    def end_disruptions(self) -> int:
        """Ends all faults and other disruptions, and returns how many RPCs the faults have affected."""
        affected = sum(fault.befallen for fault in self._faults)
        self._faults.clear()
        self.cloud.calm()
        self.cloud.up()
        self.cloud.set_clock(APP, 0)
        for tunnel in self.cloud.tunnels:
            if tunnel.open:
                tunnel.restore()
        return affected

    def rebuild(self) -> None:
        """Replaces all containers, whatever their state."""
        self.end_disruptions()
        for gateway in self.gateways():
            gateway.kill()
            gateway.wait()
        self.cloud.reschedules_inputs = False
        try:
            self._end_all_calls()
        finally:
            self.cloud.reschedules_inputs = True
        self.wait_until_healthy(60)

    def _end_all_calls(self) -> None:
        def ended() -> bool:
            for model in self.models():
                if model.inputs:
                    model.kill()
                    model.wait()
            return self.remaining_calls() == 0

        wait_for(ended, "no call left", 30)

    # Callers

    @contextmanager
    def callers(self, load: Load, clock: float = 0.0) -> Iterator["Callers"]:
        """Runs callers for the length of the context.

        Arguments:
            load: The calls that they make.
            clock: Seconds by which their clock is wrong.
        """
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("MODAL_", "FLYWHEEL_"))}
        quiet = {"MODAL_LOGLEVEL": "ERROR"}  # otherwise Modal's client logs each retry
        callers = Callers(load, with_clock(kept | self.cloud.environ | quiet, clock))
        try:
            yield callers
        finally:
            callers.kill()

    def load(self) -> Load:
        """Returns the default load for the gateways."""
        return Load(app=APP, key=KEY, authority=str(self._authority))


class Callers:
    """A process of callers, and the outcomes of its calls so far."""

    def __init__(self, load: Load, environ: dict[str, str]) -> None:
        self.outcomes: list[Outcome] = []
        self._answered = threading.Event()
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
            if line.strip() == FIRST_ANSWER:
                self._answered.set()
            else:
                self.outcomes.append(Outcome(**json.loads(line)))

    def wait_for_answers(self, within: float = 20.0) -> None:
        """Waits for the first answer of any call. Raises `NotInTimeError`."""
        wait_for(lambda: self._answered.is_set() or self._process.poll() is not None, "a first answer", within)

    def finish(self, within: float) -> list[Outcome]:
        """Lets no new calls begin, and returns the outcomes after all calls have ended. Raises `NotInTimeError`."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        return self.wait(within)

    def wait(self, within: float) -> list[Outcome]:
        """Waits until all calls of the load have ended, and returns the outcomes. Raises `NotInTimeError`."""
        wait_for(lambda: self._process.poll() is not None, "all calls have ended", within)
        self._reading.join()
        if self._process.returncode:
            raise NotInTimeError(f"the callers ended with {self._process.returncode}")
        return self.outcomes

    def kill(self) -> None:
        """Kills the process, unless it has ended."""
        self._process.kill()
        self._process.wait()
        self._reading.join()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


@contextmanager
def stage(directory: Path) -> Iterator[Stage]:
    """Runs a deployment for the length of the context, which begins when the deployment is ready for calls."""
    with ModalCloud(directory) as cloud:
        cloud.create_secret("flywheel-grpc-keys", {"FLYWHEEL_API_KEYS": KEY})
        deployment = Stage(cloud)
        deployment.deploy_engine()
        deployment.deploy_gateways()
        deployment.wait_until_healthy(60)
        yield deployment
