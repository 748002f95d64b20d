"""The documents say what the code does: tables are made from the settings, links lead somewhere, and the Python runs.

`python -m tests.test_readme` writes the tables.
"""

import asyncio
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from flywheel_proto.v1 import generation_pb2
from flywheel_server.deployment.settings import DEPLOY_PREFIX, Deployment
from flywheel_server.deployment.weights import DoesNotFitError, check_fit, find
from flywheel_server.engines.llama_cpp.constraints.keywords import SUPPORTED_KEYWORDS
from flywheel_server.engines.scripted import ScriptedEngine
from flywheel_server.messages import GenerationRequest, RequestLimits
from flywheel_server.settings import PREFIX, Settings, default_text, flag
from flywheel_server.translation import request_from_proto
from google.protobuf import json_format

from tests.contract import ROOT
from tests.serving import serving

README = ROOT / "README.md"
PYTHON, SETTINGS, MODAL, CONSTRAINTS = (
    ROOT / "docs" / name for name in ("python.md", "settings.md", "modal.md", "constraints.md")
)
DOCUMENTS = [*sorted(ROOT.glob("*.md")), ROOT / "benchmarks" / "README.md", *sorted(MODAL.parent.glob("*.md"))]
TABLE = re.compile(r"(?<=<!-- table: written by `python -m tests.test_readme` -->\n).*?(?=<!-- /table -->)", re.DOTALL)


def table() -> str:
    rows = ["| flag | variable | default | meaning |", "|---|---|---|---|"]
    for name, field in Settings.model_fields.items():
        default = f"`{default_text(field)}`" if default_text(field) else ""
        option = f"`{flag(name)}`" if flag(name) else ""
        rows.append(f"| {option} | `{PREFIX}{name.upper()}` | {default} | {field.description} |")
    return "\n".join(rows) + "\n"


def deployment_table() -> str:
    rows = ["| variable | default | meaning |", "|---|---|---|"]
    for name, field in Deployment.model_fields.items():
        default = "" if field.default is None else f"`{field.default}`"
        rows.append(f"| `{DEPLOY_PREFIX}{name.upper()}` | {default} | {field.description} |")
    return "\n".join(rows) + "\n"


def keywords_table() -> str:
    rows = ["| keyword | value |", "|---|---|"]
    rows += [f"| `{keyword}` | {value} |" for keyword, value in SUPPORTED_KEYWORDS.items()]
    return "\n".join(rows) + "\n"


TABLES = {SETTINGS: table, MODAL: deployment_table, CONSTRAINTS: keywords_table}


@pytest.mark.parametrize("document", TABLES, ids=lambda document: document.name)
def test_the_tables_are_up_to_date(document: Path) -> None:
    (written,) = TABLE.findall(document.read_text())
    assert written == TABLES[document](), "run `python -m tests.test_readme`"


def prose(document: Path) -> str:
    return re.sub(r"^ *```.*?^ *```$", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)


def blocks(document: Path, language: str) -> list[str]:
    """Returns the code blocks of a document in that language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", document.read_text(), re.MULTILINE | re.DOTALL)


def anchors(document: Path) -> set[str]:
    """Returns the anchors that GitHub gives the headings of a document."""
    headings = re.findall(r"^#+ (.+)$", prose(document), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: str(document.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", prose(document))
    for path, anchor in links:
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), path
        assert not anchor or anchor in anchors(target), f"{path}#{anchor}"


def test_the_refusal_in_the_documentation_is_what_is_said() -> None:
    with pytest.raises(DoesNotFitError) as refused:
        check_fit(find("mixtral-8x7b-instruct-q4_k_m"), "A10G", 8192)
    assert str(refused.value) in MODAL.read_text()


@pytest.mark.parametrize(
    ("document", "printed"),
    [(README, ["llama"]), (PYTHON, ["llama", "max_tokens must be", "top_p must be"])],
    ids=["README", "python"],
)
async def test_the_python_runs(document: Path, printed: list[str]) -> None:
    (example,) = [block for block in blocks(document, "python") if "localhost:50051" in block]
    async with serving(ScriptedEngine()) as target:
        program = example.replace("localhost:50051", target.address)
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", program, stdout=subprocess.PIPE)
        out, _ = await process.communicate()
    assert process.returncode == 0
    for expected in printed:
        assert expected in out.decode()


def test_the_requests_for_grpcurl_are_valid() -> None:
    limits = RequestLimits(2**20, 16, 8192, supported_fields=frozenset(GenerationRequest.model_fields))
    requests = re.findall(r"-d '(\{.*?\})'", README.read_text(), re.DOTALL)
    assert len(requests) == 2
    for request in requests:
        request_from_proto(json_format.ParseDict(json.loads(request), generation_pb2.GenerationRequest()), limits)


def test_the_readme_leads_to_every_document() -> None:
    names = {str(document.relative_to(ROOT)) for document in DOCUMENTS if document != README}
    assert {name for name in names if f"]({name})" not in README.read_text()} == set()


if __name__ == "__main__":
    for path, make in TABLES.items():
        path.write_text(TABLE.sub(lambda _, make=make: make(), path.read_text()))  # type: ignore[misc]
