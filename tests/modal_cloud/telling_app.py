"""An app for Modal whose classes tell, in the text of each sample, the fields beyond Flywheel's eleven that they got.

`TELLING_APP` names the app.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import modal
from flywheel_server.deployment import signature
from flywheel_server.deployment.model import RemoteModel
from flywheel_server.engines.base import (
    EngineModel,
    InvalidFieldError,
    PreparedRequest,
    PromptToken,
    Sink,
    Started,
    TextDelta,
    UnsupportedFieldError,
)
from flywheel_server.engines.modal.remote_fields import further_fields
from flywheel_server.engines.scripted import ScriptedEngine
from flywheel_server.messages import FieldViolation, GenerationRequest, GenerationResponseSample, LikelyToken, Token

environment: dict[str, str | None] = {"TELLING_APP": os.environ["TELLING_APP"]}
image = modal.Image.debian_slim().add_local_python_source("flywheel_proto", "flywheel_server")
app = modal.App(environment["TELLING_APP"])
UNREADABLE = b"\xf0\x9f"
"""The bytes of a token that is half a character."""


def tokens_of(text: str, likely: int) -> list[Token]:
    """Returns one token for each character, with this many likeliest tokens."""
    likeliest = tuple(LikelyToken(number, UNREADABLE, -float(number)) for number in range(likely))
    return [Token(position, character.encode(), -0.5, likeliest) for position, character in enumerate(text)]


class TellingEngine(ScriptedEngine):
    async def prepare(self, request: GenerationRequest) -> PreparedRequest:
        match request.text:
            case "invalid":
                problem = "must be less than 70, the size of the vocabulary"
                raise InvalidFieldError("logit_bias[77]", problem, [FieldViolation("logit_bias[78]", problem)])
            case "unsupported":
                raise UnsupportedFieldError("regex", "this model has no constraints", ["choices"])
        return PreparedRequest(request)

    async def generate(self, prepared: PreparedRequest, sink: Sink) -> None:
        request = prepared.request
        text = "a" * request.max_tokens if request.text == "long" else json.dumps(further_fields(request))
        tokens = tokens_of(text, request.logprobs) if request.logprobs else []
        last = [Token(2, UNREADABLE, -1.0)] if tokens else []
        sink.emit(Started())
        for index in range(request.num_samples):
            if prepared.request.text != "at once":
                for position, character in enumerate(text, start=1):
                    sink.emit(TextDelta(index, character, position, tokens[position - 1 : position]))
            sink.emit(
                GenerationResponseSample(
                    text=text,
                    generated_tokens=len(text),
                    finished=1.0,
                    finish_reason="stop",
                    index=index,
                    prompt_tokens=3,
                    seed=(request.seed or 0) + index,
                    tokens=(*tokens, *last),
                )
            )

    async def tokenize(self, prepared: PreparedRequest) -> Sequence[PromptToken]:
        words = [*prepared.request.text.split(), *(message.content for message in prepared.request.messages)]
        return [PromptToken(position, word.encode() + UNREADABLE) for position, word in enumerate(words)]

    def model(self) -> EngineModel:
        return replace(super().model(), supported_fields=frozenset(GenerationRequest.model_fields))


class Whole:
    @modal.enter()
    def load(self) -> None:
        self.remote = RemoteModel(TellingEngine())

    @modal.method()
    @signature.takes_fields()
    async def generate(self, /, **fields: Any) -> dict[str, Any]:
        return await self.remote.generate(**fields)


class Streaming(Whole):
    @modal.method()
    @signature.takes_fields("queue", "partition", "call")
    async def generate_deltas(self, /, **arguments: Any) -> dict[str, Any]:
        return await self.remote.generate_deltas(**arguments)

    @modal.method()
    @signature.takes_fields()
    async def tokenize(self, /, **fields: Any) -> dict[str, Any]:
        return await self.remote.tokenize(**fields)


@app.cls(image=image, env=environment, max_containers=1)
@modal.concurrent(max_inputs=1000)
class Model(Streaming):
    """Has all methods of this project's class."""


@app.cls(image=image, env=environment, max_containers=1)
@modal.concurrent(max_inputs=1000)
class ModelWhole(Whole):
    """Has only the method that returns all at once."""


@app.cls(image=image, env=environment, max_containers=1)
@modal.concurrent(max_inputs=1000)
class Flywheel:
    """Has only what MK1 Flywheel's class has."""

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
        sample = {"text": "flywheel", "generated_tokens": 1, "finished": 1.0, "finish_reason": "length"}
        return {"created": 1.0, "finished": 1.0, "num_samples": 1, "responses": [sample], "prompt_tokens": 3}
