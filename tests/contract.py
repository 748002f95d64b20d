"""What the repository has of the contract besides the generated code."""

import subprocess
import sys
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parent.parent
DESCRIPTOR: Final = "build/flywheel.v1.binpb"
"""Where `make descriptor` writes the descriptor set."""


def write_descriptor_set(file: Path) -> Path:
    """Does as `make descriptor`, to another file, and returns it."""
    subprocess.run([sys.executable, ROOT / "proto" / "descriptor.py", file], check=True)
    return file
