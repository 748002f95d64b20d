"""The files for contributors are true: the workflow, the issue forms, and what the documents tell to run and to read."""

import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.contract import ROOT

GITHUB = ROOT / ".github"
WORKFLOW: Any = yaml.safe_load((GITHUB / "workflows" / "ci.yml").read_text())
FORMS = sorted(path for path in (GITHUB / "ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml")
PROSE = {name: (ROOT / name).read_text() for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")}
PACKAGES = ("", "server/flywheel_server", "client/flywheel_client")
"""A document names the path of a file as it is in the root or in one of the packages."""


def steps() -> list[dict[str, Any]]:
    (job,) = WORKFLOW["jobs"].values()
    return list(job["steps"])


def test_the_workflow_runs_what_ci_runs_on_each_python_of_the_classifiers() -> None:
    (job,) = WORKFLOW["jobs"].values()
    classifiers = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["classifiers"]
    versions = re.findall(r"Python :: (3\.\d+)", " ".join(classifiers))
    assert job["strategy"]["matrix"]["python"] == versions
    assert [step["run"] for step in steps() if "run" in step] == [".ci/run"]
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111


def test_the_workflow_chooses_the_interpreter_as_the_makefile_expects() -> None:
    (run,) = [step for step in steps() if "run" in step]
    assert run["env"] == {"PYTHON": "python${{ matrix.python }}"}
    assert "\nPYTHON ?=" in (ROOT / "Makefile").read_text()


def locked(name: str) -> dict[str, str]:
    """Returns the version of each distribution in a lock."""
    return dict(re.findall(r"^([\w.-]+)==([\w.+]+)", (ROOT / "requirements" / name).read_text(), re.MULTILINE))


def test_what_test_floor_leaves_out_has_the_same_versions_there() -> None:
    makefile = (ROOT / "Makefile").read_text().replace("\\\n", "")
    (left_out,) = re.findall(r"^SAME_AT_FLOOR := (.*)$", makefile, re.MULTILINE)
    assert all((ROOT / path).exists() for path in left_out.split())
    floor, newest = locked("floor.txt"), locked("dev.txt")
    for name, path in {"xllamacpp": "tests/engines/llama_cpp", "modal": "tests/modal_cloud"}.items():
        assert floor[name] == newest[name], f"remove {path} from SAME_AT_FLOOR in the Makefile"


def test_the_workflow_may_only_read_and_pins_what_it_uses() -> None:
    assert WORKFLOW["permissions"] == {"contents": "read"}
    assert all(re.fullmatch(r"actions/[\w-]+@[0-9a-f]{40}", step["uses"]) for step in steps() if "uses" in step)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.stem)
def test_an_issue_form_has_what_github_asks_for(form: Path) -> None:
    content = yaml.safe_load(form.read_text())
    assert {"name", "description", "body"} <= content.keys()
    asked = [element for element in content["body"] if element["type"] != "markdown"]
    assert {element["type"] for element in asked} <= {"input", "textarea", "dropdown", "checkboxes"}
    assert all(element["attributes"]["label"] for element in asked)
    ids = [element["id"] for element in asked]
    assert len(ids) == len(set(ids))


def test_a_bug_report_asks_for_what_is_needed() -> None:
    body = yaml.safe_load((GITHUB / "ISSUE_TEMPLATE" / "bug.yml").read_text())["body"]
    assert {"what", "version", "engine", "settings", "request", "log"} <= {element.get("id") for element in body}


def code(document: str) -> list[str]:
    """Returns what a document has as code: each span, and each line of a block."""
    blocks = re.findall(r"^```\w*\n(.*?)^```$", PROSE[document], re.MULTILINE | re.DOTALL)
    without = re.sub(r"^```.*?^```$", "", PROSE[document], flags=re.MULTILINE | re.DOTALL)
    return [*re.findall(r"`([^`]+)`", without), *"\n".join(blocks).splitlines()]


@pytest.mark.parametrize("document", PROSE)
def test_each_target_of_make_that_a_document_names_exists(document: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {match[1] for each in code(document) if (match := re.match(r"make ([a-z-]+)", each))}
    assert named <= targets


@pytest.mark.parametrize("document", PROSE)
def test_each_path_that_a_document_names_exists(document: str) -> None:
    named = {
        word
        for each in code(document)
        for word in re.findall(r"(?<![\w/.:-])(?!\.venv/)\.?[\w-]+(?:/[\w.-]*|\.(?:py|md|proto|txtpb|toml|svg))+", each)
    }
    missing = {path for path in named if not any((ROOT / package / path).exists() for package in PACKAGES)}
    assert missing == set()


@pytest.mark.parametrize("document", PROSE)
def test_each_class_that_a_document_names_exists(document: str) -> None:
    named = {each for each in code(document) if re.fullmatch(r"([A-Z][a-z]+){2,}", each)}
    sources = [path.read_text() for package in PACKAGES[1:] for path in (ROOT / package).rglob("*.py")]
    sources.append((ROOT / "proto" / "flywheel" / "v1" / "generation.proto").read_text())
    known = {name for source in sources for name in re.findall(r"^ *(?:class|message|rpc) (\w+)", source, re.MULTILINE)}
    assert named <= known


def test_files_are_as_the_editorconfig_says() -> None:
    assert "trim_trailing_whitespace = true" in (ROOT / ".editorconfig").read_text()
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False).stdout  # noqa: S607
    others = tuple(f"tests/engines/llama_cpp/{name}/" for name in ("json_schema_suite", "templates", "vocabularies"))
    paths = [ROOT / name for name in listed.split("\0") if name and not name.startswith(others)]
    texts = {path: path.read_bytes() for path in paths if path.is_file() and path.suffix != ".png"}
    assert not [path for path, text in texts.items() if re.search(rb"[ \t\r]$", text, re.MULTILINE)]
    assert not [path for path, text in texts.items() if text and not text.endswith(b"\n")]
