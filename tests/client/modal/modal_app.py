"""An app of which the test needs only the address: the test that deploys it serves on the port itself."""

import os

import modal

app = modal.App("with-server", image=modal.Image.debian_slim(python_version="3.11"))
PORT = int(os.environ.get("PORT", "8000"))


@app.server(port=PORT, h2_enabled=True, env={"PORT": str(PORT)})
class GatewayServer:
    @modal.enter()
    def enter(self) -> None:
        """There is nothing to start."""
