"""An app for Modal whose class has an engine that dies as the text of a request says, supervised as in the Model."""

import asyncio
import os
import time
from typing import Any

import modal
from flywheel_server import supervision
from flywheel_server.deployment.model import RemoteModel
from flywheel_server.deployment.supervised import SupervisedEngine, end_container
from flywheel_server.engines.base import EngineFailedError, Event, PreparedRequest, Sink
from flywheel_server.engines.scripted import Script, ScriptedEngine
from flywheel_server.messages import GenerationRequest, GenerationResponseSample

image = modal.Image.debian_slim().add_local_python_source("flywheel_proto", "flywheel_server")
app = modal.App("mortal")


class UnpicklableError(Exception):
    def __init__(self, one: str, other: str) -> None:
        super().__init__(one + other)


class OwnError(EngineFailedError):
    """An error that callers do not know."""


OF_MODAL = ("NotFoundError", "ServiceError", "ResourceExhaustedError", "FunctionTimeoutError", "InvalidError", "AuthError")
FOREIGN: dict[str, BaseException] = {
    "OSError": OSError("SECRET"),
    "ConnectionError": ConnectionError("SECRET"),
    "TimeoutError": TimeoutError("SECRET"),
    "ValueError": ValueError("max_tokens: SECRET"),
    "TypeError": TypeError("got an unexpected keyword argument 'SECRET'"),
    "UnpicklableError": UnpicklableError("SECRET", "SECRET"),
    "SystemExit": SystemExit("SECRET"),
    "CancelledError": asyncio.CancelledError("SECRET"),
    "OwnError": OwnError("SECRET"),
    **{f"modal.{name}": getattr(modal.exception, name)("SECRET") for name in OF_MODAL},
}


class Made:
    """Collects the events of the script, for an engine that looks at each of them."""

    is_full = False

    def __init__(self) -> None:
        self.events: asyncio.Queue[Event | None] = asyncio.Queue()

    def emit(self, event: Event) -> None:
        self.events.put_nowait(event)


class MortalEngine(ScriptedEngine):
    """Does what the text of a request says. After a restart, it is alive again."""

    def __init__(self) -> None:
        super().__init__(Script(token_delay=0.01))
        self.calls = 0
        self.starts = 0
        self.dead = False
        self.hangs = False
        self.may_start = True
        self.may_stop = True
        self.loading = 0.0

    async def __aenter__(self) -> Any:
        if not self.may_start:
            raise EngineFailedError("it is broken")
        time.sleep(self.loading)  # noqa: ASYNC251 - llama.cpp, too, loads a model while nothing else can run
        self.loading = 0.0
        self.starts += 1
        self.dead = self.hangs = False
        return self

    async def __aexit__(self, *exception: object) -> None:
        if not self.may_stop:
            await asyncio.Event().wait()

    def _die(self, how: str) -> None:
        self.may_start = how != "for good"
        self.may_stop = how != "undead"
        self.loading = 6.0 if how == "slowly started" else 0.0
        self.hangs = how == "silently"
        self.dead = True

    async def prepare(self, request: GenerationRequest) -> PreparedRequest:
        self.calls += 1
        kind, _, how = request.text.partition(" ")
        if kind == "prepare":
            self._die(how)
        await self._live()
        if kind == "raise-early":
            raise FOREIGN[how]
        return await super().prepare(request)

    async def generate(self, prepared: PreparedRequest, sink: Sink) -> None:
        kind, _, how = prepared.request.text.partition(" ")
        if kind == "queue":
            self._die(how)
        await self._live()
        number = 0
        made = Made()
        generating = asyncio.create_task(super().generate(prepared, made))
        generating.add_done_callback(lambda _: made.events.put_nowait(None))
        try:
            while event := await made.events.get():
                number += 1
                if kind == "raise" and number == 5:
                    raise FOREIGN[how]
                if kind == "decode" and number == 5:
                    self._die(how)
                await self._live()
                if kind == "afterwards" and isinstance(event, GenerationResponseSample):
                    self._die(how)
                sink.emit(event)
            await generating
        finally:
            generating.cancel()

    async def check(self) -> None:
        await self._live()

    async def _live(self) -> None:
        if self.hangs:
            await asyncio.Event().wait()
        if self.dead:
            raise EngineFailedError("dead")


@app.cls(image=image, max_containers=1)
@modal.concurrent(max_inputs=100)
class Model:
    """Has the methods of this project's class."""

    @modal.enter()
    async def load(self) -> None:
        # Here, in the container: tests import this module too.
        supervision.RESTART_INTERVAL = supervision.STOP_TIMEOUT = 0.5  # type: ignore[misc]
        self.mortal = MortalEngine()
        self.engine = await SupervisedEngine(self.mortal, end_container, timeout=1.0).__aenter__()
        self.remote = RemoteModel(self.engine)

    @modal.exit()
    async def unload(self) -> None:
        await self.engine.__aexit__()

    @modal.method()
    async def generate(self, /, **fields: Any) -> dict[str, Any]:
        return await self.remote.generate(**fields)

    @modal.method()
    async def generate_deltas(self, /, **arguments: Any) -> dict[str, Any]:
        return await self.remote.generate_deltas(**arguments)

    @modal.method()
    async def counts(self) -> tuple[int, int, int, int]:
        """Returns the id of the process, how often its engine was started and called, and how many calls it works on."""
        return os.getpid(), self.mortal.starts, self.mortal.calls, self.mortal.running
