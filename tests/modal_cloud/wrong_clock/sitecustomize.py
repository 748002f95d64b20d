"""Sets the wall clock of this process wrong, by as many seconds as `WALL_CLOCK_OFFSET` says; Python imports it at its start.

Monotonic clocks stay right, as on a machine whose time was never set. What asks the operating system without Python, as TLS
does for certificates, gets the right time; so does grpc as a whole, whose core and whose Python have to agree about deadlines.
"""

import datetime
import os
import sys
import time
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

OFFSET = float(os.environ["WALL_CLOCK_OFFSET"])
NANOSECONDS = round(OFFSET * 1e9)


def later(clock: Callable[..., Any], offset: float) -> Callable[..., Any]:
    """Returns the clock, set wrong."""
    return lambda *arguments: clock(*arguments) + offset


def of_wall_clock(clock: Callable[..., Any], offset: float) -> Callable[..., Any]:
    """Returns a clock that is told which clock to read, and is wrong if that is the wall clock."""
    return lambda which: clock(which) + (offset if which == time.CLOCK_REALTIME else 0)


def of_now(convert: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a conversion of seconds since the epoch; without an argument, it converts the time of now."""
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


class RightForGrpc:
    """Finds the modules of grpc, and gives each that reads the time a module `time` that is right."""

    def __init__(self) -> None:
        self._right = ModuleType("time")
        self._right.__dict__.update(time.__dict__)

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if not name.startswith("grpc."):
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                if hasattr(module, "time"):
                    vars(module)["time"] = self._right

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, RightForGrpc())
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
