"""What pytest needs before anything else is imported, and the options of the suite."""

import os

import pytest

# As `flywheel-server` has it; grpc reads it when it is imported.
os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_listener")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--address", help="HOST:PORT of a running server: the conformance suite tests it too")
