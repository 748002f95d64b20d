"""A container of the Model at the ends of the ranges of its settings, on one core."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from flywheel_server.deployment.settings import configured
from flywheel_server.engines.llama_cpp.default_model import default_model

CONTAINER = """
import asyncio, os
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from flywheel_server.deployment.model import start_engine
from flywheel_server.deployment.settings import configured

async def main():
    found = configured(os.environ)
    engine = await start_engine(found.weights, found.deployment, found.server)
    await engine.__aexit__()

asyncio.run(main())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no affinity mask")
def test_the_model_starts_with_the_cores_that_it_has(tmp_path: Path) -> None:
    environment = {
        "FLYWHEEL_DEPLOY_WEIGHTS": "smollm2-135m-instruct-q8_0",
        "FLYWHEEL_DEPLOY_WEIGHTS_PATH": str(tmp_path),
        "FLYWHEEL_DEPLOY_MODEL_CPU": "64",
        "FLYWHEEL_DEPLOY_MODEL_SLOTS": "256",
        "FLYWHEEL_EMBEDDED_BATCH": "1",
        "FLYWHEEL_MODAL_CONTEXT": "256",
        "FLYWHEEL_MODAL_GPU": "none",
    }
    weights = configured(environment).weights
    assert weights
    path = weights.path(tmp_path)
    path.parent.mkdir(parents=True)
    path.symlink_to(default_model())
    done = subprocess.run(
        [sys.executable, "-c", CONTAINER],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert re.search(r'"threads": ?1\b', done.stdout), done.stdout
