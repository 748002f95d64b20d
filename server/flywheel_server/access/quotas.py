"""What each caller may have: samples at a time, and tokens per minute."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from flywheel_server.access.callers import Caller
from flywheel_server.engines.base import TextDelta
from flywheel_server.errors import QuotaExceededError
from flywheel_server.messages import GenerationRequest, GenerationResponseSample

MINUTE: Final = 60.0


def tokens_wanted(request: GenerationRequest) -> int:
    """Returns how many tokens the request may generate."""
    return request.num_samples * request.max_tokens


class Usage:
    """The tokens that one call has cost so far: its prompt once, and what was generated of each sample."""

    def __init__(self) -> None:
        self._prompt_tokens = 0
        self._generated: dict[int, int] = {}
        self._work: asyncio.Future[Any] | None = None

    @property
    def tokens(self) -> int:
        """All of them. Those of the prompt count as soon as the engine tells how many they are."""
        return self._prompt_tokens + sum(self._generated.values())

    def begin(self, prompt_tokens: int) -> None:
        """Sets how many tokens of the prompt the engine reads; 0 if it does not know."""
        self._prompt_tokens = prompt_tokens

    def lasts(self, work: asyncio.Future[Any]) -> None:
        """Makes the call count as at work until the future is done, even if the call itself ends before."""
        self._work = work

    @property
    def is_over(self) -> bool:
        """Whether nothing works for the call any more, once the call itself has ended."""
        return self._work is None or self._work.done()

    def call_when_over(self, callback: Callable[[], None]) -> None:
        """Calls back as soon as nothing works for the call any more."""
        if self._work is None or self._work.done():
            callback()
        else:
            self._work.add_done_callback(lambda _: callback())

    def count(self, event: TextDelta | GenerationResponseSample) -> None:
        """Counts the tokens of an event of the call."""
        self._generated[event.index] = event.generated_tokens
        if isinstance(event, GenerationResponseSample):
            self._prompt_tokens = event.prompt_tokens


@dataclass(slots=True)
class _Bucket:
    """Fills up with the tokens of a minute, and holds no more. Prompts, whose length is known late, may empty it below 0."""

    tokens: float
    filled: float


class Quotas:
    """Holds callers to their quotas.

    A call takes all the tokens that it may generate, but no more than a minute's, and gives back what it has not used. So many
    calls at a time cannot together exceed the quota by more than their prompts.

    Arguments:
        service_time: Returns the seconds that a call of the caller with this name takes at present.
        clock: Seconds that only ever increase.
    """

    def __init__(self, service_time: Callable[[str], float], clock: Callable[[], float] = time.monotonic) -> None:
        self._service_time = service_time
        self._clock = clock
        self._samples: dict[str, int] = {}
        self._buckets: dict[str, _Bucket] = {}

    def held(self, caller: Caller, request: GenerationRequest) -> "Holding":
        """Counts the call against the caller's quotas for as long as it lasts; what it uses is to be told to `Usage`.

        It lasts for the length of the context, and as long as `Usage.lasts` says. Entering the context raises
        `QuotaExceededError` if the caller has no room for it now.
        """
        return Holding(self, caller, request)

    def take(self, caller: Caller, samples: int, tokens: int) -> int:
        """Takes what a call may need, and returns how many of the tokens were taken; see `held`."""
        self._check_samples(caller, samples)
        taken = self._take_tokens(caller, tokens)
        self._samples[caller.name] = self._samples.get(caller.name, 0) + samples
        return taken

    def settle(self, caller: Caller, samples: int, unused_tokens: int) -> None:
        """Gives back what a call had taken, except for the tokens that it has used."""
        self._samples[caller.name] -= samples
        if not self._samples[caller.name]:
            del self._samples[caller.name]
        if caller.tokens_per_minute is not None:
            self._buckets[caller.name].tokens += unused_tokens

    def _check_samples(self, caller: Caller, samples: int) -> None:
        limit = caller.max_concurrent
        if limit is not None and self._samples.get(caller.name, 0) + samples > limit:
            # One of `limit` calls ends every service_time / limit seconds. A call with more samples than that never fits.
            delay = self._service_time(caller.name) * samples / limit if samples <= limit else None
            raise QuotaExceededError(caller.name, f"max_concurrent {limit}", delay)

    def _take_tokens(self, caller: Caller, tokens: int) -> int:
        limit = caller.tokens_per_minute
        if limit is None:
            return 0
        taken = min(tokens, limit)
        now = self._clock()
        bucket = self._buckets.setdefault(caller.name, _Bucket(limit, now))
        bucket.tokens = min(bucket.tokens + (now - bucket.filled) * limit / MINUTE, limit)
        bucket.filled = now
        if bucket.tokens < taken:
            raise QuotaExceededError(caller.name, f"tokens_per_minute {limit}", (taken - bucket.tokens) * MINUTE / limit)
        bucket.tokens -= taken
        return taken


class Holding:
    """What a call holds of its caller's quotas for the length of a context, which gets the `Usage` of the call."""

    def __init__(self, quotas: Quotas, caller: Caller, request: GenerationRequest) -> None:
        self._quotas = quotas
        self._caller = caller
        self._request = request
        self._usage = Usage()

    def __enter__(self) -> Usage:
        self._taken = self._quotas.take(self._caller, self._request.num_samples, tokens_wanted(self._request))
        return self._usage

    def __exit__(self, *_: object) -> None:
        self._usage.call_when_over(self._settle)

    def _settle(self) -> None:
        self._quotas.settle(self._caller, self._request.num_samples, self._taken - self._usage.tokens)
