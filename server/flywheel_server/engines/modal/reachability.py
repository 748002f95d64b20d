"""Whether calls to a class on Modal can be made: what health says while Modal does not say how busy the class is."""

from flywheel_server import running_time
from flywheel_server.engines.modal.retries import CONFIRMATION_SECONDS


class Reachability:
    """Knows from the requests to Modal whether the class can be reached.

    It can be reached once a request has succeeded that finds or calls it, and until such requests have failed, and none has
    succeeded, for `CONFIRMATION_SECONDS`.
    """

    def __init__(self) -> None:
        self._known = False
        self._failing_since: float | None = None
        self._failures = 0

    def __bool__(self) -> bool:
        if not self._known or self._failing_since is None:
            return self._known
        lasted = running_time.now() - self._failing_since
        return self._failures < 2 or lasted < CONFIRMATION_SECONDS  # noqa: PLR2004 - one failure is no verdict

    def succeeded(self) -> None:
        """Takes note that the class was found or called."""
        self._known = True
        self._failing_since = None
        self._failures = 0

    def failed(self) -> None:
        """Takes note that the class could not be found."""
        self._failures += 1
        if self._failing_since is None:
            self._failing_since = running_time.now()
