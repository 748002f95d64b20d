"""Sets the wall clock of this process wrong, by as many seconds as `WALL_CLOCK_OFFSET` says; Python imports it at its start.

Monotonic clocks stay right, as on a machine whose time was never set. What asks the operating system without Python, as TLS
does for certificates, gets the right time.
"""

import datetime
import os
import time
from collections.abc import Callable
from typing import Any

OFFSET = float(os.environ["WALL_CLOCK_OFFSET"])
NANOSECONDS = round(OFFSET * 1e9)


def later(clock: Callable[..., Any], offset: float) -> Callable[..., Any]:
    """Returns the clock, set wrong."""
    return lambda *arguments: clock(*arguments) + offset


def of_wall_clock(clock: Callable[..., Any], offset: float) -> Callable[..., Any]:
    """Returns a clock that is told which to read, and is wrong where that is the wall clock."""
    return lambda which: clock(which) + (offset if which == time.CLOCK_REALTIME else 0)


def of_now(convert: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a conversion of seconds since the epoch, which are those of now if there are none."""
    return lambda seconds=None: convert(time.time() if seconds is None else seconds)


class _Like(type):
    """Instances of the original are instances of what takes its place, too."""

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, cls.__mro__[1])

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, cls.__mro__[1])


class WrongDate(datetime.date, metaclass=_Like):
    """`datetime.date` by the wrong clock."""

    @classmethod
    def today(cls) -> Any:
        return super().fromtimestamp(time.time())


class WrongDatetime(datetime.datetime, metaclass=_Like):
    """`datetime.datetime` by the wrong clock."""

    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> Any:
        return super().fromtimestamp(time.time(), tz)

    @classmethod
    def today(cls) -> Any:
        return super().fromtimestamp(time.time())

    @classmethod
    def utcnow(cls) -> Any:
        return super().fromtimestamp(time.time(), datetime.UTC).replace(tzinfo=None)


time.time = later(time.time, OFFSET)
time.time_ns = later(time.time_ns, NANOSECONDS)
time.clock_gettime = of_wall_clock(time.clock_gettime, OFFSET)
time.clock_gettime_ns = of_wall_clock(time.clock_gettime_ns, NANOSECONDS)
for name in ("gmtime", "localtime", "ctime"):
    setattr(time, name, of_now(getattr(time, name)))
for wrong, right in ((WrongDate, "date"), (WrongDatetime, "datetime")):
    # Pickled, an instance is one of the original to whoever unpickles it.
    wrong.__module__, wrong.__name__, wrong.__qualname__ = "datetime", right, right
    setattr(datetime, right, wrong)
