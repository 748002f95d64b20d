"""An app for Modal whose classes answer like Flywheel's, quickly, slowly or wrongly, as the scripted engine does.

`SCRIPTED_APP` names the app, and `SCRIPT` is what its engine plays. With `SCRIPTED_NEWER`, it is of a version of this package
that knows one more field of a request, `scratch`, and says more in its answers. With `SCRIPTED_RECEIVER`, its class Model sends
traces to this URL.
"""

import asyncio
import builtins
import os
import sys
from dataclasses import replace
from typing import Any

import modal
from flywheel_server.deployment import model, signature
from flywheel_server.deployment.model import RemoteModel
from flywheel_server.deployment.supervised import SupervisedEngine, end_container
from flywheel_server.engines.base import EngineModel, Event, PreparedRequest, PromptTooLongError, Sink
from flywheel_server.engines.modal import event_batch
from flywheel_server.engines.scripted import SUPPORTED_FIELDS, Script, ScriptedEngine
from flywheel_server.messages import GenerationRequest, GenerationResponseSample

VARIABLES = ("SCRIPTED_APP", "SCRIPT", "SCRIPTED_NEWER", "SCRIPTED_RECEIVER")
environment: dict[str, str | None] = {name: os.environ[name] for name in VARIABLES}
image = modal.Image.debian_slim().add_local_python_source("flywheel_proto", "flywheel_server")
app = modal.App(environment["SCRIPTED_APP"])


REFUSED = GenerationRequest.model_fields.keys() - SUPPORTED_FIELDS
"""The fields that the engine does not honour."""

NEWS = {"news": [{"of": "a later version"}]}


class NewerRequest(GenerationRequest):
    scratch: int = 0


class NewerSink:
    """Says in each sample what the request has in the field."""

    is_full = False

    def __init__(self, request: GenerationRequest, sink: Sink) -> None:
        self._request = request
        self._sink = sink

    def emit(self, event: Event) -> None:
        if isinstance(event, GenerationResponseSample) and isinstance(self._request, NewerRequest):
            event = event.model_copy(update={"finish_reason": f"scratch {self._request.scratch}"})
        self._sink.emit(event)


class NewerEngine(ScriptedEngine):
    def model(self) -> EngineModel:
        return replace(super().model(), supported_fields=frozenset(NewerRequest.model_fields))

    async def generate(self, prepared: PreparedRequest, sink: Sink) -> None:
        await super().generate(prepared, NewerSink(prepared.request, sink))


def newer_pack(self: event_batch.EventBatch) -> dict[str, Any]:
    packed = OLDER_PACK(self)
    for event in packed["events"]:
        event.update(NEWS)
        event.get("sample", {}).update(NEWS)
    return {**packed, **NEWS}


OLDER_PACK = event_batch.EventBatch.pack
NEWER = bool(os.environ["SCRIPTED_NEWER"])
if NEWER:
    for module in (model, signature):
        module.GenerationRequest = NewerRequest  # type: ignore[attr-defined]
    event_batch.EventBatch.pack = newer_pack  # type: ignore[method-assign]


def scripted_engine() -> ScriptedEngine:
    script = Script.model_validate_json(os.environ["SCRIPT"])
    return NewerEngine(script) if NEWER else ScriptedEngine(script)


@app.cls(image=image, env=environment, max_containers=1)
@modal.concurrent(max_inputs=1000)
class Model:
    """Has all methods of this project's class."""

    @modal.enter()
    async def load(self) -> None:
        self.engine = scripted_engine()
        self.supervised = await SupervisedEngine(self.engine, end_container).__aenter__()
        self.remote = RemoteModel(self.supervised, os.environ["SCRIPTED_RECEIVER"] or None)

    @modal.exit()
    async def unload(self) -> None:
        await self.remote.leave()
        await self.supervised.__aexit__()
        await self.remote.stop_tracing()

    @modal.method()
    @signature.takes_fields(refused=REFUSED)
    async def generate(self, /, **fields: Any) -> dict[str, Any]:
        return await self.remote.generate(**fields)

    @modal.method()
    @signature.takes_fields("queue", "partition", "call", refused=REFUSED)
    async def generate_deltas(self, /, **arguments: Any) -> dict[str, Any]:
        return await self.remote.generate_deltas(**arguments)

    @modal.method()
    async def tokenize(self, /, **fields: Any) -> dict[str, Any]:
        return await self.remote.tokenize(**fields)

    @modal.method()
    async def running(self) -> int:
        return self.engine.running


