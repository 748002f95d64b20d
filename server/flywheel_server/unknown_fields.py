"""Finds the fields of a message that this server does not know, because the caller's contract is newer."""

from collections.abc import Iterator
from itertools import islice
from typing import Final

from google.protobuf.message import Message

from flywheel_server.errors import UnknownFieldError

MAX_REPORTED: Final = 16
"""Unknown fields of a request that are reported."""


def refuse_unknown_fields(message: Message) -> None:
    """Raises `UnknownFieldError` if the message, or a message in it, has fields that this server does not know by this type.

    Such fields are discarded. The time is proportional to the size of the message, and to its number of elements.
    """
    # Protobuf's `UnknownFieldSet` makes an object for each unknown field, of which a message of a few MiB may have millions.
    data = message.SerializeToString()
    message.DiscardUnknownFields()
    if message.ByteSize() == len(data):
        return
    found = list(islice(_unknown_fields(type(message).FromString(data), ""), MAX_REPORTED))
    names = {(path, number): name for path, number, name in found if name}
    raise UnknownFieldError([(path, number) for path, number, _ in found], names)


def _unknown_fields(message: Message, path: str) -> Iterator[tuple[str, int, str]]:
    """Yields the unknown fields of a message, and discards them.

    Each is the path of the message that has the field, the number of the field, and the name of the field that is known by this
    number; empty if none is.
    """
    for field, value in message.ListFields():
        if field.message_type is None or field.message_type.GetOptions().map_entry:
            continue
        prefix = f"{path}.{field.name}" if path else field.name
        if isinstance(value, Message):
            yield from _unknown_fields(value, prefix)
        else:
            for index, element in enumerate(value):
                yield from _unknown_fields(element, f"{prefix}[{index}]")
    data = message.SerializeToString()
    message.DiscardUnknownFields()
    # Unknown fields are written last.
    known = message.DESCRIPTOR.fields_by_number
    for number in _numbers(data[message.ByteSize() :]):
        yield path, number, known[number].name if number in known else ""


def _numbers(data: bytes) -> Iterator[int]:
    """Yields the number of each field in the bytes of a message, up to the first group."""
    position = 0
    while position < len(data):
        tag, position = _varint(data, position)
        yield tag >> 3
        match tag & 7:
            case 0:
                _, position = _varint(data, position)
            case 1:
                position += 8
            case 2:
                length, position = _varint(data, position)
                position += length
            case 5:
                position += 4
            case _:
                return


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """Returns the number that stands at the position, and the position after it."""
    value = shift = 0
    while data[position] & 0x80:
        value |= (data[position] & 0x7F) << shift
        position, shift = position + 1, shift + 7
    return value | data[position] << shift, position + 1
