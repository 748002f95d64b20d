"""Gives a method with `**fields` the signature that tells gateways which fields of a request it accepts."""

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from flywheel_server.messages import GenerationRequest

Method = TypeVar("Method", bound=Callable[..., Any])


def takes_fields(*positional: str) -> Callable[[Method], Method]:
    """Returns a decorator that gives a method the signature `(self, *positional, text, max_tokens, …)`.

    Modal stores the signature when the class is deployed; see `engines.modal.remote_fields` for what gateways do with it.
    """

    def decorate(method: Method) -> Method:
        names = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in ("self", *positional)]
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
