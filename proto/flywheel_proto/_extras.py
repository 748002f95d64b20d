"""Tells users which extra to install if a package is missing, in one line instead of a traceback."""

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

DISTRIBUTION: Final = "flywheel-grpc"

MODULES_BY_EXTRA: Final = {
    "server": (
        "cryptography",
        "grpc_channelz",
        "grpc_health",
        "grpc_reflection",
        "h11",
        "prometheus_client",
        "pydantic",
        "pydantic_settings",
        "structlog",
        "uvloop",
    ),
    "cli": ("click", "h11", "prometheus_client", "textual"),
    "embedded": ("llguidance", "xllamacpp"),
    "modal": ("modal",),
}
"""The extras of the distribution that the commands need, each with the modules that it installs."""


@contextmanager
def loading(program: str, extra: str = "") -> Iterator[None]:
    """Exits with code 1 and one line, which begins with the program's name, if an import in the context fails.

    Args:
        program: The name of the program.
        extra: The extra that the imports need; by default, the first one that has a module.
    """
    try:
        yield
    except Exception as error:  # noqa: BLE001 - a library may raise anything; generated code raises RuntimeError if grpcio is too old
        sys.exit(f"{program}: {reason(error, extra)}")


def reason(error: Exception, extra: str = "") -> str:
    """Returns why an import failed: the missing package and how to install it, or else the error's own message."""
    if isinstance(error, ImportError) and (hint := install_hint((error.name or "").partition(".")[0], extra)):
        return hint
    kind = "" if isinstance(error, ImportError) else f"{type(error).__name__}: "
    return f"the installation is broken: {kind}{' '.join(str(error).split())}"


def install_hint(module: str, extra: str = "") -> str:
    """Returns how to install a module of an extra; empty if it is installed, or belongs to no extra."""
    for name, modules in MODULES_BY_EXTRA.items():
        # An installed package may fail too, for example if its version lacks a name or it misses a library.
        if extra in {"", name} and module in modules and importlib.util.find_spec(module) is None:
            return f"{module} is not installed; install it with: pip install '{DISTRIBUTION}[{name}]'"
    return ""
