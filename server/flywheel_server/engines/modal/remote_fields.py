"""Decides which fields of a request are sent to a class on Modal, and detects a field that the class does not take.

The gateway and the class may run different versions, and the class may be MK1's. So Flywheel's eleven fields are always sent,
by name, and any other field only if it is set. The class's signature shows which of them it takes. Modal stores the signature,
so no container has to start for it. A class may be deployed again after its signature was read: then the error that it raises
tells that it does not take a field.
"""

import re
from collections.abc import Collection
from typing import Any, Final

import modal
from modal_proto import api_pb2

from flywheel_server.engines.base import UnsupportedFieldError
from flywheel_server.engines.modal.waits import modal_result
from flywheel_server.messages import FLYWHEEL_FIELDS, SERVER_FIELDS, GenerationRequest

CONTRACT_FIELDS: Final = frozenset(GenerationRequest.model_fields)
"""All fields of a request."""

SENDER_ARGUMENTS: Final = ("queue", "partition", "call")
"""The arguments of our own `generate_deltas` that come before the fields."""

TRACE_ARGUMENT: Final = "trace_headers"
"""The argument of our own methods for the headers of the call's trace. It is sent only to a class whose signature has it."""

UNKNOWN_FIELD: Final = "Extra inputs are not permitted"
"""pydantic's message for an unknown field. Our own class raises it; the text must match classes that are deployed already."""

_UNEXPECTED_ARGUMENT: Final = re.compile(r"got an unexpected keyword argument '(\w+)'")


def further_fields(request: GenerationRequest) -> dict[str, Any]:
    """Returns the fields beyond Flywheel's eleven that are for the engine, and whose value is not their default."""
    return request.model_dump(mode="json", exclude={*FLYWHEEL_FIELDS, *SERVER_FIELDS}, exclude_defaults=True)


def arguments_of(request: GenerationRequest) -> dict[str, Any]:
    """Returns the request as keyword arguments for a class: Flywheel's eleven fields, and further fields that are set."""
    return request.model_dump(mode="json", include={*FLYWHEEL_FIELDS}) | further_fields(request)


async def fields_of(method: modal.Function[..., Any, Any]) -> frozenset[str]:
    """Returns the names of the fields that the method takes, as far as its signature shows them.

    If it does not show them, for example with `**fields`, they are Flywheel's eleven. A method that takes any argument might
    ignore a field, and no field may be ignored.

    Modal tells the names of arguments, but not their kinds. So an argument that has no default, and is neither Flywheel's nor
    ours, counts as `**fields`: if it were an ordinary argument, the class could not be called.
    """
    try:
        schema = await modal_result(method._get_schema.aio())  # noqa: SLF001 - Modal has no public method for it
    except AttributeError:
        return FLYWHEEL_FIELDS
    ours = {*FLYWHEEL_FIELDS, *SENDER_ARGUMENTS}
    names = frozenset(argument.name for argument in schema.arguments)
    is_open = any(not argument.has_default and argument.name not in ours for argument in schema.arguments)
    is_known = schema.schema_type == api_pb2.FunctionSchema.FUNCTION_SCHEMA_V1 and names.issuperset(FLYWHEEL_FIELDS)
    return names.difference(SENDER_ARGUMENTS) if is_known and not is_open else FLYWHEEL_FIELDS


def unsupported(fields: Collection[str]) -> UnsupportedFieldError | None:
    """Returns the error for fields that the class does not take; None if there are none."""
    if not fields:
        return None
    first, *further = fields
    return UnsupportedFieldError(first, "the class on Modal does not take it", further)


def refusal(error: BaseException, sent: Collection[str]) -> UnsupportedFieldError | None:
    """Returns the error to raise if a class has failed because it does not take a field; otherwise None.

    Arguments:
        error: What the class has raised: MK1's class raises Python's `TypeError`, which names one field; our own raises
            `ValueError`, which names all.
        sent: The names of the fields that were sent beyond Flywheel's eleven. The class can refuse only these.
    """
    match error:
        case TypeError():
            named = _UNEXPECTED_ARGUMENT.findall(str(error))
        case ValueError():
            problems = str(error).split("; ")
            named = [name for name in sent if f"{name}: {UNKNOWN_FIELD}" in problems]
        case _:
            named = []
    return unsupported([name for name in named if name in sent])


def refuses_trace(error: BaseException | None) -> bool:
    """Returns whether a class has failed with this error because it does not take `TRACE_ARGUMENT`.

    The class did take it when it was looked up: it was deployed again, in an older version.
    """
    match error:
        case TypeError():
            return TRACE_ARGUMENT in _UNEXPECTED_ARGUMENT.findall(str(error))
        case ValueError():
            return f"{TRACE_ARGUMENT}: {UNKNOWN_FIELD}" in str(error).split("; ")
        case _:
            return False
