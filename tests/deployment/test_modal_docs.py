"""docs/modal.md, followed from its first command to its last, on a fresh account of the stand-in of Modal's cloud."""

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from flywheel_server.deployment.settings import configured
from flywheel_server.engines.llama_cpp.default_model import default_model

from tests.deployment.conftest import ROOT, SMALL, VOLUME
from tests.deployment.test_download import Hub, serving_hub
from tests.modal_cloud import ModalCloud

PAGE = (ROOT / "docs" / "modal.md").read_text()

RUN = {
    "openssl rand": r"^[0-9a-f]{64}$",
    "FLYWHEEL_MODAL_GPU=none": "smollm2-135m-instruct-q8_0: checking the SHA-256",
    "modal deploy": "App deployed",
    "flywheel endpoints\n": r"^localhost:\d+",
    "--max-tokens 32": r"\w",
    "modal app logs": '"event":"reachable"',
    "FLYWHEEL_MODAL_GPU=A10G": "",
    "endpoints --first": "",
    "flywheel health": "SERVING",
    "modal app stop": "",
}
"""By a piece of each command that is run: what its output says, as a regular expression."""

NOT_RUN = {
    "modal setup": "installs what runs this test, and opens a browser",
    ".venv/bin/modal run modal_deploy.py::fetch_weights\n": "downloads 20 GB",
    "--samples 3": "needs the 20 GB that were not downloaded, and a GPU",
    "https://YOUR-WORKSPACE": "has a public URL on Modal alone; test_gateway.py reads the page from the stand-in",
    "grpcurl": "is a program of its own; other tests call the server with reflection, as it does",
    "git pull": "replaces what is tested by what is on the Internet",
}
"""By a piece of each command that is not run: why not."""


def blocks(language: str) -> list[str]:
    """Returns the code blocks of the page in that language, in order."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^\1```$", PAGE, re.MULTILINE | re.DOTALL)
    return [textwrap.dedent(block) for _, block in found]


def key_of(block: str) -> str:
    """Returns the key of the block in one of the two tables."""
    known = {key for key in (*RUN, *NOT_RUN) if (block == key if key.startswith(".venv") else key in block)}
    assert len(known) == 1, f"the tables of this test know {len(known)} entries for:\n{block}"
    return known.pop()


@dataclass
class Reader:
    """Somebody who pastes the commands of the page into a terminal, one block after another."""

    directory: Path
    environ: dict[str, str]

    def paste(self, block: str) -> str:
        """Runs the block in the shell's state that earlier blocks have left, and returns its output."""
        state = self.directory.parent / "state"
        state.touch()
        script = f"set -a; source {shlex.quote(str(state))}; set -eo pipefail\n{block}\nexport -p > {shlex.quote(str(state))}"
        ran = subprocess.run(
            ["bash", "-c", script],  # noqa: S607 - wherever it is
            cwd=self.directory,
            env=self.environ,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert ran.returncode == 0, f"{block}\n{ran.stdout}{ran.stderr}"
        return ran.stdout

    def paste_until(self, block: str, expected: str) -> str:
        """Does as the page says while a gateway starts: it tries again."""
        end = time.monotonic() + 60
        while True:
            try:
                output = self.paste(block)
            except AssertionError:
                if time.monotonic() > end:
                    raise
            else:
                if re.search(expected, output, re.MULTILINE):
                    return output
                assert time.monotonic() < end, f"{block}\n{output}"
            time.sleep(0.2)


@pytest.fixture
def account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModalCloud]:
    """A fresh account, a hub that has the small model, and gateways that trust the certificates of the stand-in's tunnels."""
    # The file has another quantization than its name says, and is filled up to the size in the catalogue.
    content = default_model().read_bytes().ljust(SMALL.size_bytes, b"\0")
    hub = Hub(content, hashlib.sha256(content).hexdigest())
    home = tmp_path / "cloud"
    home.mkdir()
    with ModalCloud(home) as cloud, serving_hub(hub) as url:
        authority = tmp_path / "authority.pem"
        authority.write_bytes(cloud.ca_certificate)
        monkeypatch.setenv("HF_ENDPOINT", url)
        monkeypatch.setenv("GRPC_DEFAULT_SSL_ROOTS_FILE_PATH", str(authority))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield cloud


