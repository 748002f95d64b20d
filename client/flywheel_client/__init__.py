"""The Python client of Flywheel gRPC: `Client` for threads, `AsyncClient` for asyncio.

Example:
    with Client("localhost:50051") as client, client.generate_deltas("Once upon a time", max_tokens=64) as deltas:
        for delta in deltas:
            print(delta.text, end="", flush=True)

`Client.from_modal()` finds a deployment on Modal by the name of its app, and balances its calls over the containers.
"""

import importlib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from flywheel_client._public import *  # noqa: F403 - the names are listed there
    from flywheel_client._public import __all__ as __all__
else:

    def __getattr__(name: str) -> object:
        """Returns a public name.

        The first use of a public name imports grpc, which takes a while. The command `flywheel` can handle interrupts earlier.
        """
        public = importlib.import_module("flywheel_client._public")
        globals().update({each: getattr(public, each) for each in (*public.__all__, "__all__")})
        try:
            return globals()[name]
        except KeyError:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None

    def __dir__() -> list[str]:
        # Reading `__all__` makes the public names globals.
        return sorted({*__getattr__("__all__"), *globals()})


del TYPE_CHECKING
