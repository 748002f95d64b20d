"""The programs in `examples/`, each run as a user runs it, against servers that play a script."""

import asyncio
import json
import os
import pty
import re
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from flywheel_proto.v1 import generation_pb2 as pb
from flywheel_server import EngineModel, EngineUnavailableError, GenerationRequest, PreparedRequest, Sink
from flywheel_server.engines.llama_cpp.default_model import default_model
from flywheel_server.engines.llama_cpp.engine import EmbeddedEngine
from flywheel_server.engines.scripted import Script, ScriptedEngine

from tests.contract import ROOT
from tests.serving import connected, serving, until

EXAMPLES = ROOT / "examples"
MAX_LINES = 45


class Recorder(ScriptedEngine):
    """A scripted engine that keeps what it was asked, and how many generations it ran at a time. The first may fail."""

    def __init__(self, script: Script, *, first_fails: bool = False) -> None:
        super().__init__(script)
        self.prompts: list[str] = []
        self.conversations: list[list[tuple[str, str]]] = []
        self.max_tokens: list[int] = []
        self.schema: str | None = None
        self.most_running = 0
        self._first_fails = first_fails

    async def prepare(self, request: GenerationRequest) -> PreparedRequest:
        self.prompts.append(request.text)
        self.conversations.append([(message.role, message.content) for message in request.messages])
        self.max_tokens.append(request.max_tokens)
        self.schema = request.json_schema
        return await super().prepare(request)

    async def generate(self, prepared: PreparedRequest, sink: Sink) -> None:
        if self._first_fails and len(self.prompts) == 1:
            raise EngineUnavailableError("the first call fails", retry_delay=0.01)
        self.most_running = max(self.most_running, self.running + 1)
        await super().generate(prepared, sink)