@pytest.fixture
def reader(account: ModalCloud, tmp_path: Path) -> Reader:
    clone = tmp_path / "clone"
    clone.mkdir()
    (clone / ".venv").symlink_to(sys.prefix)
    for each in ROOT.iterdir():
        if not each.name.startswith("."):
            (clone / each.name).symlink_to(each)
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("MODAL_", "FLYWHEEL_"))}
    ours = {
        # On this machine, a volume is mounted in the cloud's own directory, and all containers share the ports.
        "FLYWHEEL_DEPLOY_WEIGHTS_PATH": str(account.directory / "weights"),
        "FLYWHEEL_DEPLOY_ADDRESS": "127.0.0.1:0",
        "PYTHONUNBUFFERED": "1",
    }
    return Reader(clone, {**environ, **account.environ, **ours})


def test_the_tables_have_all_commands_and_no_others() -> None:
    assert {key_of(block) for block in blocks("sh")} == {*RUN, *NOT_RUN}


def test_the_first_ten_minutes_need_neither_a_gpu_nor_a_large_model() -> None:
    first = PAGE[: PAGE.index("## Mixtral on an A10G")]
    for expected in (
        "FLYWHEEL_DEPLOY_WEIGHTS=smollm2-135m-instruct-q8_0",
        "FLYWHEEL_MODAL_GPU=none",
        "modal deploy",
        "flywheel generate",
    ):
        assert expected in first


def test_the_costs_follow_from_the_prices_and_the_defaults() -> None:
    gpu, core, gib = map(float, re.findall(r"\$(0\.000\d+) a\s+second", PAGE))
    found = configured({})
    gateway = found.deployment.gateway_cpu * core + found.deployment.gateway_memory / 1024 * gib
    assert found.model_memory is not None
    model = gpu + found.deployment.model_cpu * core + found.model_memory / 1024 * gib
    assert f"${gateway * 86400:.2f} a day, or ${gateway * 86400 * 30:.0f} a month" in PAGE
    assert PAGE.count(f"${gateway * 86400:.2f} a day") == 2
    assert f"costs ${model * 3600:.2f} an hour" in PAGE


@pytest.mark.thorough
@pytest.mark.timeout(600)  # a model that generates on a busy machine takes its time
@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl, as readers of the page do")
def test_the_commands_of_the_page_do_what_it_says(account: ModalCloud, reader: Reader) -> None:
    for block in blocks("sh"):
        key = key_of(block)
        if key in RUN:
            reader.paste_until(block, RUN[key])
        if key == "--max-tokens 32":
            assert not account.function("flywheel-grpc/Model").resources.gpu_config.gpu_type
            program = blocks("python")[0].replace('"…"', "__import__('os').environ['FLYWHEEL_API_KEY']")
            assert re.search(r"\w", reader.paste(f".venv/bin/python -c {shlex.quote(program)}"))
        if key == "FLYWHEEL_MODAL_GPU=A10G":
            assert account.volume_dir(VOLUME).joinpath(*SMALL.path(Path()).parts).exists()
    assert account.function("flywheel-grpc/Model").resources.gpu_config.gpu_type == "A10G"
    assert not account.containers("flywheel-grpc/Gateway")
    for kind in ("dict", "volume", "secret"):
        gone = account.cli(
            kind, "delete", {"dict": "flywheel-grpc-endpoints", "volume": VOLUME, "secret": "flywheel-grpc-keys"}[kind], "--yes"
        )
        assert "not found" in (gone.stdout + gone.stderr).lower()
    assert not account.unimplemented
