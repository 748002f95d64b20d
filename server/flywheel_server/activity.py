"""Collects the signs of an engine's health that its calls give, for its supervisor."""

import asyncio

from flywheel_server import running_time
from flywheel_server.engines.base import Engine, EngineError, EngineFailedError, EngineStats
from flywheel_server.system.shortage import is_shortage


class Activity:
    """Counts the calls in an engine, and records when it last made progress and whether it has failed.

    Attributes:
        inside: Calls that the engine has been given, started or not.
        failed: Set when the engine fails in a way that may concern more than one call.
    """

    def __init__(self) -> None:
        self.inside = 0
        self.failed = asyncio.Event()
        self._has_progress = False
        """Whether the engine has made progress since `silence` was last called."""
        self._progress_seen_at = 0.0
        """When `silence` last found progress, in running time."""
        self._confirmation: asyncio.Future[None] | None = None
        """While the engine is suspected: done when a check finds the engine alive. Otherwise None."""
        self._within_engine = _WithinEngine(self)
        self._noticing = _Noticing(self)

    def within_engine(self) -> "_WithinEngine":
        """Returns a context that counts a call as inside, and notices failures as `noticing_failures` does."""
        return self._within_engine

    def note_progress(self) -> None:
        """Notes that the engine has produced output, or has got a call after it had none."""
        # Called for each token, so it does not read the clock: `silence` does.
        self._has_progress = True

    def silence(self) -> float:
        """Returns the seconds of running time since this method first found the engine's last progress."""
        if self._has_progress:
            self._has_progress = False
            self._progress_seen_at = running_time.now()
        return running_time.now() - self._progress_seen_at

    def noticing_failures(self) -> "_Noticing":
        """Returns a context that passes the error it is left with, if any, to `notice`."""
        return self._noticing

    def notice(self, error: BaseException) -> None:
        """Sets `failed` if the error may concern more than one call.

        Raises `EngineFailedError` in place of an error that must not leave a call: a cancellation that the engine caused, or
        an exception such as SystemExit.
        """
        if failure := _failure_in_place_of(error):
            self._suspect()
            raise failure from error
        if not isinstance(error, Exception):
            return
        is_fault = isinstance(error, EngineFailedError) or not isinstance(error, EngineError)
        if is_fault and not is_shortage(error):
            self._suspect()

    def _suspect(self) -> None:
        self._confirmation = self._confirmation or asyncio.get_running_loop().create_future()
        self.failed.set()

    def confirm_alive(self) -> None:
        """Notes that a check has found the engine alive after a failure."""
        if self._confirmation is not None:
            self._confirmation.set_result(None)
            self._confirmation = None

    async def confirmed_alive(self) -> None:
        """Returns when a check has found the engine alive after its last failure. If the engine is dead, never returns."""
        if self._confirmation is not None:
            await asyncio.shield(self._confirmation)


async def stats_of(engine: Engine) -> EngineStats:
    """Returns how busy the engine is. Raises `EngineFailedError` in place of an error that must not leave a call."""
    try:
        return await engine.stats()
    except BaseException as error:
        if failure := _failure_in_place_of(error):
            raise failure from error
        raise


def _failure_in_place_of(error: BaseException) -> EngineFailedError | None:
    """Returns the failure that an error of an engine becomes if it must not leave a call; None for any other error."""
    if isinstance(error, asyncio.CancelledError):
        if (task := asyncio.current_task()) and task.cancelling():
            return None
        # Nobody cancelled the call, so the engine did. The caller would get no status.
        return EngineFailedError("the engine cancelled itself")
    if isinstance(error, Exception | KeyboardInterrupt):
        return None
    # For example SystemExit, which would end the event loop and so all other calls.
    return EngineFailedError(f"the engine raised {type(error).__name__}")


class _Noticing:
    """The context of `noticing_failures`, shared by all calls."""

    def __init__(self, activity: Activity) -> None:
        self._activity = activity

    def __enter__(self) -> None:
        """Does nothing."""

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is not None:
            self._activity.notice(error)


class _WithinEngine(_Noticing):
    """The context of `within_engine`, shared by all calls."""

    def __enter__(self) -> None:
        if not self._activity.inside:
            self._activity.note_progress()
        self._activity.inside += 1

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self._activity.inside -= 1
        super().__exit__(kind, error, traceback)
