"""Follows servers: what each did since the scrape before, how its figures went, and what happened to it."""

import asyncio
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

from flywheel_client._top.exposition import Samples, read_samples, safe, split
from flywheel_client._top.figures import CALLS, CODE, ENDED_BY_CALLER, METHOD, Figures, Latency, figures_of, short_method
from flywheel_client._top.rates import Interval, interval, together
from flywheel_client._top.scraping import ScrapeError, scrape

MAX_EVENTS: Final = 200
MAX_EVENTS_OF_SCRAPE: Final = 5
"""The most events that one scrape adds, so that a server cannot push out the events of the others at once."""

SAME_EVENT_SECONDS: Final = 60.0

HISTORY_LENGTH: Final = 240
"""How many values a sparkline has at most."""

State = Literal["connecting", "up", "engine down", "restarted", "no answer"]


@dataclass(frozen=True)
class Event:
    """Something that happened to a server: when it last did, in seconds since the epoch, and how many times."""

    when: float
    address: str
    text: str
    times: int


class Events:
    """The latest events of all servers, newest first. An event that happens again within a minute is counted, not repeated."""

    def __init__(self) -> None:
        self._events: deque[Event] = deque(maxlen=MAX_EVENTS)

    def add(self, address: str, text: str, times: int = 1) -> None:
        """Adds an event that happened now, so many times."""
        now = time.time()
        for event in self._events:
            if (event.address, event.text) == (address, text) and event.when > now - SAME_EVENT_SECONDS:
                self._events.remove(event)
                times += event.times
                break
        self._events.appendleft(Event(now, address, text, times))

    def of(self, address: str | None) -> list[Event]:
        """Returns the events of a server, or of all if the address is None."""
        return [event for event in self._events if address in {None, event.address}]


@dataclass
class History:
    """How the figures of a sparkline went: one value for each scrape, None for a scrape without the figure."""

    calls: deque[float | None] = field(default_factory=lambda: deque(maxlen=HISTORY_LENGTH))
    tokens: deque[float | None] = field(default_factory=lambda: deque(maxlen=HISTORY_LENGTH))
    first_token: deque[float | None] = field(default_factory=lambda: deque(maxlen=HISTORY_LENGTH))
    per_token: deque[float | None] = field(default_factory=lambda: deque(maxlen=HISTORY_LENGTH))
    queue_wait: deque[float | None] = field(default_factory=lambda: deque(maxlen=HISTORY_LENGTH))

    def add(self, figures: Figures | None) -> None:
        """Adds the figures of a scrape; None if it gave none."""
        self.calls.append(figures.calls_per_second if figures else None)
        self.tokens.append(figures.generated_tokens_per_second if figures else None)
        self.first_token.append(_median(figures.first_token) if figures else None)
        self.per_token.append(_median(figures.per_token) if figures else None)
        self.queue_wait.append(_median(figures.queue_wait) if figures else None)


class Server:
    """A server, seen through its metrics.

    Attributes:
        address: The HOST:PORT of its metrics.
        state: How it is, as of the latest scrape.
        problem: Why it gave no metrics; empty if it did.
        interval: What the latest scrape found; None if it failed.
        figures: The same as figures.
        history: How its figures went.
    """

    def __init__(self, address: str, events: Events) -> None:
        self.address = address
        self.state: State = "connecting"
        self.problem = ""
        self.interval: Interval | None = None
        self.figures: Figures | None = None
        self.history = History()
        self._events = events
        self._before: tuple[float, Samples] | None = None

    async def poll(self) -> None:
        """Scrapes the server once. Does not raise if the server fails."""
        try:
            text = await scrape(self.address)
            now = time.monotonic()
            # In a thread, because a long text takes a while.
            samples, found, figures = await asyncio.to_thread(_read, text, now, self._before)
        except ScrapeError as error:
            self._become("no answer", safe(str(error)))
            self.interval = self.figures = None
        else:
            restarted = self._before is not None and found.seconds == 0
            self._before = now, samples
            self.interval, self.figures = found, figures
            self._become("restarted" if restarted else "engine down" if figures.engine_up is False else "up")
            self._note_failed_calls(found)
        self.history.add(self.figures)

    def _become(self, state: State, problem: str = "") -> None:
        is_expected = state == "up" and self.state in {"connecting", "restarted"}
        if (state, problem) != (self.state, self.problem) and not is_expected:
            self._events.add(self.address, f"{state}: {problem}" if problem else state)
        self.state, self.problem = state, problem

    def _note_failed_calls(self, found: Interval) -> None:
        """Makes events of the calls that failed in the interval, most frequent first."""
        failed: list[tuple[int, str]] = []
        for code, of_code in split(found.rates, (f"{CALLS}_count",), CODE).items():
            if code in ENDED_BY_CALLER:
                continue
            for method, of_method in split(of_code, (f"{CALLS}_count",), METHOD).items():
                times = round(sum(of_method[f"{CALLS}_count"].values()) * found.seconds)
                failed.append((times, f"{short_method(method)} {code}"))
        for times, text in sorted(failed, reverse=True)[:MAX_EVENTS_OF_SCRAPE]:
            if times:
                self._events.add(self.address, text, times)


class Servers:
    """The servers that are shown.

    Attributes:
        all: The servers, in the order of the command line.
        events: What happened to them.
        total_history: How the sums of their figures went.
    """

    def __init__(self, addresses: Iterable[str]) -> None:
        self.events = Events()
        self.all: Sequence[Server] = [Server(address, self.events) for address in dict.fromkeys(addresses)]
        self.total_history = History()
        self._scrapes: dict[Server, asyncio.Task[None]] = {}

    def total(self) -> Figures | None:
        """Returns the figures of all servers that answered, added up; None if none did."""
        found = [server.interval for server in self.all if server.interval is not None]
        return figures_of(together(found), len(found)) if found else None

    async def poll(self, max_wait: float | None = None) -> None:
        """Scrapes all servers once.

        Args:
            max_wait: The seconds to wait for slow servers; None waits for all. A slower scrape goes on, and its figures
                come with a later call.
        """
        for server in self.all:
            if server not in self._scrapes:
                self._scrapes[server] = asyncio.create_task(server.poll())
        await asyncio.wait(self._scrapes.values(), timeout=max_wait)
        for server, scrape_of_server in list(self._scrapes.items()):
            if scrape_of_server.done():
                del self._scrapes[server]
                scrape_of_server.result()


def _read(text: bytes, now: float, before: tuple[float, Samples] | None) -> tuple[Samples, Interval, Figures]:
    """Returns the samples of a scrape, and what happened since the scrape before.

    An interval of 0 seconds has no rates: there was no scrape before, or the server has restarted since.
    """
    samples = read_samples(text)
    found = (interval(before[1], samples, now - before[0]) if before else None) or Interval(0.0, samples, {})
    return samples, found, figures_of(found)


def _median(latency: Latency) -> float | None:
    return latency.p50.seconds if latency.p50 else None
