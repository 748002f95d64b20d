"""The names that users import, and how Python shows them."""

from __future__ import annotations

import pickle
import pydoc
import subprocess
import sys
import traceback
from typing import TYPE_CHECKING

import flywheel_client
import grpc
import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

DEFINED = [name for name in flywheel_client.__all__ if callable(getattr(flywheel_client, name))]
"""The public classes and functions."""


def test_public_names() -> None:
    public = {name for name, value in vars(flywheel_client).items() if not name.startswith("_") and not _is_module(value)}
    assert sorted(flywheel_client.__all__) == sorted(public | {"__version__"})


def test_public_names_can_be_listed_before_any_is_used() -> None:
    program = "import flywheel_client; names = dir(flywheel_client); print(*sorted(set(flywheel_client.__all__) - set(names)))"
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (process.stdout, process.stderr) == ("\n", "")


def _is_module(value: object) -> bool:
    return isinstance(value, type(sys))


@pytest.mark.parametrize("name", DEFINED)
def test_a_public_name_is_shown_as_it_is_imported(name: str) -> None:
    public: Callable[..., object] = getattr(flywheel_client, name)
    assert (public.__module__, public.__qualname__) == ("flywheel_client", name)
    assert pickle.loads(pickle.dumps(public)) is public  # noqa: S301 - our own
    assert pickle.dumps(public, 0).startswith(f"cflywheel_client\n{name}\n".encode())
    assert pydoc.plain(pydoc.render_doc(public)).splitlines()[0].endswith(f" {name} in module flywheel_client")


def test_a_traceback_names_the_error_that_users_catch() -> None:
    error = flywheel_client.UnavailableError(grpc.StatusCode.UNAVAILABLE, "stopping")
    assert traceback.format_exception_only(error) == ["flywheel_client.UnavailableError: UNAVAILABLE: stopping\n"]
