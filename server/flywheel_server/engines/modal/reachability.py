"""Finds out whether calls to a class on Modal can be made. Health asks this if Modal does not tell how busy the class is."""

from flywheel_server import running_time
from flywheel_server.engines.modal.retries import CONFIRMATION_SECONDS


class Reachability:
    """Concludes from requests to Modal whether the class can be reached.

    The class is reachable once a request about it has succeeded. It becomes unreachable if two look-ups or more have failed
    since the last success, the first of them `CONFIRMATION_SECONDS` ago.
    """

    def __init__(self) -> None:
        self._has_succeeded = False
        self._failing_since: float | None = None
        self._failures = 0

    @property
    def is_reachable(self) -> bool:
        """Whether the class can be reached, as far as the requests tell."""
        if not self._has_succeeded or self._failing_since is None:
            return self._has_succeeded
        seconds = running_time.now() - self._failing_since
        return self._failures < 2 or seconds < CONFIRMATION_SECONDS  # noqa: PLR2004 - one failure decides nothing

    def note_success(self) -> None:
        """Notes that a request about the class has succeeded: a look-up, a call, or a request for its stats."""
        self._has_succeeded = True
        self._failing_since = None
        self._failures = 0

    def note_failure(self) -> None:
        """Notes that the class could not be looked up."""
        self._failures += 1
        if self._failing_since is None:
            self._failing_since = running_time.now()
