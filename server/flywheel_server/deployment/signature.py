"""The signature of a method with `**fields`, so that gateways see which fields of a request it takes."""

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from flywheel_server.messages import GenerationRequest

Method = TypeVar("Method", bound=Callable[..., Any])


def takes_fields(*before: str) -> Callable[[Method], Method]:
    """Returns a decorator that gives a method the signature `(self, *before, text, max_tokens, …)`.

    Modal keeps the signature of a method when the class is deployed, and tells it to whoever looks the class up. So a gateway
    of another version knows without waking a container which fields this one takes.
    """

    def decorate(method: Method) -> Method:
        names = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in ("self", *before)]
        fields = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if field.is_required() else field.default,
            )
            for name, field in GenerationRequest.model_fields.items()
        ]
        method.__signature__ = inspect.Signature([*names, *fields])  # type: ignore[attr-defined] # functions may have one
        return method

    return decorate
