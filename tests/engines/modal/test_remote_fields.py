"""Every field beyond Flywheel's eleven reaches our class on Modal, and its results come back. MK1's class refuses each."""

import asyncio
import json
import pickle
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from flywheel_proto.v1 import generation_pb2 as pb
from flywheel_server.deployment.model import RemoteModel
from flywheel_server.engines.base import EngineModel, InvalidFieldError, PreparedRequest, UnsupportedFieldError
from flywheel_server.engines.modal.remote_fields import arguments_of
from flywheel_server.engines.scripted import ScriptedEngine
from flywheel_server.messages import FLYWHEEL_FIELDS, SERVER_FIELDS, FieldViolation, GenerationRequest
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo

from tests.access.test_quotas import keys_for
from tests.modal_cloud import ModalCloud, scripted
from tests.server.test_errors import details_of
from tests.serving import Target, drained, serving, until

APP = "telling"
METHODS = ["Generate", "GenerateDeltas", "GenerateAll"]
UNREADABLE = b"\xf0\x9f"

FIELDS: dict[str, tuple[Any, Any]] = {
    "messages": ([pb.Message(role="user", content="é 🦙")], [{"role": "user", "content": "é 🦙"}]),
    "prompt_token_ids": ([5, 7], [5, 7]),
    "seed": (0, 0),
    "min_p": (0.25, 0.25),
    "repetition_penalty": (1.5, 1.5),
    "logit_bias": ({5: -100.0, 77: 1.5}, {"5": -100.0, "77": 1.5}),
    "json_schema": ("{}", "{}"),
    "regex": ("a|b", "a|b"),
    "choices": (pb.Choices(texts=["a", "b"]), ["a", "b"]),
    "logprobs": (2, 2),
    "time_limit": (1.5, 1.5),
}
"""Each field that the server passes on: its value in a request, and the value that the class gets."""


def request(**fields: Any) -> pb.GenerationRequest:
    prompt = {} if {"messages", "prompt_token_ids"} & fields.keys() else {"text": "hello"}
    return pb.GenerationRequest(**{**prompt, "max_tokens": 12, **fields})


def requests() -> list[pb.GenerationRequest]:
    """Returns a request for each field, and one with as many fields as a request may have."""
    exclusive = {"prompt_token_ids", "json_schema", "regex"}
    together = request(**{name: value for name, (value, _) in FIELDS.items() if name not in exclusive})
    return [*(request(**{name: value}) for name, (value, _) in FIELDS.items()), together]


@pytest.fixture(scope="module")
def deployed(cloud: ModalCloud) -> ModalCloud:
    path = Path(scripted.__file__).parent / "telling_app.py"
    deployed = cloud.cli("deploy", str(path), env={"TELLING_APP": APP})
    assert deployed.returncode == 0, deployed.stdout + deployed.stderr
    return cloud


@pytest.fixture(params=["Model", "ModelWhole"])
async def target(deployed: ModalCloud, request: pytest.FixtureRequest) -> AsyncIterator[Target]:
    async with serving(scripted.engine(APP, request.param)) as target:
        yield target


@pytest.fixture
async def model(deployed: ModalCloud) -> AsyncIterator[Target]:
    async with serving(scripted.engine(APP)) as target:
        yield target


@pytest.fixture
async def flywheel(deployed: ModalCloud) -> AsyncIterator[Target]:
    async with serving(scripted.engine(APP, "Flywheel")) as target:
        yield target


async def results(target: Target, method: str, asked: pb.GenerationRequest) -> list[dict[str, Any]]:
    """Returns the text, the seed and the tokens of each sample."""
    call = getattr(target.stub, method)(asked)
    messages = list((await call).responses) if method == "GenerateAll" else [each async for each in call]
    samples: dict[int, dict[str, Any]] = {}
    for message in messages:
        sample = samples.setdefault(message.index, {"text": "", "seed": None, "tokens": []})
        sample["text"] += message.text
        sample["tokens"] += message.tokens
        sample["seed"] = message.seed
    return [samples[index] for index in sorted(samples)]


