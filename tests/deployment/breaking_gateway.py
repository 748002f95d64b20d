"""An app for Modal whose gateways end by themselves: each ends once the file with its container's id in `BREAK` says how."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import modal
from flywheel_server.deployment import gateway
from flywheel_server.deployment.gateway import GatewayThread
from flywheel_server.server import serve
from flywheel_server.settings import Settings
from flywheel_server.supervision import EngineDiedError

VARIABLES = ("BREAK", "FLYWHEEL_ADDRESS", "FLYWHEEL_API_KEYS", "FLYWHEEL_ENGINE", "FLYWHEEL_WITHDRAW_WINDOW")
environment: dict[str, str | None] = {name: os.environ[name] for name in VARIABLES}
image = modal.Image.debian_slim().add_local_python_source("flywheel_proto", "flywheel_server", "flywheel_client")
app = modal.App("breaking")


@asynccontextmanager
async def breaking(*arguments: Any) -> AsyncIterator[int]:
    """Serves until the file is there."""
    async with serve(*arguments) as port:
        body = asyncio.current_task()
        assert body is not None
        told = asyncio.create_task(_told())
        told.add_done_callback(lambda _: body.cancel())
        try:
            yield port
        except asyncio.CancelledError:
            body.uncancel()
            match told.result():
                case "the engine is dead":
                    raise EngineDiedError("the engine died") from None
                case "a bug":
                    raise RuntimeError("a bug") from None
            raise


async def _told() -> str:
    file = Path(os.environ["BREAK"], os.environ["MODAL_TASK_ID"])
    while not (manner := await asyncio.to_thread(_read, file)):  # noqa: ASYNC110 - of another process
        await asyncio.sleep(0.05)
    match manner:
        case "it exits":
            sys.exit(3)
        case "its event loop stops":
            asyncio.get_running_loop().stop()
            await asyncio.Event().wait()
    return manner


def _read(file: Path) -> str:
    return file.read_text() if file.exists() else ""


vars(gateway)["serve"] = breaking


class Breaking:
    @modal.exit()
    def stop(self) -> None:
        self.gateway.stop()
        print("the exit hook has run")  # noqa: T201 - the test reads it

    def serve(self, tunnelled_app: str | None) -> None:
        self.gateway = GatewayThread(Settings(), tunnelled_app, 0)
        self.gateway.start()


@app.cls(image=image, env=environment, min_containers=1)
class Gateway(Breaking):
    @modal.enter()
    def start(self) -> None:
        self.serve("breaking")


@app.server(
    image=image, env=environment, min_containers=1, port=1, h2_enabled=True, unauthenticated=True, routing_region="us-east"
)
class GatewayServer(Breaking):
    @modal.enter()
    def start(self) -> None:
        self.serve(None)
