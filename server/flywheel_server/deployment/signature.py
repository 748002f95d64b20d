"""Gives a method with `**fields` the signature that tells gateways which fields of a request it accepts."""

import inspect
from collections.abc import Callable, Collection
from typing import Any, TypeVar

from flywheel_server.engines.modal.remote_fields import TRACE_ARGUMENT
from flywheel_server.messages import SERVER_FIELDS, GenerationRequest

Method = TypeVar("Method", bound=Callable[..., Any])


def takes_fields(*positional: str, refused: Collection[str] = ()) -> Callable[[Method], Method]:
    """Returns a decorator that gives a method the signature `(self, *positional, text, max_tokens, …, trace_headers)`.

    Modal stores the signature when the class is deployed; see `engines.modal.remote_fields` for what gateways do with it.

    Arguments:
        positional: The arguments before the fields.
        refused: Fields that are left out, because the deployment does not support them.
    """
    refused = {*refused, *SERVER_FIELDS}

    def decorate(method: Method) -> Method:
        names = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in ("self", *positional)]
        fields = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if field.is_required() else field.default,
            )
            for name, field in GenerationRequest.model_fields.items()
            if name not in refused
        ]
        trace = inspect.Parameter(TRACE_ARGUMENT, inspect.Parameter.KEYWORD_ONLY, default=None)
        method.__signature__ = inspect.Signature([*names, *fields, trace])  # type: ignore[attr-defined] # functions may have one
        return method

    return decorate
