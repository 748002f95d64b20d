"""Enforces the quotas of each caller: samples at a time, and tokens per minute."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from flywheel_server.access.callers import Caller
from flywheel_server.engines.base import OutputEvent
from flywheel_server.errors import QuotaExceededError
from flywheel_server.messages import GenerationRequest, GenerationResponseSample

MINUTE: Final = 60.0
"""Seconds."""


def max_generated_tokens(request: GenerationRequest) -> int:
    """Returns how many tokens the request may generate at most, over all samples."""
    return request.num_samples * request.max_tokens


class Usage:
    """Counts the tokens of one call: its prompt once, and the generated tokens of each sample."""

    def __init__(self) -> None:
        self._prompt_tokens = 0
        self._generated: dict[int, int] = {}
        self._work: asyncio.Future[Any] | None = None
        """Work for the call that may outlast it."""

    @property
    def tokens(self) -> int:
        """All tokens so far. Those of the prompt are included once the engine has reported their number."""
        return self._prompt_tokens + self.generated_tokens

    @property
    def prompt_tokens(self) -> int:
        """The number of tokens in the prompt; 0 until the engine has reported it."""
        return self._prompt_tokens

    @property
    def generated_tokens(self) -> int:
        """The tokens that were generated so far, of all samples."""
        return sum(self._generated.values())

    def set_prompt_tokens(self, prompt_tokens: int) -> None:
        """Sets the number of tokens in the prompt; 0 if the engine does not know it yet."""
        self._prompt_tokens = prompt_tokens

    def extend_until_done(self, work: asyncio.Future[Any]) -> None:
        """Keeps the reservation of the call until the future is done, even if the call ends before."""
        self._work = work

    @property
    def is_final(self) -> bool:
        """Whether no work outlasts the call, so that the count is final when the call has ended."""
        return self._work is None or self._work.done()

    def call_when_final(self, callback: Callable[[], None]) -> None:
        """Calls back once the count is final; to be used when the call has ended."""
        if self._work is None or self._work.done():
            callback()
        else:
            self._work.add_done_callback(lambda _: callback())

    def count(self, event: OutputEvent) -> None:
        """Counts the tokens of an event: the counts in an event are totals of its sample."""
        self._generated[event.index] = event.generated_tokens
        if isinstance(event, GenerationResponseSample):
            self._prompt_tokens = event.prompt_tokens


@dataclass(slots=True)
class _Bucket:
    """A token bucket that holds one minute's quota. May be negative: prompts are deducted later, when their length is known."""

    tokens: float
    refilled_at: float


class Quotas:
    """Enforces the quotas of all callers.

    A call reserves all the tokens that it may generate, up to one minute's quota, and returns the unused ones when it ends. So
    concurrent calls together exceed the quota only by their prompts, and by what each generates beyond one minute's quota.

    Arguments:
        service_time: Returns the service time of the caller with this name, in seconds.
        clock: Returns monotonic seconds.
    """

    def __init__(self, service_time: Callable[[str], float], clock: Callable[[], float] = time.monotonic) -> None:
        self._service_time = service_time
        self._clock = clock
        self._samples: dict[str, int] = {}
        self._buckets: dict[str, _Bucket] = {}

    def reserve(self, caller: Caller, samples: int, tokens: int) -> int:
        """Reserves samples and at most one minute's tokens. Returns the number of reserved tokens.

        Raises:
            QuotaExceededError: The quotas do not allow the call now.
        """
        total = self._samples.get(caller.name, 0) + samples
        limit = caller.max_concurrent
        if limit is not None and total > limit:
            # `limit` running samples end every service_time seconds. A call with more samples than `limit` is never allowed.
            delay = self._service_time(caller.name) * samples / limit if samples <= limit else None
            raise QuotaExceededError(caller.name, f"max_concurrent {limit}", delay)
        reserved = self._reserve_tokens(caller, tokens)
        self._samples[caller.name] = total
        return reserved

    def settle(self, caller: Caller, samples: int, unused_tokens: int) -> None:
        """Gives back the samples of a call and its unused tokens. These are negative if it used more than it reserved."""
        self._samples[caller.name] -= samples
        if not self._samples[caller.name]:
            del self._samples[caller.name]
        if caller.tokens_per_minute is not None:
            self._buckets[caller.name].tokens += unused_tokens

    def _reserve_tokens(self, caller: Caller, tokens: int) -> int:
        limit = caller.tokens_per_minute
        if limit is None:
            return 0
        reserved = min(tokens, limit)
        now = self._clock()
        bucket = self._buckets.setdefault(caller.name, _Bucket(limit, now))
        bucket.tokens = min(bucket.tokens + (now - bucket.refilled_at) * limit / MINUTE, limit)
        bucket.refilled_at = now
        if bucket.tokens < reserved:
            raise QuotaExceededError(caller.name, f"tokens_per_minute {limit}", (reserved - bucket.tokens) * MINUTE / limit)
        bucket.tokens -= reserved
        return reserved


class Reservation:
    """A context that counts one call against the caller's quotas, and gets the `Usage` of the call.

    The reservation is settled at the end of the context, or later if `Usage.extend_until_done` says so. Entering the context
    raises the `QuotaExceededError` of `Quotas.reserve`.

    `slots` are the slots that the call takes in the engine, by default one for each sample. They count as samples at a time.
    """

    def __init__(self, quotas: Quotas, caller: Caller, request: GenerationRequest, slots: int | None = None) -> None:
        self._quotas = quotas
        self._caller = caller
        self._slots = request.num_samples if slots is None else slots
        self._max_tokens = max_generated_tokens(request)
        self._usage = Usage()

    def __enter__(self) -> Usage:
        self._reserved = self._quotas.reserve(self._caller, self._slots, self._max_tokens)
        return self._usage

    def __exit__(self, *_: object) -> None:
        self._usage.call_when_final(self._settle)

    def _settle(self) -> None:
        self._quotas.settle(self._caller, self._slots, self._reserved - self._usage.tokens)
