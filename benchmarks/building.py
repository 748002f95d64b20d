"""Builds the programs that are not in Python: the load client, a server in Go and, if possible, a server in C++."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parent.parent
LOAD_FOLDER: Final = ROOT / "benchmarks" / "load"
CPP_SOURCE: Final = ROOT / "benchmarks" / "peers" / "server.cc"
BUILD_FOLDER: Final = ROOT / "build" / "bench"
LOAD_CLIENT: Final = BUILD_FOLDER / "client"


def build() -> None:
    """Builds everything that is out of date.

    Raises:
        CalledProcessError: A build failed. The compiler has printed its errors.
    """
    BUILD_FOLDER.mkdir(parents=True, exist_ok=True)
    _build_go()
    _build_cpp()


def _build_go() -> None:
    # buf is in the interpreter's folder, and so is go if the machine has no recent Go.
    programs = Path(sys.executable).parent
    environment = os.environ | {"PATH": f"{os.environ['PATH']}:{programs}"}
    if not _has_go():
        environment["PATH"] = f"{programs}:{os.environ['PATH']}"
    _run(str(programs / "buf"), "generate", str(ROOT / "proto"), "--template", "buf.gen.yaml", environment=environment)
    for package, program in (("./client", LOAD_CLIENT), ("./server", BUILD_FOLDER / "server-go")):
        _run("go", "build", "-buildvcs=false", "-o", str(program), package, environment=environment)


def _has_go() -> bool:
    """Returns whether the machine has Go in the version of go.mod or later."""
    wanted = re.search(r"^go ([\d.]+)", (LOAD_FOLDER / "go.mod").read_text(), re.MULTILINE)
    if wanted is None or shutil.which("go") is None:
        return False
    environment = os.environ | {"GOTOOLCHAIN": "local"}
    has = subprocess.run(["go", "env", "GOVERSION"], capture_output=True, text=True, check=False, env=environment).stdout
    found = re.search(r"[\d.]+", has)
    return found is not None and _version(found[0]) >= _version(wanted[1])


def _version(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.strip(".").split(".")))


def _build_cpp() -> None:
    """Builds the server in C++, or prints how to install what is missing."""
    program = BUILD_FOLDER / "server-cpp"
    needed = ("g++", "pkg-config", "protoc", "grpc_cpp_plugin")
    if not all(map(shutil.which, needed)) or subprocess.run(["pkg-config", "--exists", "grpc++"], check=False).returncode:
        print("Without the server in C++, which needs: apt install g++ pkg-config protobuf-compiler-grpc libgrpc++-dev")
        return
    contract = ROOT / "proto" / "flywheel" / "v1" / "generation.proto"
    if program.exists() and program.stat().st_mtime > max(CPP_SOURCE.stat().st_mtime, contract.stat().st_mtime):
        return
    stubs = BUILD_FOLDER / "cpp"
    stubs.mkdir(exist_ok=True)
    plugin = f"--plugin=protoc-gen-grpc={shutil.which('grpc_cpp_plugin')}"
    _run("protoc", f"-I{ROOT / 'proto'}", f"--cpp_out={stubs}", f"--grpc_out={stubs}", plugin, str(contract))
    flags = subprocess.run(
        ["pkg-config", "--cflags", "--libs", "grpc++", "protobuf"], capture_output=True, text=True, check=True
    )
    sources = [str(CPP_SOURCE), *map(str, (stubs / "flywheel" / "v1").glob("*.cc"))]
    _run("g++", "-std=c++17", "-O2", f"-I{stubs}", *sources, *flags.stdout.split(), "-o", str(program))


def _run(*command: str, environment: dict[str, str] | None = None) -> None:
    subprocess.run(command, check=True, cwd=LOAD_FOLDER, env=environment)
