"""Generates `flywheel_proto` from the contract, or with --check tells whether it is up to date.

Run by `make generate` in an environment of its own with the *oldest* supported grpcio-tools (requirements/codegen.in):
generated code refuses a protobuf or grpcio runtime older than itself, so the floor of what we generate with is the floor of
what our users may have installed.

The descriptor keeps its canonical name, `flywheel/v1/generation.proto`, so that stubs which a user generates from the
same file can live in one process with ours. Only the Python module is renamed, from `flywheel.v1` to `flywheel_proto.v1`:
a top-level package `flywheel` would be too general a name to claim.

The service config beside a .proto file is part of the contract too, and is copied, so that it is installed with the stubs.
"""

import argparse
import re
import shutil
import sys
import tempfile
from importlib import resources
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).parent
PACKAGE = ROOT / "flywheel_proto"
GENERATED = ("*_pb2*.py", "*_pb2*.pyi", "*_service_config.json")
MODULE = re.compile(r"\bflywheel(\.v1(?:\.\w+_pb2| import \w+_pb2))")


def generate(destination: Path) -> None:
    """Writes the modules, their stubs and the service config below `destination`, in the layout of `flywheel_proto`."""
    with tempfile.TemporaryDirectory() as output:
        arguments = [
            f"--proto_path={ROOT}",
            f"--proto_path={resources.files('grpc_tools') / '_proto'}",
            f"--python_out={output}",
            f"--grpc_python_out={output}",
            f"--mypy_out={output}",
            f"--mypy_grpc_out={output}",
            *map(str, sorted(ROOT.glob("flywheel/**/*.proto"))),
        ]
        if protoc.main(["protoc", *arguments]) != 0:
            sys.exit("protoc failed")
        for generated in sorted(Path(output).glob("flywheel/**/*.py*")):
            target = destination / generated.relative_to(Path(output) / "flywheel")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(MODULE.sub(r"flywheel_proto\1", generated.read_text()))
    for config in sorted(ROOT.glob("flywheel/**/*_service_config.json")):
        shutil.copyfile(config, destination / config.relative_to(ROOT / "flywheel"))


def outdated(committed: Path) -> list[str]:
    """Returns the names of the files under `committed` that differ from what the contract generates."""
    with tempfile.TemporaryDirectory() as fresh:
        generate(Path(fresh))

        def contents(directory: Path) -> dict[str, str]:
            files = (path for pattern in GENERATED for path in directory.rglob(pattern))
            return {str(path.relative_to(directory)): path.read_text() for path in files}

        have, want = contents(committed), contents(Path(fresh))
        return sorted(name for name in have.keys() | want.keys() if have.get(name) != want.get(name))


def main() -> None:
    """Generates, or checks."""
    parser = argparse.ArgumentParser(description="Generate flywheel_proto from the contract.")
    parser.add_argument("--check", action="store_true", help="change nothing; fail where the committed code is outdated")
    if parser.parse_args().check:
        if names := outdated(PACKAGE):
            sys.exit(f"outdated, run `make generate`: {', '.join(names)}")
    else:
        generate(PACKAGE)


if __name__ == "__main__":
    main()
