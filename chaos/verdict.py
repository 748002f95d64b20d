"""Checks the outcomes of calls against the promises that hold whatever fails, and against a scenario's cost."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from chaos.load import Outcome

MAX_OVERDUE_SECONDS: Final = 3.0
"""Seconds after its deadline or its cancellation within which a call must have ended, even on a loaded machine."""
REACTION_SECONDS: Final = 0.5
"""Maximum seconds between a failure in a container and the moment when callers see it."""


@dataclass(frozen=True, slots=True)
class Cost:
    """The calls that a scenario may make fail.

    Attributes:
        running: The statuses with which calls may fail that were running when the disruption began.
        during: The statuses with which calls may fail that began before the disruption was over.
        max_calls: Maximum number of failed calls; None for any number.
    """

    running: frozenset[str] = frozenset()
    during: frozenset[str] = frozenset()
    max_calls: int | None = None


@dataclass(frozen=True, slots=True)
class Times:
    """When the disruption of the deployment began and was over, in seconds of the monotonic clock."""

    begun: float
    over: float


def broken_promises(outcomes: Sequence[Outcome], times: Times, cost: Cost) -> list[str]:
    """Returns the promises that were broken, each with an example."""
    overdue = [each for each in outcomes if each.ended > each.due + MAX_OVERDUE_SECONDS]
    found = [
        _described("a text is wrong, or not complete", [each for each in outcomes if each.wrong]),
        _described("a call ended long after it was due", overdue),
        _described("a call failed without a reason", [each for each in outcomes if not _is_allowed(each, times, cost)]),
    ]
    failed = [each for each in outcomes if not each.as_planned]
    if cost.max_calls is not None and len(failed) > cost.max_calls:
        found.append(_described(f"more than {cost.max_calls} calls failed", failed))
    if not outcomes:
        found.append("no call was made")
    return [each for each in found if each]


def _is_allowed(outcome: Outcome, times: Times, cost: Cost) -> bool:
    if outcome.as_planned:
        return True
    if outcome.ended < times.begun:
        return False
    if outcome.begun < times.begun + REACTION_SECONDS:
        return outcome.status in cost.running | cost.during
    return outcome.begun <= times.over and outcome.status in cost.during


def _described(problem: str, outcomes: Sequence[Outcome]) -> str:
    """Returns the problem with the number of its outcomes and an example; empty if there are no outcomes."""
    if not outcomes:
        return ""
    first = outcomes[0]
    example = (
        f"{first.client} {first.kind}, to {first.end}: {first.status} {first.reason} after "
        f"{first.ended - first.begun:.1f} s. {first.message} {first.wrong}"
    )
    return f"{problem} ({len(outcomes)} calls): {example.strip()}"
