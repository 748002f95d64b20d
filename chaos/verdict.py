"""What is promised whatever fails, and what a scenario may cost callers."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from chaos.load import Outcome

PROMPTLY: Final = 3.0
"""Seconds beyond its deadline, or its cancellation, within which a call has ended, on a loaded machine."""
AT_ONCE: Final = 0.5
"""Seconds by which what befalls containers and what callers see of it may be apart."""


@dataclass(frozen=True, slots=True)
class Cost:
    """How calls may end that were not cancelled and had time enough, other than with OK.

    Attributes:
        under_way: The statuses of those that had begun when it began.
        meanwhile: The statuses of those that began before it was over.
        most: How many such calls there may be; None for any number.
    """

    under_way: frozenset[str] = frozenset()
    meanwhile: frozenset[str] = frozenset()
    most: int | None = None


@dataclass(frozen=True, slots=True)
class Times:
    """When what befell the deployment began and was over, in seconds of the monotonic clock."""

    begun: float
    over: float


def broken(outcomes: Sequence[Outcome], times: Times, cost: Cost) -> list[str]:
    """Returns the promises that were broken, each with an example."""
    found = [
        _told("a text is not that of its prompt, or not whole", [each for each in outcomes if each.wrong]),
        _told("a call ended long after it was due", [each for each in outcomes if each.ended > each.due + PROMPTLY]),
        _told("a call ended for no reason", [each for each in outcomes if not _allowed(each, times, cost)]),
    ]
    paid = [each for each in outcomes if not each.as_planned]
    if cost.most is not None and len(paid) > cost.most:
        found.append(_told(f"more than {cost.most} calls paid for it", paid))
    if not outcomes:
        found.append("no call was made")
    return [each for each in found if each]


def _allowed(outcome: Outcome, times: Times, cost: Cost) -> bool:
    if outcome.as_planned:
        return True
    if outcome.ended < times.begun:
        return False
    if outcome.begun < times.begun + AT_ONCE:
        return outcome.status in cost.under_way | cost.meanwhile
    return outcome.begun <= times.over and outcome.status in cost.meanwhile


def _told(what: str, outcomes: Iterable[Outcome]) -> str:
    those = list(outcomes)
    if not those:
        return ""
    first = those[0]
    example = (
        f"{first.client} {first.kind}, to {first.end}: {first.status} {first.reason} after "
        f"{first.ended - first.begun:.1f} s. {first.message} {first.wrong}"
    )
    return f"{what} ({len(those)} of them): {example.strip()}"
