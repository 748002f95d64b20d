"""Programs without the packages of an extra, and with ones that are broken, say so in one line."""

import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterable
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import flywheel_client
import flywheel_proto
import flywheel_server
import pytest
from flywheel_proto._extras import DISTRIBUTION, MODULES_BY_EXTRA
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.thorough import further

ROOT = Path(__file__).parent.parent
OURS = [str(Path(str(package.__file__)).parents[1]) for package in (flywheel_proto, flywheel_server, flywheel_client)]

SERVER = "from flywheel_server.__main__ import main"
COMMAND = "from flywheel_client.__main__ import main"
SCRIPTED = ("--engine", "scripted", "--address", "256.0.0.1:0")
LOCAL = ("--engine", "scripted", "--address", "127.0.0.1:0", "--log-level", "error")

PROGRAMS: dict[str, tuple[str, tuple[str, ...], str]] = {
    "flywheel-server": (SERVER, SCRIPTED, "flywheel-server: "),
    "flywheel-server keys": (SERVER, ("keys", "list"), "flywheel-server: "),
    "flywheel-server by default": (SERVER, ("--address", "127.0.0.1:0"), "flywheel-server: "),
    "flywheel-server --metrics-address": (SERVER, (*LOCAL, "--metrics-address", "127.0.0.1:0"), "flywheel-server: "),
    "flywheel-server --channelz": (SERVER, (*LOCAL, "--channelz", "true"), "flywheel-server: "),
    "flywheel-server --engine flywheel": (SERVER, ("--engine", "flywheel", "--address", "127.0.0.1:0"), "flywheel-server: "),
    "flywheel-server --otlp-endpoint": (
        SERVER,
        ("--engine", "scripted", "--address", "127.0.0.1:0", "--otlp-endpoint", "http://localhost:4317"),
        "flywheel-server: ",
    ),
    "flywheel": (COMMAND, ("health",), "flywheel: "),
    "flywheel top": (COMMAND, ("top", "localhost:1"), "flywheel: "),
    "flywheel endpoints": (COMMAND, ("endpoints",), "flywheel: "),
    "flywheel --modal-app": (COMMAND, ("health", "--modal-app", "some"), "flywheel: "),
    "modal_deploy.py": ("import runpy; main = lambda: runpy.run_path('modal_deploy.py')", (), "modal_deploy.py: "),
}

NEEDS = [
    ("flywheel-server", "server", "structlog"),
    ("flywheel-server keys", "server", "pydantic"),
    ("flywheel-server by default", "embedded", "xllamacpp"),
    ("flywheel-server --engine flywheel", "modal", "modal"),
]
FURTHER_NEEDS = [
    *(
        ("flywheel-server", "server", module)
        for module in MODULES_BY_EXTRA["server"]
        if module not in {"structlog", "grpc_channelz", "h11", "prometheus_client"}
    ),
    ("flywheel-server --metrics-address", "server", "h11"),
    ("flywheel-server --metrics-address", "server", "prometheus_client"),
    ("flywheel-server --channelz", "server", "grpc_channelz"),
    ("flywheel-server by default", "embedded", "llguidance"),
    ("flywheel-server --otlp-endpoint", "otel", "opentelemetry"),
    ("flywheel", "cli", "click"),
    ("flywheel top", "cli", "h11"),
    ("flywheel top", "cli", "prometheus_client"),
    ("flywheel endpoints", "modal", "modal"),
    ("flywheel --modal-app", "modal", "modal"),
    ("modal_deploy.py", "server", "pydantic"),
    ("modal_deploy.py", "server", "pydantic_settings"),
]

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs a program with what is installed here, but without some modules, or with other ones in their place."""

    def start(program: str, without: Iterable[str], instead: str | None = None) -> subprocess.CompletedProcess[str]:
        for kind in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
            for installed in Path(kind).iterdir():
                if installed.name.partition(".")[0] not in without:
                    tmp_path.joinpath(installed.name).symlink_to(installed)
        for module in without if instead is not None else ():
            tmp_path.joinpath(f"{module}.py").write_text(str(instead))
        code, arguments, _ = PROGRAMS[program]
        paths = [*OURS, str(tmp_path)]
        # Without `-S`, the interpreter would add what is installed.
        return subprocess.run(
            [sys.executable, "-S", "-c", f"import sys; sys.path += {paths}; {code}; main()", *arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    return start


def line_of(done: subprocess.CompletedProcess[str], program: str) -> str:
    """Returns the one line that the program has said before it ended."""
    assert done.returncode == 1, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith(PROGRAMS[program][2]), line
    return line


@pytest.mark.parametrize("need", [*NEEDS, *further(FURTHER_NEEDS)], ids=" without ".join)
def test_a_missing_extra_is_answered_with_the_command_that_installs_it(need: tuple[str, str, str], run: Run) -> None:
    program, extra, module = need
    line = line_of(run(program, [module]), program)
    assert module in line
    assert line.endswith(f"pip install '{DISTRIBUTION}[{extra}]'")


BROKEN = {
    "raise ImportError('libstdc++.so.6: cannot open shared object file')": "libstdc++.so.6: cannot open shared object file",
    "from os import no_such_name": "cannot import name 'no_such_name' from 'os'",
    "import no_such_module": "No module named 'no_such_module'",
    "raise RuntimeError('it is too old:\\nupgrade it')": "too old",
    "raise OSError('libgomp.so.1: cannot open shared object file')": "libgomp.so.1: cannot open shared object file",
}


BREAKABLE = [
    ("flywheel-server", "structlog"),
    ("flywheel-server", "grpc"),
    ("flywheel-server keys", "pydantic"),
    ("flywheel-server by default", "xllamacpp"),
    ("flywheel-server --engine flywheel", "modal"),
    ("flywheel", "click"),
    ("modal_deploy.py", "pydantic"),
]
BREAKS = [(program, module, instead) for program, module in BREAKABLE for instead in BROKEN]


@pytest.mark.parametrize("case", [("flywheel-server by default", "xllamacpp", next(iter(BROKEN))), *further(BREAKS)])
def test_a_package_that_is_broken_is_not_called_missing(case: tuple[str, str, str], run: Run) -> None:
    program, module, instead = case
    line = line_of(run(program, [module], instead), program)
    assert BROKEN[instead] in line
    assert "pip install" not in line


def test_the_extras_are_those_of_the_distribution() -> None:
    installed = packages_distributions()
    named: dict[str, set[str]] = {}
    for requirement in map(Requirement, requires(DISTRIBUTION) or ()):
        for extra in MODULES_BY_EXTRA:
            if f'extra == "{extra}"' in str(requirement.marker):
                named.setdefault(extra, set()).add(requirement.name)
    # It has the other one within it.
    named["embedded"] -= named["server"]
    assert {
        extra: {canonicalize_name(installed[module][0]) for module in modules} for extra, modules in MODULES_BY_EXTRA.items()
    } == named