def eleven(  # noqa: PLR0917 - Flywheel's
    text: str,
    max_tokens: int,
    eos_token_ids: list[int],
    max_input_tokens: int,
    num_samples: int,
    stop: list[str],
    temperature: float,
    top_k: int,
    top_p: float,
    presence_penalty: float,
    frequency_penalty: float,
) -> dict[str, Any]:
    return dict(locals())


class Whole:
    @modal.enter()
    def load(self) -> None:
        self.remote = RemoteModel(scripted_engine())

    @modal.method()
    @signature.takes_fields(refused=REFUSED)
    async def generate(self, /, **fields: Any) -> dict[str, Any]:
        answer = await self.remote.generate(**fields)
        if NEWER:
            answer.update(NEWS)
            for sample in answer["responses"]:
                sample.update(NEWS)
        return answer


@app.cls(image=image, env=environment, max_containers=1)
@modal.concurrent(max_inputs=1000)
class Versioned(Whole):
    """Has the methods of this project's class, with its signature, in this version or in a newer one."""

    @modal.method()
    @signature.takes_fields("queue", "partition", "call", refused=REFUSED)
    async def generate_deltas(self, /, **arguments: Any) -> dict[str, Any]:
        return await self.remote.generate_deltas(**arguments) | (NEWS if NEWER else {})


@app.cls(image=image, env=environment, max_containers=1)
@modal.concurrent(max_inputs=1000)
class VersionedWhole(Whole):
    """Has only the method that returns all at once."""


@app.cls(image=image, env=environment, max_containers=1)
@modal.concurrent(max_inputs=1000)
class Flywheel:
    """Has only what MK1 Flywheel's class has, and answers as it does: without indexes, and numbers of tokens once."""

    @modal.enter()
    def load(self) -> None:
        self.engine = ScriptedEngine(Script.model_validate_json(os.environ["SCRIPT"]))
        self.remote = RemoteModel(self.engine)

    @modal.method()
    async def generate(  # noqa: PLR0917 - Flywheel's
        self,
        text: str,
        max_tokens: int,
        eos_token_ids: list[int],
        max_input_tokens: int,
        num_samples: int,
        stop: list[str],
        temperature: float,
        top_k: int,
        top_p: float,
        presence_penalty: float,
        frequency_penalty: float,
    ) -> dict[str, Any]:
        fields = {name: value for name, value in locals().items() if name != "self"}
        answer = await self.remote.generate(**fields)
        for sample in answer["responses"]:
            for ours in ("index", "prompt_tokens", "stop_sequence", "seed", "tokens"):
                del sample[ours]
        return answer


@app.cls(image=image, env=environment, max_containers=1)
@modal.concurrent(max_inputs=1000)
class Untold:
    """Takes what Flywheel's class takes, but its signature does not tell."""

    @modal.enter()
    def load(self) -> None:
        self.remote = RemoteModel(ScriptedEngine(Script.model_validate_json(os.environ["SCRIPT"])))

    @modal.method()
    async def generate(self, /, **anything: Any) -> dict[str, Any]:
        return await self.remote.generate(**eleven(**anything))


class UnpicklableError(Exception):
    """Cannot be made again from what it was pickled as."""

    def __init__(self, one: str, other: str) -> None:
        super().__init__(one + other)


