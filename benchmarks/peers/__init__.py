"""The peers: the measured servers. Each is a program that prints a line with its address when it is ready."""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

from benchmarks.building import BUILD_FOLDER
from benchmarks.scenarios import TEXT, UNLIMITED, Scenario

KEY: Final = "benchmark-key-0123456789"
"""The API key that every client sends. Only our server checks it."""

ONE_POLLER: Final = {"GRPC_EXPERIMENTS": "-event_engine_listener"}
"""Environment variables that make a gRPC server in Python read connections as `flywheel-server` does."""

_BOUND_SCENARIOS: Final = ("paced-64", "paced-512", "paced-2000", "unpaced-64", "unary-64")
_BATCH_SCENARIOS: Final = ("model-8", "model-long-prompt")
_WORKER_SCENARIOS: Final = ("paced-512", "paced-2000", "paced-2000x10", "unpaced-64", "unary-64", "unary-512")


@dataclass(frozen=True, slots=True)
class Peer:
    """A measured server.

    Attributes:
        name: The name for `--peers`.
        title: The name in the tables.
        command: The command line, without the arguments of a scenario.
        protocol: The protocol between load client and server; see load/client.
        script: The flags that set the script: those of our own peers, or `--script` of `flywheel-server`. None: the server runs
            a model.
        environment: Additional environment variables.
        only: The scenarios in which the server takes part; empty for all scenarios of its kind of engine.
    """

    name: str
    title: str
    command: Sequence[str]
    protocol: Literal["grpc", "http", "llama"] = "grpc"
    script: Literal["peer", "flywheel-server"] | None = "peer"
    environment: Mapping[str, str] = field(default_factory=dict)
    only: Sequence[str] = ()

    def takes_part(self, scenario: Scenario) -> bool:
        """Returns whether the server takes part in a scenario."""
        return (scenario.kind == "model") == (self.script is None) and (not self.only or scenario.name in self.only)

    def start_command(self, scenario: Scenario) -> list[str]:
        """Returns the command line for a scenario."""
        if self.script == "peer":
            return [*self.command, "--text", TEXT, "--delay", f"{scenario.delay:g}"]
        if self.script == "flywheel-server":
            script = {"text": TEXT, "token_delay": scenario.delay, "slots": UNLIMITED}
            return [*self.command, "--script", json.dumps(script)]
        return list(self.command)

    def problem(self) -> str:
        """Returns why the server cannot take part; empty if it can."""
        program = Path(self.command[0])
        if not program.exists():
            return f"there is no {program}"
        if "--workers" in self.command:
            usage = subprocess.run([*self.command[:3], "--help"], capture_output=True, text=True, check=False).stdout
            if "--workers" not in usage:
                return "its flywheel-server has no --workers"
        return ""


def peers(checkout: str = "") -> dict[str, Peer]:
    """Returns all peers by name. If a checkout is given, our own servers run from that folder, with its .venv."""
    python = str(Path(checkout).absolute() / ".venv" / "bin" / "python") if checkout else sys.executable
    at = f"@{checkout}" if checkout else ""
    ours = (python, "-m", "flywheel_server", "--address", "127.0.0.1:0", "--log-level", "warning", "--withdraw-window", "0")
    scripted = (*ours, "--engine", "scripted", "--max-concurrent", str(UNLIMITED), "--max-queued", str(UNLIMITED))
    two_workers = (*scripted, "--workers", "2")
    with_key = {"FLYWHEEL_API_KEYS": KEY}
    llama = (python, "-m", "benchmarks.peers.llama_server")
    own_batch = (*llama, "--own-batch")
    found = (
        Peer(f"ours{at}", f"ours{at}", scripted, script="flywheel-server", environment=with_key),
        Peer(
            f"ours-2{at}",
            f"ours{at}, 2 workers",
            two_workers,
            script="flywheel-server",
            environment=with_key,
            only=_WORKER_SCENARIOS,
        ),
        Peer(f"bare{at}", f"bare grpc.aio{at}", (python, "-m", "benchmarks.peers.bare"), environment=ONE_POLLER),
        Peer(
            f"bare-engine{at}",
            f"bare grpc.aio, our engine{at}",
            (python, "-m", "benchmarks.peers.bare_engine"),
            environment=ONE_POLLER,
        ),
        Peer("fastapi", "FastAPI", (sys.executable, "-m", "benchmarks.peers.fastapi_server"), protocol="http"),
        Peer("cpp", "gRPC in C++", (str(BUILD_FOLDER / "server-cpp"),), only=_BOUND_SCENARIOS),
        Peer("go", "gRPC in Go", (str(BUILD_FOLDER / "server-go"),), only=_BOUND_SCENARIOS),
        # With raw prompts, as llama.cpp's own server takes them.
        Peer(
            f"embedded{at}",
            f"ours, embedded{at}",
            (*ours, "--engine", "embedded", "--embedded-prompt", "raw"),
            script=None,
            environment=with_key,
        ),
        Peer(f"llama{at}", "llama.cpp, our batch", llama, protocol="llama", script=None),
        Peer(f"llama-default{at}", "llama.cpp, its batch", own_batch, protocol="llama", script=None, only=_BATCH_SCENARIOS),
    )
    return {each.name.partition("@")[0]: each for each in found}


def peer(specification: str) -> Peer:
    """Returns the peer of a NAME, or of NAME@FOLDER.

    Raises:
        ValueError: There is no such peer.
    """
    name, _, checkout = specification.partition("@")
    known = peers(checkout)
    if name not in known:
        raise ValueError(f"there is no peer {name!r}, only {', '.join(known)}")
    return known[name]
