"""What the programs do not load, so that they start fast: each waits only for what it uses."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
from flywheel_client._cli import app

from tests.thorough import further

RPC = {"grpc", "google", "asyncio", "ssl"}
SERVER = {"flywheel_server", "structlog", "uvloop", "cryptography", "pydantic", "pydantic_settings"}
ENGINES = {"xllamacpp", "modal"}
FORMATTING = {"rich", "pygments", "textual", "typer"}
METRICS = {"prometheus_client", "h11"}
TRACES = {"opentelemetry"}

CLIENT = ("-m", "flywheel_client")
FLYWHEEL_SERVER = ("-m", "flywheel_server")


class Program(NamedTuple):
    """How Python is started, what it does not load, and how it exits."""

    arguments: tuple[str, ...]
    unwanted: set[str]
    exit_code: int = 0


def helps(*arguments: str) -> Program:
    """Returns the program that explains a subcommand of `flywheel`."""
    return Program((*CLIENT, *arguments), RPC | SERVER | ENGINES | FORMATTING | METRICS)


PROGRAMS = {
    "import flywheel_client": Program(
        ("-c", "import flywheel_client"), RPC | SERVER | ENGINES | FORMATTING | {"typing", "click"}
    ),
    "flywheel generate --help": helps("generate", "--help"),
    "flywheel health": Program((*CLIENT, "health", "--address", "localhost:1"), SERVER | ENGINES | FORMATTING | METRICS, 1),
    "flywheel-server --help": Program(
        (*FLYWHEEL_SERVER, "--help"),
        {"grpc", "google", *SERVER, *ENGINES, *FORMATTING} - {"flywheel_server", "pydantic", "pydantic_settings"},
    ),
    "flywheel-server keys list": Program(
        (*FLYWHEEL_SERVER, "keys", "list", "--file", "keys.json"),
        {*RPC, *SERVER, *ENGINES, *FORMATTING} - {"flywheel_server", "pydantic"},
    ),
}
"""One of each kind."""

OTHERS = {
    "import AsyncClient": Program(("-c", "from flywheel_client import AsyncClient, Client"), SERVER | ENGINES | FORMATTING),
    "flywheel --version": helps("--version"),
    "flywheel --help": helps("--help"),
    **{f"flywheel {name} --help": helps(name, "--help") for name in app.commands if name != "generate"},
    "flywheel generate": PROGRAMS["flywheel health"]._replace(arguments=(*CLIENT, "generate", ""), exit_code=2),
    **{
        f"flywheel {name}": PROGRAMS["flywheel health"]._replace(arguments=(*CLIENT, name, "--address", "localhost:1"))
        for name in ("stats", "model")
    },
    "flywheel top --once": Program((*CLIENT, "top", "--once", "localhost:1"), SERVER | ENGINES | {"textual"}, 1),
    "flywheel-server --version": PROGRAMS["flywheel-server --help"]._replace(arguments=(*FLYWHEEL_SERVER, "--version")),
    "flywheel-server with wrong settings": PROGRAMS["flywheel-server --help"]._replace(
        arguments=(*FLYWHEEL_SERVER, "--max-queued", "many"), exit_code=2
    ),
    **{
        f"flywheel-server keys {' '.join(arguments)}": PROGRAMS["flywheel-server keys list"]._replace(
            arguments=(*FLYWHEEL_SERVER, "keys", *arguments)
        )
        for arguments in (["--help"], ["create", "somebody", "--file", "keys.json"], ["list", "--json", "--file", "keys.json"])
    },
    "flywheel-server --engine scripted": Program(
        (*FLYWHEEL_SERVER, "--engine", "scripted", "--address", "256.0.0.1:0"), ENGINES | {"flywheel_client", "typer"}, 1
    ),
}
CASES = [*PROGRAMS.items(), *further(OTHERS.items())]


def loaded(arguments: Sequence[str], directory: Path, exit_code: int) -> set[str]:
    """Runs Python, and returns the modules that it has loaded."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *arguments],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == exit_code, done.stderr[-2000:]
    return {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_a_program_loads_nothing_that_it_does_without(case: tuple[str, Program], tmp_path: Path) -> None:
    tmp_path.joinpath("keys.json").write_text('{"keys": []}')
    program = case[1]
    modules = loaded(program.arguments, tmp_path, program.exit_code)
    assert "encodings" in modules
    assert not {name for name in modules if name.partition(".")[0] in program.unwanted | TRACES}


def test_every_subcommand_is_tried() -> None:
    tried = {program.arguments for program in (PROGRAMS | OTHERS).values()}
    assert {(*CLIENT, name, "--help") for name in app.commands} <= tried
