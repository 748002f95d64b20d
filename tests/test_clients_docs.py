"""docs/clients.md: its Python runs, and what it names in other languages is in the contract.

The toolchains of the other languages are not needed to work on this project, so these tests compile nothing of them. They find
what a change of the contract breaks.
"""

import asyncio
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
import trustme
from flywheel_proto.v1 import generation_pb2
from flywheel_server.engines.scripted import ScriptedEngine
from google.protobuf import json_format
from grpc_health.v1.health_pb2 import HealthCheckResponse

from tests.contract import DESCRIPTOR, ROOT
from tests.serving import serving

PAGE = (ROOT / "docs" / "clients.md").read_text()
KEY = "a-key-of-sixteen-characters"

CONTRACT = generation_pb2.DESCRIPTOR
OPTIONS = CONTRACT.GetOptions()
SERVICE = CONTRACT.services_by_name["GenerationService"]
METHODS = set(SERVICE.methods_by_name)
REQUEST = set(generation_pb2.GenerationRequest.DESCRIPTOR.fields_by_name)
MESSAGE = set(generation_pb2.Message.DESCRIPTOR.fields_by_name)
CONSTRAINTS = {field.name for field in generation_pb2.GenerationRequest.DESCRIPTOR.oneofs_by_name["constraint"].fields}
DELTA = set(generation_pb2.GenerationDelta.DESCRIPTOR.fields_by_name)


