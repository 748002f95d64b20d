"""What an engine's calls show of its condition, for whoever supervises it."""

import asyncio

from flywheel_server import running_time
from flywheel_server.engines.base import EngineError, EngineFailedError
from flywheel_server.system.shortage import is_shortage


class Activity:
    """The calls within an engine, how long ago it showed that it lives, and whether it has failed.

    Attributes:
        inside: Calls that were given to the engine, whether it has begun to work on them or not.
        failed: Is set when the engine has failed in a way that may be more than this one call's.
    """

    def __init__(self) -> None:
        self.inside = 0
        self.failed = asyncio.Event()
        self._lives = False
        """Whether the engine has shown that it lives since the last look."""
        self._seen_alive = 0.0
        """When a look last found that, in running time."""
        self._in_doubt: asyncio.Future[None] | None = None
        self._within_engine = _WithinEngine(self)
        self._noticing = _Noticing(self)

    def within_engine(self) -> "_WithinEngine":
        """Counts a call as inside for the length of the context, and does what `failures_noticed` does."""
        return self._within_engine

    def sign(self) -> None:
        """Notes that the engine has made something of a sample, or got a call after having none."""
        # Called for each token: the clock is left to whoever asks.
        self._lives = True

    def silence(self) -> float:
        """Returns the seconds of running time since the first look after the last sign."""
        if self._lives:
            self._lives = False
            self._seen_alive = running_time.now()
        return running_time.now() - self._seen_alive

    def failures_noticed(self) -> "_Noticing":
        """Sets `failed` if an error is raised within the context that may concern more than one call."""
        return self._noticing

    def notice(self, error: BaseException) -> None:
        """Sets `failed` if the error may concern more than one call.

        Raises `EngineFailedError` instead if it is none that a call may end with: the engine has cancelled itself, or means to
        end more than the call.
        """
        if isinstance(error, asyncio.CancelledError):
            if (task := asyncio.current_task()) and task.cancelling():
                return
            # Nobody has cancelled the call: it is the engine's own, which would leave the caller without a status.
            self._suspect()
            raise EngineFailedError("the engine cancelled itself") from error
        if isinstance(error, KeyboardInterrupt):
            return
        if not isinstance(error, Exception):
            # Such as SystemExit, which would end the event loop, and with it all other calls.
            self._suspect()
            raise EngineFailedError(f"the engine raised {type(error).__name__}") from error
        is_engines = isinstance(error, EngineFailedError) or not isinstance(error, EngineError)
        if is_engines and not is_shortage(error):
            self._suspect()

    def _suspect(self) -> None:
        self._in_doubt = self._in_doubt or asyncio.get_running_loop().create_future()
        self.failed.set()

    def confirm_alive(self) -> None:
        """Notes that a check after a failure has found the engine alive."""
        if self._in_doubt is not None:
            self._in_doubt.set_result(None)
            self._in_doubt = None

    async def confirmed_alive(self) -> None:
        """Returns once a check has found the engine alive since it last failed; never, if it is dead."""
        if self._in_doubt is not None:
            await asyncio.shield(self._in_doubt)


class _Noticing:
    """The context of `failures_noticed`, the same for all calls."""

    def __init__(self, activity: Activity) -> None:
        self._activity = activity

    def __enter__(self) -> None:
        """There is nothing to prepare."""

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is not None:
            self._activity.notice(error)


class _WithinEngine:
    """The context of `within_engine`, the same for all calls."""

    def __init__(self, activity: Activity) -> None:
        self._activity = activity

    def __enter__(self) -> None:
        if not self._activity.inside:
            self._activity.sign()
        self._activity.inside += 1

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self._activity.inside -= 1
        if error is not None:
            self._activity.notice(error)