@asynccontextmanager
async def started(path: Path, *arguments: str, stdout: int = PIPE) -> AsyncIterator[Process]:
    """Gives the program while it runs, in its own folder and in a terminal of 48 columns."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, path.name, *arguments),
        cwd=path.parent,
        env={**os.environ, "COLUMNS": "48", "FLYWHEEL_WITHDRAW_WINDOW": "0"},
        stdin=PIPE,
        stdout=stdout,
        stderr=PIPE,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def output(name: str, *arguments: str, stdin: str = "", fails: bool = False) -> list[str]:
    """Runs the example to its end, and returns the lines that it prints; if it fails, the lines of standard error."""
    async with started(EXAMPLES / f"{name}.py", *arguments) as process:
        out, err = await asyncio.wait_for(process.communicate(stdin.encode()), 60)
        assert process.returncode == fails, err
        assert bool(err) == fails
        return (err if fails else out).decode().splitlines()


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_is_short_and_tried_here(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_LINES
    assert f"def test_{path.stem}" in Path(__file__).read_text()


async def test_generate() -> None:
    async with serving(ScriptedEngine(Script(text="A llama. ", bytes_per_token=9, end_after=2, stagger=1))) as target:
        printed = await output("generate", "--address", target.address)
        refused = await output("generate", "--address", target.address, "--max-tokens", "0", fails=True)
    assert printed == [
        line
        for index in range(3)
        for line in (f"--- sample {index}: {index + 3} tokens, finish reason stop", "A llama. " * (index + 2))
    ]
    assert refused == ["max_tokens must be 1 to 8192, the model's context"]


async def test_stream() -> None:
    async with serving(ScriptedEngine(Script(text="llamas hum. ", bytes_per_token=12, end_after=2, stagger=1))) as target:
        assert await output("stream", "--address", target.address) == [
            "llamas hum.     llamas hum.     llamas hum.",
            "llamas hum.     llamas hum.     llamas hum.",
            "                llamas hum.     llamas hum.",
            "                                llamas hum.",
        ]
        assert (await output("stream", "", "--address", target.address, fails=True))[0].startswith("INVALID_ARGUMENT: ")


async def test_stream_draws_over_what_it_has_drawn_in_a_terminal() -> None:
    terminal, its_end = pty.openpty()
    async with (
        serving(ScriptedEngine(Script(text="one \x1b two ", bytes_per_token=10, token_delay=0.01))) as target,
        started(EXAMPLES / "stream.py", "--address", target.address, stdout=its_end),
    ):
        os.close(its_end)
        printed = b""
        while b"\x1b[2F\x1b[J" not in printed:
            printed += await asyncio.to_thread(os.read, terminal, 2**16)
    os.close(terminal)
    drawn = re.sub(rb"\x1b\[[0-9]F\x1b\[J", b"", printed[: printed.rindex(b"\x1b[2F")])
    assert b"one   two" in drawn
    assert b"\x1b" not in drawn


async def test_chat() -> None:
    engine = Recorder(Script(text=" Hum.", bytes_per_token=5, end_after=1, fail_after=0, fail_on="fail"))
    questions = ["Hello", "Please fail", *(f"question {number}" for number in range(11))]
    async with serving(engine) as target:
        printed = await output("chat", "--address", target.address, stdin="\n".join(questions))
    assert printed.pop(1).startswith("> INTERNAL: ")
    assert printed == [*([">  Hum."] * 12), "> "]
    system, *first = engine.conversations[0]
    assert (system[0], first) == ("system", [("user", "Hello")])
    assert engine.conversations[2] == [system, *first, ("assistant", " Hum."), ("user", "question 0")]
    roles, contents = zip(*engine.conversations[-1], strict=True)
    assert roles == ("system", *(["user", "assistant"] * 10), "user")
    assert contents[1::2] == tuple(questions[2:]), "the oldest question is forgotten"


async def test_chat_goes_on_after_ctrl_c() -> None:
    engine = Recorder(Script(text="Hum ", token_delay=0.01))
    async with serving(engine) as target, started(EXAMPLES / "chat.py", "--address", target.address) as process:
        assert process.stdin
        assert process.stdout
        for _ in range(2):
            process.stdin.write(b"Sing\n")
            assert await asyncio.wait_for(process.stdout.readuntil(b"> Hum "), 30)
            process.send_signal(signal.SIGINT)
            await until(lambda: not engine.running, "the call is cancelled on the server")
        process.stdin.write_eof()
        await asyncio.wait_for(process.wait(), 20)
    assert process.returncode == 0
    *_, sung, again = engine.conversations[-1]
    assert sung[0] == "assistant"
    assert set(sung[1].split()) == {"Hum"}
    assert again == ("user", "Sing")


class Broken(Recorder):
    """A recorder whose first generation breaks off."""

    async def generate(self, prepared: PreparedRequest, sink: Sink) -> None:
        self.script = self.script.model_copy(update={"fail_after": 3 if len(self.conversations) == 1 else None})
        await super().generate(prepared, sink)


async def test_resume() -> None:
    script = Script(text="Llamas hum. ", bytes_per_token=4, failure="unavailable")
    broken = Broken(script)
    async with serving(broken) as target:
        printed = await output("resume", "Well?", "--max-tokens", "9", "--address", target.address)
    assert broken.conversations == [[("user", "Well?")], [("user", "Well?"), ("assistant", "Llamas hum. ")]]
    assert broken.max_tokens == [9, 6]
    assert printed == ["Llamas hum. " * 3]
    async with serving(ScriptedEngine(script.model_copy(update={"fail_after": 0}))) as target:
        refused = await output("resume", "--address", target.address, fails=True)
    assert refused[-1].startswith("UNAVAILABLE: ")


async def test_reproduce() -> None:
    script = Script(texts=("zero", "one ", "two ", "three "), bytes_per_token=8, end_after=1)
    async with serving(ScriptedEngine(script)) as target:
        printed = await output("reproduce", "--seed", "5", "--address", target.address)
    assert printed == ["--- seed 5", "one ", "--- seed 6", "two ", "--- seed 7", "three ", "--- seed 6", "two "]
    async with serving(Inexact(script)) as target:
        refused = await output("reproduce", "--address", target.address, fails=True)
    assert refused == ["samples with the same seed may differ on this server"]


class Inexact(ScriptedEngine):
    """An engine that does not promise that a seed repeats a sample."""

    def model(self) -> EngineModel:
        return replace(super().model(), exact_seeds=False)


class Structured(Recorder):
    """An engine that answers each schema with the document of its script."""

    def model(self) -> EngineModel:
        model = super().model()
        return replace(model, supported_fields=model.supported_fields | {"json_schema"})


async def test_structured() -> None:
    document = '{"name": "Ada", "colour": "white", "age": 3, "hobbies": ["humming"]}'
    engine = Structured(Script(text=document, bytes_per_token=1, end_after=len(document)))
    async with serving(engine) as target:
        printed = await output("structured", "--address", target.address)
        cut_off = await output("structured", "--max-tokens", "9", "--address", target.address, fails=True)
    async with serving(ScriptedEngine()) as target:
        refused = await output("structured", "--address", target.address, fails=True)
    assert printed == ["Llama(name='Ada', colour='white', age=3, hobbies=['humming'])"]
    assert cut_off == ["incomplete after 9 tokens, finish reason length: raise --max-tokens"]
    assert refused[0].startswith("INVALID_ARGUMENT: Invalid request: json_schema is not supported")
    assert json.loads(str(engine.schema))["properties"].keys() == {"name", "colour", "age", "hobbies"}


@pytest.mark.thorough
async def test_structured_with_a_model() -> None:
    engine = EmbeddedEngine(default_model(), context_tokens=1024, slots=1, threads=1, batch_tokens=32, prompt_format="chat")
    async with serving(engine) as target:
        (printed,) = await output("structured", "--address", target.address)
    assert re.fullmatch(r"Llama\(name='.*', colour='(white|brown|black)', age=\d+, hobbies=\[.*\]\)", printed)


async def test_fan_out() -> None:
    engine = Recorder(Script(plays_prompt=True, bytes_per_token=64, fail_after=0, fail_on="is 7 times 7?"))
    async with serving(engine) as target, started(EXAMPLES / "fan_out.py", "--address", target.address) as process:
        out, err = await process.communicate()
    assert (process.returncode, err) == (1, b"1 of 100 calls failed\n")
    for number, line in enumerate(out.decode().splitlines(), start=1):
        question = f"What is {number} times {number}?"
        assert line.startswith(f"{question} INTERNAL: " if number == 7 else f"{question} {question}")
    assert len(engine.prompts) == 100
    assert engine.most_running <= 8


async def test_own_stubs() -> None:
    engines = [Recorder(Script(text=text, bytes_per_token=1), first_fails=True) for text in "AB"]
    async with serving(engines[0]) as first, serving(engines[1]) as second:
        servers = f"ipv4:{first.address},{second.address}"
        answers = await output("own_stubs", "--target", servers, *(["prompt"] * 40))
        refused = await output("own_stubs", "--target", servers, "", fails=True)
    assert set(answers) == {"A" * 32, "B" * 32}, "the calls are spread over the servers"
    assert len(answers) == 40, "the call that fails first is tried again"
    assert sum(len(engine.prompts) for engine in engines) == 42
    assert refused[0].startswith("INVALID_ARGUMENT: ")


def test_custom_engine_imports_nothing_but_the_package() -> None:
    imported = set(re.findall(r"^(?:import|from) (\w+)", (EXAMPLES / "custom_engine.py").read_text(), re.MULTILINE))
    assert imported - sys.stdlib_module_names == {"flywheel_server"}


async def test_custom_engine_in_a_folder_of_its_own(tmp_path: Path) -> None:
    example = tmp_path / "their_engine.py"
    example.write_text((EXAMPLES / "custom_engine.py").read_text())
    async with started(example, "--address", "127.0.0.1:0") as process:
        assert process.stdout
        ready = (await asyncio.wait_for(process.stdout.readline(), 30)).decode()
        found = re.match(r"ready: grpcurl .* (127\.0\.0\.1:\d+) ", ready)
        assert found
        async with connected(found[1]) as target:
            response = await target.stub.GenerateAll(pb.GenerationRequest(text="llama ", max_tokens=9, num_samples=2))
            assert [sample.text for sample in response.responses] == ["llama lla"] * 2
            assert (await target.stub.GetModel(pb.GetModelRequest())).engine == "echo"
        process.send_signal(signal.SIGTERM)
        _, err = await asyncio.wait_for(process.communicate(), 20)
    assert process.returncode == 0
    assert b"stopping" in err
