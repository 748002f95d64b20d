"""Draws the picture of the README: what `flywheel generate` prints on a terminal, with a real server and a real model.

`make picture` runs this. The command runs on a terminal of its own, so that the picture has what a user sees.
"""

import os
import pty
import re
import shlex
import subprocess
import sys
from contextlib import suppress
from io import StringIO
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.text import Text

from benchmarks.serving import flywheel_server

PICTURE: Final = Path(__file__).parent / "generate.svg"
COMMAND: Final = ("flywheel", "generate", "Write one line about the sea.", "--samples", "3")
COLUMNS: Final = 88


def record(address: str) -> str:
    """Returns what the command writes to a terminal, escape sequences included, if the server is at this address."""
    program, *arguments = COMMAND
    controller, terminal = pty.openpty()
    environment = os.environ | {"FLYWHEEL_ADDRESS": address, "TERM": "xterm", "NO_COLOR": ""}
    with subprocess.Popen(
        [Path(sys.executable).parent / program, *arguments], stdin=terminal, stdout=terminal, stderr=terminal, env=environment
    ) as process:
        os.close(terminal)
        written = b""
        with suppress(OSError):  # Linux reports the end of a terminal as EIO.
            while chunk := os.read(controller, 4096):
                written += chunk
        os.close(controller)
    if process.returncode:
        raise RuntimeError(f"{program} ended with {process.returncode}: {written.decode()}")
    return written.decode().replace("\r\n", "\n")


def draw(printed: str) -> str:
    """Returns the SVG of a terminal with the command and what it printed, wrapped at words."""
    console = Console(record=True, width=COLUMNS, file=StringIO(), force_terminal=True, legacy_windows=False)
    console.print(Text.from_ansi(f"\x1b[1m$\x1b[0m {shlex.join(COMMAND)}\n{printed}"))
    return without_fonts(console.export_svg(title="flywheel", unique_id="terminal"))


def without_fonts(drawn: str) -> str:
    """Returns a picture that fetches nothing, and has no spaces at the ends of its lines."""
    # It would have viewers fetch a font from another host. Their own monospaced font does as well.
    own_fonts = re.sub(r"@font-face \{.*?\}\s*", "", drawn, flags=re.DOTALL)
    return re.sub(r"[ \t]+$", "", own_fonts, flags=re.MULTILINE)


def main() -> None:
    """Writes the picture."""
    with flywheel_server() as address:
        PICTURE.write_text(draw(record(address)))


if __name__ == "__main__":
    main()
