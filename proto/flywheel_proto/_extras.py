"""What to install if a package is missing, in one line rather than a traceback."""

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

DISTRIBUTION: Final = "flywheel-grpc"

MODULES_BY_EXTRA: Final = {
    "cli": ("click",),
    "server": ("cryptography", "grpc_health", "grpc_reflection", "pydantic", "pydantic_settings", "structlog", "uvloop"),
    "embedded": ("xllamacpp",),
    "modal": ("modal",),
}
"""The extras of the distribution that programs need, with the modules that each brings."""


@contextmanager
def loading(program: str) -> Iterator[None]:
    """Exits with 1 and a line that begins with the program's name if an import within the context fails."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - generated code raises RuntimeError if grpcio is too old, libraries what they like
        sys.exit(f"{program}: {reason(error)}")


def reason(error: Exception) -> str:
    """Returns why an import has failed: what is missing and how to install it, or else the error in its own words."""
    if isinstance(error, ImportError) and (hint := install_hint((error.name or "").partition(".")[0])):
        return hint
    kind = "" if isinstance(error, ImportError) else f"{type(error).__name__}: "
    return f"the installation is broken: {kind}{' '.join(str(error).split())}"


def install_hint(module: str) -> str:
    """Returns how to install a module that an extra brings; empty if it is installed, or no extra brings it."""
    for extra, modules in MODULES_BY_EXTRA.items():
        # A package that is there may fail as well, for example if it has no such name in its version, or lacks a library.
        if module in modules and importlib.util.find_spec(module) is None:
            return f"{module} is not installed; install it with: pip install '{DISTRIBUTION}[{extra}]'"
    return ""
