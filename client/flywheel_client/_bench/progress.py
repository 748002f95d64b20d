"""Shows the progress of a run on one line of a terminal.

click's progress bar writes escape sequences, which the standard streams of the command make visible. This line needs none.
"""

import shutil
import sys
from typing import Final

from flywheel_client._bench.driver import Plan
from flywheel_client._bench.measurements import Measurements

BAR_WIDTH: Final = 20


class ProgressLine:
    """Writes the progress to standard error, if that is a terminal, and again over what it wrote before."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._is_terminal = sys.stderr.isatty()
        self._last_length = 0

    def show(self, seconds: float, in_flight: int, measurements: Measurements) -> None:
        """Shows the state of the run after so many seconds."""
        if self._is_terminal:
            self._write(progress_text(self._plan, seconds, in_flight, measurements))

    def clear(self) -> None:
        """Removes the line."""
        if self._last_length:
            self._write("")
            self._write("")

    def _write(self, text: str) -> None:
        text = text[: shutil.get_terminal_size().columns - 1]
        # The text stream would make the carriage return visible.
        sys.stderr.buffer.write(b"\r" + text.ljust(self._last_length).encode("ascii", "replace"))
        sys.stderr.buffer.flush()
        self._last_length = len(text)


def progress_text(plan: Plan, seconds: float, in_flight: int, measurements: Measurements) -> str:
    """Returns the state of a run in ASCII: how much of it is over, and what it has measured so far."""
    ended = measurements.succeeded + measurements.failed
    share = ended / plan.requests
    if plan.duration is not None:
        share = max(share, seconds / plan.duration)
    share = min(share, 1.0)
    bar = "#" * int(share * BAR_WIDTH)
    rate = measurements.generated_tokens / seconds if seconds else 0
    return (
        f"[{bar:{BAR_WIDTH}}] {share:4.0%}  {seconds:.0f} s  {ended} calls  {measurements.failed} failed  "
        f"{in_flight} in flight  {rate:.0f} tokens/s"
    )
