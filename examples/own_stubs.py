"""Calls several servers through generated stubs: gRPC itself spreads the calls over healthy servers, and retries them."""

import argparse
import sys
from importlib.resources import files

import grpc
from flywheel_proto.v1 import generation_pb2, generation_pb2_grpc

# The policy for clients in every language: health-checked round robin, and which calls may be repeated.
SERVICE_CONFIG = (files("flywheel_proto.v1") / "generation_grpc_service_config.json").read_text()


def main(target: str, prompts: list[str]) -> None:
    """Prints one answer for each prompt. Exits with 1 if a call fails although gRPC has tried it several times."""
    with grpc.insecure_channel(target, [("grpc.service_config", SERVICE_CONFIG)]) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        for prompt in prompts:
            request = generation_pb2.GenerationRequest(text=prompt, max_tokens=32)
            try:
                response = stub.GenerateAll(request, timeout=60)
            except grpc.RpcError as error:
                sys.exit(f"{error.code().name}: {error.details()}")
            print(response.responses[0].text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prompts", nargs="+")
    parser.add_argument("--target", default="localhost:50051", help="such as dns:///NAME:PORT, or ipv4:A:PORT,B:PORT")
    main(**vars(parser.parse_args()))