def named_exception(name: str) -> type[BaseException] | None:
    """Returns the exception of Python or, as `modal.X`, of Modal that has this name."""
    module, _, kind = name.rpartition(".")
    found = getattr(modal.exception if module else builtins, kind, None)
    return found if isinstance(found, type) and issubclass(found, BaseException) else None


async def misbehave(text: str) -> Any:  # noqa: C901 - a table
    """Does what the text of the request says, or returns None."""
    if kind := named_exception(text.removeprefix("raise ")):
        raise kind("SECRET of the class")
    match text:
        case "raise":
            raise ValueError("SECRET of the class")
        case "raise what cannot be unpickled":
            raise UnpicklableError("SECRET", "of the class")
        case "raise CancelledError":
            raise asyncio.CancelledError
        case "exit":
            sys.exit("SECRET of the class")
        case "die":
            os._exit(3)
        case "hang":
            await asyncio.Event().wait()
        case "too long":
            raise PromptTooLongError(9000, 5, 8192)
        case "leave the stop sequence in":
            sample = {"text": "one END two", "generated_tokens": 3, "finished": 2.0, "finish_reason": "stop"}
            return {"created": 1.0, "finished": 2.0, "num_samples": 1, "responses": [sample]}
        case "no samples":
            return {"created": 1.0, "finished": 2.0, "num_samples": 0, "responses": []}
        case "half a sample":
            return {"created": 1.0, "finished": 2.0, "num_samples": 1, "responses": [{"text": "SECRET"}]}
        case "a wrong type":
            return {"created": "SECRET", "finished": 2.0, "num_samples": 1, "responses": []}
    return None


@app.cls(image=image, env=environment, max_containers=1)
@modal.concurrent(max_inputs=100)
class Faulty:
    """Misbehaves as the request's text says, and has no `generate_deltas`."""

    @modal.method()
    async def generate(self, /, text: str, **fields: Any) -> Any:
        return await misbehave(text)


@app.cls(image=image, env=environment, max_containers=1)
@modal.concurrent(max_inputs=100)
class FaultyStream:
    """Misbehaves as the request's text says, after the first delta."""

    @modal.method()
    async def generate(self, /, text: str, **fields: Any) -> Any:
        return await misbehave(text)

    @modal.method()
    async def generate_deltas(self, /, queue: modal.Queue, partition: str, call: str, text: str, **fields: Any) -> Any:  # noqa: C901 - a table
        started, delta = {"event": "started"}, {"event": "delta", "index": 0, "text": "SECRET", "generated_tokens": 1}

        async def send(number: int, *events: Any, attempt: str = "a") -> None:
            pile = {"call": call, "attempt": attempt, "number": number, "events": list(events)}
            await queue.put.aio(pile, partition=partition)

        await send(0, started)
        if text != "begin anew":
            await send(1, delta)
        match text:
            case "nothing of this kind":
                await send(2, {"event": "SECRET"})
            case "leave a gap":
                await send(3, delta)
                return {"attempt": "a", "piles": 4}
            case "lose the end":
                return {"attempt": "a", "piles": 3}
            case "begin anew":
                await send(0, started, attempt="b")
                await send(1, {**delta, "text": "late"}, attempt="a")
                sample = {"text": "new", "generated_tokens": 1, "finished": 1.0, "finish_reason": "length"}
                await send(1, {**delta, "text": "new"}, {"event": "sample", "sample": sample}, attempt="b")
                return {"attempt": "b", "piles": 2}
            case "send everything twice":
                await send(0, started)
                await send(1, delta)
                sample = {"text": "SECRET", "generated_tokens": 1, "finished": 1.0, "finish_reason": "length"}
                for _ in range(2):
                    await send(2, {"event": "sample", "sample": sample})
                return {"attempt": "a", "piles": 3}
            case "begin anew too late":
                await send(0, started, attempt="b")
                return {"attempt": "b", "piles": 2}
            case "return no receipt":
                return 2
            case _:
                await misbehave(text)
        return {"attempt": "a", "piles": 2}
