"""A deployment of `scripted_app.py` on the stand-in of Modal's cloud, and the flywheel engine that calls it."""

from pathlib import Path
from typing import Any

import modal
from flywheel_server.engines.base import EngineModel
from flywheel_server.engines.modal.engine import FlywheelEngine
from flywheel_server.engines.modal.errors import Target
from flywheel_server.engines.scripted import Script

from tests.modal_cloud import ModalCloud

APP = Path(__file__).parent / "scripted_app.py"
GPU = "A10G"
TIMEOUT = 600


def deploy(cloud: ModalCloud, app: str, script: Script | None = None, *, newer: bool = False, receiver: str = "") -> None:
    """Deploys the app under this name, to play the script, in this version or in a newer one, and to trace its calls."""
    script = script or Script()
    env = {
        "SCRIPTED_APP": app,
        "SCRIPT": script.model_dump_json(),
        "SCRIPTED_NEWER": "yes" if newer else "",
        "SCRIPTED_RECEIVER": receiver,
    }
    deployed = cloud.cli("deploy", str(APP), env=env)
    assert deployed.returncode == 0, deployed.stdout + deployed.stderr


def engine(app: str, class_name: str = "Model", timeout: int = TIMEOUT, **model: Any) -> FlywheelEngine:
    """Returns an engine that calls a class of the app."""
    described = {"name": app, "engine": "flywheel", "context_tokens": 8192, "penalizes_prompt": False, "prompt_format": "raw"}
    return FlywheelEngine(
        Target(app, class_name), gpu=GPU, timeout=timeout, as_deployed=False, model=EngineModel(**{**described, **model})
    )


async def running(app: str) -> int:
    """Returns how many generations run in the class, as it says itself."""
    instance = modal.Cls.from_name(app, "Model").with_options(gpu=GPU, timeout=TIMEOUT)()
    count: int = await instance.running.remote.aio()
    return count
