"""The documents say what the code does: tables are made from the settings, links lead somewhere, and the Python runs.

`python -m tests.test_readme` writes the tables.
"""

import asyncio
import re
import subprocess
import sys
from pathlib import Path

import pytest
from flywheel_server.deployment.settings import DEPLOY_PREFIX, Deployment
from flywheel_server.deployment.weights import DoesNotFitError, check_fit, find
from flywheel_server.engines.scripted import ScriptedEngine
from flywheel_server.settings import PREFIX, Settings, default_text, flag

from tests.serving import serving

README = Path(__file__).parent.parent / "README.md"
MODAL = README.parent / "docs" / "modal.md"
DOCUMENTS = [
    *(README.parent / name for name in ("README.md", "CHANGELOG.md", "benchmarks/README.md")),
    *sorted(MODAL.parent.glob("*.md")),
]
TABLE = re.compile(r"(?<=<!-- settings: written by `python -m tests.test_readme` -->\n).*?(?=<!-- /settings -->)", re.DOTALL)


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


TABLES = {README: table, MODAL: deployment_table}


@pytest.mark.parametrize("document", TABLES, ids=lambda document: document.name)
def test_the_tables_of_settings_are_up_to_date(document: Path) -> None:
    (written,) = TABLE.findall(document.read_text())
    assert written == TABLES[document](), "run `python -m tests.test_readme`"


def prose(document: Path) -> str:
    return re.sub(r"^ *```.*?^ *```$", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors(document: Path) -> set[str]:
    """Returns the anchors that GitHub gives the headings of a document."""
    headings = re.findall(r"^#+ (.+)$", prose(document), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: str(document.relative_to(README.parent)))
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


async def test_the_python_of_the_readme_runs() -> None:
    examples = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    (example,) = [example for example in examples if "localhost:50051" in example]
    async with serving(ScriptedEngine()) as target:
        program = example.replace("localhost:50051", target.address)
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", program, stdout=subprocess.PIPE)
        out, _ = await process.communicate()
    assert process.returncode == 0
    for expected in ("llama", "max_tokens must be", "top_p must be"):
        assert expected in out.decode()


if __name__ == "__main__":
    for path, make in TABLES.items():
        path.write_text(TABLE.sub(lambda _, make=make: make(), path.read_text()))  # type: ignore[misc]