async def error_of(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await drained(call)
    return caught.value


def violations_of(error: grpc.aio.AioRpcError) -> list[tuple[str, str]]:
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    return [(violation.field, violation.description) for violation in details_of(error)[BadRequest].field_violations]


async def supported_fields(target: Target) -> set[str]:
    return {*(await target.stub.GetModel(pb.GetModelRequest())).supported_fields}


def test_all_fields_are_here() -> None:
    assert {*FIELDS} == {*GenerationRequest.model_fields} - FLYWHEEL_FIELDS - SERVER_FIELDS


@pytest.mark.parametrize("method", METHODS)
async def test_each_field_arrives(method: str, target: Target) -> None:
    found = await asyncio.gather(*(results(target, method, asked) for asked in requests()))
    told = [json.loads(sample["text"]) for (sample,) in found]
    assert told[:-1] == [{name: value} for name, (_, value) in FIELDS.items()]
    assert told[-1] == {field.name: FIELDS[field.name][1] for field, _ in requests()[-1].ListFields() if field.name in FIELDS}


@pytest.mark.parametrize("text", ["hello", "at once"])
@pytest.mark.parametrize("method", METHODS)
async def test_seeds_and_tokens_come_back(method: str, text: str, target: Target) -> None:
    samples = await results(target, method, request(text=text, num_samples=2, seed=7, logprobs=2))
    assert [sample["seed"] for sample in samples] == [7, 8]
    for sample in samples:
        *tokens, last = sample["tokens"]
        assert b"".join(token.text for token in tokens).decode() == sample["text"]
        assert [token.id for token in tokens] == [*range(len(tokens))]
        assert {token.logprob for token in tokens} == {-0.5}
        assert [(likely.id, likely.text, likely.logprob) for likely in tokens[-1].likeliest] == [
            (0, UNREADABLE, 0.0),
            (1, UNREADABLE, -1.0),
        ]
        assert (last.id, last.text) == (2, UNREADABLE)


async def test_tokens_of_several_batches_come_in_order(model: Target) -> None:
    (sample,) = await results(model, "GenerateAll", request(text="long", max_tokens=400, logprobs=20))
    assert [token.id for token in sample["tokens"]] == [*range(400), 2]
    assert sample["text"] == "a" * 400


@pytest.mark.parametrize("method", METHODS)
async def test_mk1s_class_refuses_each_field_by_name(method: str, deployed: ModalCloud, flywheel: Target) -> None:
    before = len(deployed.calls)
    for asked in requests():
        error = await error_of(getattr(flywheel.stub, method)(asked))
        names = [field.name for field, _ in asked.ListFields() if field.name in FIELDS]
        assert [name for name, _ in violations_of(error)] == names
        assert details_of(error)[ErrorInfo].reason == "UNSUPPORTED_FIELD"
    assert len(deployed.calls) == before
    (sample,) = await results(flywheel, method, request(priority=-5))
    assert sample["text"] == "flywheel"


async def test_the_engine_names_all_refused_fields_itself_if_it_has_not_found_the_class_before(deployed: ModalCloud) -> None:
    engine = scripted.engine(APP, "Flywheel")
    assert engine.model().supported_fields == {*GenerationRequest.model_fields}
    async with engine:
        for call in (engine.generate, lambda prepared, _: engine.tokenize(prepared)):
            asked = GenerationRequest(text="x", max_tokens=1, seed=1, regex="a", priority=-1)
            with pytest.raises(UnsupportedFieldError) as caught:
                await call(PreparedRequest(asked), None)  # type: ignore[arg-type]
            assert [caught.value.field, *caught.value.further] == ["seed", "regex"]
        assert engine.model().supported_fields == FLYWHEEL_FIELDS


async def test_get_model_tells_the_fields_of_the_class(model: Target, flywheel: Target) -> None:
    assert await supported_fields(model) == {*GenerationRequest.model_fields}
    assert await supported_fields(flywheel) == FLYWHEEL_FIELDS | SERVER_FIELDS


SetFields = Callable[[frozenset[str]], None]


@pytest.fixture
def look_up(monkeypatch: pytest.MonkeyPatch) -> SetFields:
    """Lets the next look-up of a class find these fields, as if another version of the class was deployed then."""

    def set_fields(fields: frozenset[str]) -> None:
        async def fields_of(_: Any) -> frozenset[str]:
            return fields

        monkeypatch.setattr("flywheel_server.engines.modal.remote_class.fields_of", fields_of)

    return set_fields


async def test_the_fields_of_a_class_that_is_deployed_again_are_known_soon(
    deployed: ModalCloud, look_up: SetFields, monkeypatch: pytest.MonkeyPatch
) -> None:
    look_up(FLYWHEEL_FIELDS)
    async with serving(scripted.engine(APP), health_interval=0.05) as target:
        assert await supported_fields(target) == FLYWHEEL_FIELDS | SERVER_FIELDS
        look_up(FLYWHEEL_FIELDS | {"seed"})
        monkeypatch.setattr("flywheel_server.engines.modal.remote_class.LOOKUP_INTERVAL", 0.0)

        async def supports_seeds() -> bool:
            return "seed" in await supported_fields(target)

        await until(supports_seeds, "GetModel tells the new field")
        assert (await results(target, "Generate", request(seed=5)))[0]["seed"] == 5


@pytest.mark.parametrize("method", METHODS)
async def test_a_class_that_takes_fewer_fields_than_the_server_knows_refuses_the_others_itself(
    method: str, deployed: ModalCloud, look_up: SetFields
) -> None:
    look_up(frozenset(GenerationRequest.model_fields))
    async with serving(scripted.engine(APP, "Flywheel")) as target:
        error = await error_of(getattr(target.stub, method)(request(seed=5)))
    assert [name for name, _ in violations_of(error)] == ["seed"]
    assert details_of(error)[ErrorInfo].reason == "UNSUPPORTED_FIELD"


@pytest.mark.parametrize("method", METHODS)
async def test_what_the_engine_in_the_container_refuses_is_refused_alike(method: str, target: Target) -> None:
    call = getattr(target.stub, method)
    invalid = await error_of(call(request(text="invalid", logit_bias={77: 1.0})))
    problem = "must be less than 70, the size of the vocabulary"
    assert violations_of(invalid) == [("logit_bias[77]", problem), ("logit_bias[78]", problem)]
    unsupported = await error_of(call(request(text="unsupported", regex="a")))
    assert [name for name, _ in violations_of(unsupported)] == ["regex", "choices"]


async def test_a_field_that_the_engine_in_the_container_does_not_honour_is_refused() -> None:
    class Narrow(ScriptedEngine):
        def model(self) -> EngineModel:
            return replace(super().model(), supported_fields=FLYWHEEL_FIELDS | {"seed"})

    asked = GenerationRequest(text="x", max_tokens=1, seed=1, min_p=0.5, regex="a")
    remote = RemoteModel(Narrow())
    for call in (remote.generate, remote.tokenize):
        with pytest.raises(UnsupportedFieldError) as caught:
            await call(**arguments_of(asked))
        assert [caught.value.field, *caught.value.further] == ["min_p", "regex"]
    assert await remote.generate(text="x", max_tokens=1, seed=1)


@pytest.mark.parametrize("fields", [{"max_tokens": 1}, {"text": "x", "prompt_token_ids": [1], "max_tokens": 1}, {"text": "x"}])
async def test_wrong_fields_are_an_error_that_every_caller_can_unpickle(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"text|max_tokens") as caught:
        await RemoteModel(ScriptedEngine()).generate(**fields)
    assert type(caught.value) is ValueError


def test_a_version_without_further_fields_can_unpickle_the_error_of_one_field() -> None:
    assert UnsupportedFieldError("seed", "no").args == ("seed", "no")


def test_an_error_with_several_violations_can_be_pickled_for_every_version() -> None:
    violations = [FieldViolation("seed", "no"), FieldViolation("top_k", "never")]
    error = InvalidFieldError.of(violations)
    assert pickle.loads(pickle.dumps(error)).violations == violations  # noqa: S301 - our own bytes
    assert error.args == ("seed", "no"), "what the constructor of an older version takes"


async def test_tokenize_tells_the_tokens_of_the_class(model: Target) -> None:
    answer = await model.stub.Tokenize(pb.TokenizeRequest(text="two words"))
    assert answer.prompt_tokens == 2
    assert [(token.id, token.text) for token in answer.tokens] == [(0, b"two" + UNREADABLE), (1, b"words" + UNREADABLE)]
    answer = await model.stub.Tokenize(pb.TokenizeRequest(messages=[pb.Message(role="user", content="é")]))
    assert [token.text for token in answer.tokens] == ["é".encode() + UNREADABLE]
    error = await error_of(model.stub.Tokenize(pb.TokenizeRequest(text="invalid")))
    assert [name for name, _ in violations_of(error)] == ["logit_bias[77]", "logit_bias[78]"]


@pytest.mark.parametrize("class_name", ["Flywheel", "ModelWhole"])
async def test_a_class_without_the_method_tokenize(class_name: str, deployed: ModalCloud) -> None:
    async with serving(scripted.engine(APP, class_name)) as target:
        error = await error_of(target.stub.Tokenize(pb.TokenizeRequest(text="x")))
    assert (error.code(), details_of(error)[ErrorInfo].reason) == (grpc.StatusCode.UNIMPLEMENTED, "UNSUPPORTED_METHOD")


async def test_tokens_that_the_class_counts_count_against_the_quota(deployed: ModalCloud, tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    with keys_for(file, small={"tokens_per_minute": 60}) as metadata:
        async with serving(scripted.engine(APP), api_keys_file=str(file)) as target:
            asked = pb.TokenizeRequest(text="word " * 60)
            assert (await target.stub.Tokenize(asked, metadata=metadata["small"])).prompt_tokens == 60
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await target.stub.Tokenize(asked, metadata=metadata["small"])
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_the_engine_promises_no_exact_seeds() -> None:
    assert not scripted.engine(APP).model().exact_seeds
