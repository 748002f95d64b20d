"""Writes the descriptor set of everything a server answers with: `python proto/descriptor.py FILE`.

Tools that know messages only from such a file (grpcurl without reflection, ghz, Envoy's transcoder) need more than the
contract: error details arrive packed in `google.protobuf.Any`, so no file of the contract imports them, and health is a
service of gRPC's own. Comments are in the set, so that these tools show them.
"""

import shutil
import subprocess
import sys
import sysconfig
import tempfile
from importlib import resources
from pathlib import Path

from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet
from grpc_health.v1 import health_pb2

CONTRACT = Path(__file__).parent / "flywheel"
ERRORS = ("error_details.proto", "status.proto")


def descriptor_set() -> FileDescriptorSet:
    """Returns the files of the contract, of `google.rpc` and of gRPC's health, with all that they import."""
    with tempfile.TemporaryDirectory() as sources:
        shutil.copytree(CONTRACT, Path(sources) / CONTRACT.name)
        errors = Path(sources, "google", "rpc")
        errors.mkdir(parents=True)
        for name in ERRORS:
            errors.joinpath(name).write_bytes(resources.files("google.rpc").joinpath(name).read_bytes())
        buf = Path(sysconfig.get_path("scripts")) / "buf"
        command = [buf, "build", "--as-file-descriptor-set", "--output", "-#format=binpb", sources]
        found = FileDescriptorSet.FromString(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)  # noqa: S603 - our own
    health_pb2.DESCRIPTOR.CopyToProto(health := FileDescriptorProto())
    found.file.append(health)
    return found


def main() -> None:
    """Writes the set to the file that the command line names."""
    if len(sys.argv) != 2:  # noqa: PLR2004 - the program and the file
        sys.exit(f"usage: python {sys.argv[0]} FILE")
    file = Path(sys.argv[1])
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(descriptor_set().SerializeToString())


if __name__ == "__main__":
    main()
