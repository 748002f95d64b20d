"""Chooses what a refused caller is told, if there is too much wrong with a request: trailers are small."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Final

from flywheel_server.messages import MAX_VIOLATIONS, FieldViolation

MAX_VIOLATION_BYTES: Final = 4096
"""Bytes of the violations in the details of a status. gRPC clients take 8 KiB of metadata unless they say otherwise."""

MAX_SUMMARY_BYTES: Final = 400
"""Bytes of the violations in the message of a status, which is sent twice: by itself, and in the details."""


def name_of(violation: FieldViolation) -> str:
    """Returns the name of the field of a request that has the violation."""
    return re.split(r"[.\[]", violation.field, maxsplit=1)[0]


def reported(violations: Sequence[FieldViolation]) -> list[FieldViolation]:
    """Returns as many of the violations as there is room for, at least one. The first one of each field goes before others."""
    earlier: Counter[str] = Counter()
    ranked = []
    for position, violation in enumerate(violations):
        name = name_of(violation)
        ranked.append((earlier[name], position))
        earlier[name] += 1
    chosen: list[int] = []
    size = 0
    for _, position in sorted(ranked)[:MAX_VIOLATIONS]:
        size += _size(violations[position])
        if chosen and size > MAX_VIOLATION_BYTES:
            break
        chosen.append(position)
    return [violations[position] for position in sorted(chosen)]


def summary(violations: Sequence[FieldViolation], total: int) -> str:
    """Returns the first violations in words, as many as there is room for, and how many more there are of `total`."""
    first, *others = (f"{violation.field} {violation.description}" for violation in violations)
    words = [_beginning(first)]
    size = len(first.encode())
    for other in others:
        size += len(other.encode())
        if size > MAX_SUMMARY_BYTES:
            break
        words.append(other)
    more = [f"and {total - len(words)} more"] if len(words) < total else []
    return "; ".join([*words, *more])


def _beginning(text: str) -> str:
    encoded = text.encode()
    return text if len(encoded) <= MAX_SUMMARY_BYTES else f"{encoded[:MAX_SUMMARY_BYTES].decode(errors='ignore')} …"


def _size(violation: FieldViolation) -> int:
    return len(violation.field.encode()) + len(violation.description.encode())