def blocks(language: str) -> list[str]:
    """Returns the code blocks of the page in that language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def camel(name: str) -> str:
    return "".join(map(str.capitalize, name.split("_")))


def snake(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


def lower(name: str) -> str:
    return name[0].lower() + name[1:]


NAMED = [
    ("go", r"\bpb\.(?!New|\w+_)(\w+)", set(CONTRACT.message_types_by_name)),
    ("go", r"\bpb\.New(\w+)Client\(", {SERVICE.name}),
    ("go", r"Client\(conn\)\.(\w+)\(", METHODS),
    ("go", r"[{ \t](\w+): (?:\"Name|\d|proto\.|\[\]\*pb\.)", set(map(camel, REQUEST))),
    ("go", r"\b(\w+): \"(?:system|You|Where)", set(map(camel, MESSAGE))),
    ("go", r"&pb.GenerationRequest_(\w+)\{", set(map(camel, CONSTRAINTS))),
    ("go", r"(\w+): &pb.GenerationRequest_", {"Constraint"}),
    ("go", r"delta\.Get(\w+)", set(map(camel, DELTA))),
    ("go", r"//go:embed flywheel/v1/(\S+)", {"generation_grpc_service_config.json"}),
    ("sh", r"\bM(\S+?)=", {CONTRACT.name}),
    ("sh", r"protoc (\S+)", {CONTRACT.name}),
    ("sh", r"compile_protos\(\"(.*?)\"", {CONTRACT.name}),
    ("sh", r"-protoset (\S+)", {DESCRIPTOR}),
    ("sh", r"flywheel\.v1\.(\w+)/", {SERVICE.name}),
    ("sh", r"flywheel\.v1\.GenerationService/(\w+)", METHODS),
    ("sh", r"describe flywheel\.v1\.(\w+)", set(CONTRACT.message_types_by_name)),
    ("java", r"import dev\.(\S+)\.\*", {OPTIONS.java_package.removeprefix("dev.")}),
    ("java", r"(\w+)Grpc\.newBlockingStub", {SERVICE.name}),
    ("java", r"(\w+)\.newBuilder\(\)\.set", set(CONTRACT.message_types_by_name)),
    ("java", r"\.(?:set|add)(\w+)\(", set(map(camel, REQUEST | MESSAGE))),
    ("java", r"stub\.(?!withInterceptors)(\w+)\(", set(map(lower, METHODS))),
    ("java", r"delta\.get(\w+)\(", set(map(camel, DELTA))),
    ("js", r"const \{ (\w+) \} = grpc", {SERVICE.name}),
    ("js", r"client\.(\w+)\(\{", METHODS),
    ("js", r"(\w+): (?:\"Name|64)", REQUEST),
    ("js", r"delta\.(\w+)", DELTA),
    ("js", r"readFileSync\(\"(\S+?\.binpb)\"", {Path(DESCRIPTOR).name}),
    ("js", r"flywheel/v1/(\S+?)\"", {"generation_grpc_service_config.json"}),
    ("rust", r"include_proto!\(\"(.*?)\"", {CONTRACT.package}),
    ("rust", r"flywheel::(\w+) \{", set(CONTRACT.message_types_by_name)),
    ("rust", r"flywheel::(\w+)_client", {snake(SERVICE.name)}),
    ("rust", r"client\.(\w+)\(request", set(map(snake, METHODS))),
    ("rust", r"(\w+): (?:\"Name|64)", REQUEST),
    ("rust", r"delta\.(\w+)", DELTA),
]
"""What programs of the page name: the language, how a name is found, and which names there are."""


@pytest.mark.parametrize(("language", "pattern", "known"), NAMED)
def test_what_it_names_is_in_the_contract(language: str, pattern: str, known: set[str]) -> None:
    found = {name for block in blocks(language) for name in re.findall(pattern, block)}
    assert found, "the pattern fits the page"
    assert found <= known


def test_requests_in_json_are_requests() -> None:
    arguments = [shlex.split(command) for block in blocks("sh") for command in re.split(r"(?<!\\)\n", block)]
    found = [words[words.index("-d") + 1] for words in arguments if "-d" in words]
    assert len(found) >= 2
    for request in found:
        json_format.ParseDict(json.loads(request), generation_pb2.GenerationRequest())


def test_the_statuses_it_names_exist() -> None:
    found = set(re.findall(r"`([A-Z]+(?:_[A-Z]+)*)`", PAGE))
    assert {"UNAVAILABLE", "NOT_SERVING"} <= found
    assert found <= {code.name for code in grpc.StatusCode} | set(HealthCheckResponse.ServingStatus.keys())


def test_go_maps_what_the_contract_has_because_nobody_can_fetch_it() -> None:
    module = OPTIONS.go_package.partition(";")[0]
    assert module not in PAGE
    assert not (ROOT / "client" / "go").exists(), "there is a module to import, so the page should say so"


async def run(program: str) -> tuple[int | None, str]:
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", program, stdout=subprocess.PIPE)
    out, _ = await process.communicate()
    return process.returncode, out.decode()


async def test_its_python_runs_and_shows_details_in_words() -> None:
    calls, _ = blocks("python")
    assert "max_tokens=64" in calls
    async with serving(ScriptedEngine()) as target:
        calls = calls.replace("localhost:50051", target.address)
        (code, text), (wrong_code, error) = await asyncio.gather(
            run(calls), run(calls.replace("max_tokens=64", "max_tokens=0"))
        )
    assert (code, wrong_code) == (0, 0)
    assert "llama" in text
    assert error.startswith("INVALID_ARGUMENT")
    assert '"field": "max_tokens"' in error


async def test_its_python_with_tls_and_a_key_runs(tmp_path: Path) -> None:
    calls, secured = blocks("python")
    authority, files = trustme.CA(), {name: tmp_path / name for name in ("CA.pem", "chain.pem", "key.pem")}
    issued = authority.issue_cert("localhost")
    authority.cert_pem.write_to_path(files["CA.pem"])
    issued.cert_chain_pems[0].write_to_path(files["chain.pem"])
    issued.private_key_pem.write_to_path(files["key.pem"])
    program = calls.partition("request =")[0] + secured.replace("CA.pem", str(files["CA.pem"])).replace("KEY", KEY)
    async with serving(
        ScriptedEngine(), tls_cert=str(files["chain.pem"]), tls_key=str(files["key.pem"]), api_keys=KEY
    ) as target:
        code, model = await run(program.replace("50051", target.address.rpartition(":")[2]))
    assert code == 0
    assert 'engine: "scripted"' in model


def test_the_readme_leads_to_it() -> None:
    assert "(docs/clients.md)" in (ROOT / "README.md").read_text()
