"""Which streams write: all at once while there is nothing to wait for, then one after the other, new streams first."""

import asyncio
from collections import Counter

from flywheel_server.delivery import Delivery, DeltaBuffer, ReaderPolicy
from flywheel_server.engines.base import Event, Sink, Started, TextDelta
from flywheel_server.write_scheduler import WRITES_PER_ITERATION, WriteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.server.test_delivery import Reader, Source, finished

POLICY = ReaderPolicy(max_bytes=1_000_000, when_full="wait", timeout=60)


class Queue:
    """Streams that want to write, and the iteration of the event loop in which each was permitted."""

    def __init__(self) -> None:
        self.scheduler = WriteScheduler()
        self.granted: dict[str, int] = {}
        self.order: list[str] = []
        self.iteration = 0
        self._waiting: list[tuple[str, asyncio.Future[None]]] = []

    def request(self, name: str, *, is_first: bool = False) -> None:
        permission = asyncio.get_running_loop().create_future()
        self.scheduler.request(permission, is_first=is_first)
        self._note(name, permission)
        self._waiting.append((name, permission))

    def _note(self, name: str, permission: asyncio.Future[None]) -> None:
        if permission.done() and name not in self.granted:
            self.granted[name] = self.iteration
            self.order.append(name)

    async def next_iteration(self) -> None:
        await asyncio.sleep(0)
        self.iteration += 1
        for name, permission in self._waiting:
            self._note(name, permission)
        self._waiting = [(name, permission) for name, permission in self._waiting if not permission.done()]


@settings(deadline=None)
@given(st.lists(st.lists(st.booleans(), max_size=3 * WRITES_PER_ITERATION), max_size=6))
def test_each_writes_once_and_new_streams_come_first(asked: list[list[bool]]) -> None:
    async def run() -> None:
        streams = Queue()
        when: dict[str, int] = {}
        new: set[str] = set()
        for number, batch in enumerate(asked):
            for each, is_first in enumerate(batch):
                name = f"{number}-{each}"
                when[name] = streams.iteration
                if is_first:
                    new.add(name)
                streams.request(name, is_first=is_first)
            await streams.next_iteration()
        for _ in range(len(when) // WRITES_PER_ITERATION + 2):
            await streams.next_iteration()
        assert streams.granted.keys() == when.keys()
        assert max(Counter(streams.granted.values()).values(), default=0) <= WRITES_PER_ITERATION
        for kind in (new, when.keys() - new):
            of_kind = [name for name in streams.order if name in kind]
            assert of_kind == sorted(of_kind, key=lambda name: tuple(map(int, name.split("-")))), "first come, first served"
        for name in new:
            waited = streams.granted[name] - when[name]
            ahead = sum(other in new and when[other] <= when[name] for other in when)
            assert waited <= 1 + ahead // (WRITES_PER_ITERATION - 1), (
                "but for one permission, only other new streams are served before"
            )

    asyncio.run(run())


async def test_no_number_of_new_streams_stops_running_streams() -> None:
    streams = Queue()
    for number in range(WRITES_PER_ITERATION):
        streams.request(f"busy-{number}")
    running = [f"running-{number}" for number in range(5)]
    for name in running:
        streams.request(name)
    for number in range(len(running)):
        for each in range(2 * WRITES_PER_ITERATION):
            streams.request(f"new-{number}-{each}", is_first=True)
        await streams.next_iteration()
        await streams.next_iteration()
    assert streams.granted.keys() >= set(running)


async def test_while_there_is_room_everybody_writes_at_once() -> None:
    streams = Queue()
    for _ in range(3):
        for number in range(WRITES_PER_ITERATION):
            name = f"{streams.iteration}-{number}"
            streams.request(name)
            assert streams.granted[name] == streams.iteration
        await streams.next_iteration()


async def test_a_call_that_has_ended_does_not_write() -> None:
    scheduler = WriteScheduler()
    loop = asyncio.get_running_loop()
    waiting = [loop.create_future() for _ in range(3 * WRITES_PER_ITERATION)]
    for permission in waiting:
        scheduler.request(permission, is_first=False)
    for permission in waiting[WRITES_PER_ITERATION : 2 * WRITES_PER_ITERATION]:
        permission.cancel()
    await asyncio.sleep(0)
    assert all(permission.done() for permission in waiting)


class Stream(Source):
    """A generation whose events the test emits, and which ends when the test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.sink: asyncio.Future[Sink] = asyncio.get_running_loop().create_future()
        self.over = asyncio.Event()

    async def run(self, sink: Sink) -> None:
        sink.emit(Started())
        self.sink.set_result(sink)
        await self.over.wait()

    def send(self, event: Event) -> None:
        self.sink.result().emit(event)


action = st.tuples(st.sampled_from(["token", "read", "loop"]), st.integers(0, 2), st.text("aé🦙", max_size=3))


@settings(deadline=None)
@given(st.lists(action, max_size=60))
def test_whatever_the_pace_each_reader_gets_the_text_in_order(actions: list[tuple[str, int, str]]) -> None:
    async def run() -> None:
        delivery = Delivery(POLICY)
        streams = [Stream() for _ in range(3)]
        readers = [Reader() for _ in streams]
        texts = ["" for _ in streams]
        delivering = [
            asyncio.create_task(delivery.deliver(stream, DeltaBuffer(), reader.begin, reader.write))
            for stream, reader in zip(streams, readers, strict=True)
        ]
        await asyncio.gather(*(stream.sink for stream in streams))
        for number, (action, index, text) in enumerate(actions, start=1):
            if action == "token" and text:
                texts[index] += text
                streams[index].send(TextDelta(0, text, number))
            elif action == "read":
                readers[index].may_read()
            else:
                await asyncio.sleep(0)
        for stream, reader, text in zip(streams, readers, texts, strict=True):
            reader.may_read(100)
            stream.send(finished(0, text))
            stream.over.set()
        await asyncio.gather(*delivering)
        for reader, text in zip(readers, texts, strict=True):
            assert "".join(message.text for message in reader.read) == text
            assert [bool(message.finish_reason) for message in reader.read] == [False] * (len(reader.read) - 1) + [True]
            counts = [message.generated_tokens for message in reader.read[:-1]]
            assert counts == sorted(set(counts))

    asyncio.run(run())


async def test_nothing_is_held_while_the_event_loop_is_idle() -> None:
    delivery = Delivery(POLICY)
    streams = [Stream() for _ in range(2 * WRITES_PER_ITERATION)]
    readers = [Reader() for _ in streams]
    for reader in readers:
        reader.may_read(100)
    delivering = [
        asyncio.create_task(delivery.deliver(stream, DeltaBuffer(), reader.begin, reader.write))
        for stream, reader in zip(streams, readers, strict=True)
    ]
    await asyncio.gather(*(stream.sink for stream in streams))
    for number in range(1, 4):
        for stream in streams:
            stream.send(TextDelta(0, "x", number))
        # Iterations in which all are permitted, and for the writing itself.
        for _ in range(8):
            await asyncio.sleep(0)
        assert [len(reader.read) for reader in readers] == [number] * len(readers), "each on its own"
    for each in delivering:
        each.cancel()
    await asyncio.gather(*delivering, return_exceptions=True)


async def test_a_new_stream_writes_before_running_streams() -> None:
    delivery = Delivery(POLICY)
    old = [Stream() for _ in range(20 * WRITES_PER_ITERATION)]
    new, reader = Stream(), Reader()
    everybody = Reader()
    everybody.may_read(10_000)
    reader.may_read()
    delivering = [
        asyncio.create_task(delivery.deliver(each, DeltaBuffer(), everybody.begin_again, everybody.write)) for each in old
    ]
    await asyncio.gather(*(stream.sink for stream in old))
    for stream in old:
        stream.send(TextDelta(0, "x", 1))
    for _ in range(60):
        await asyncio.sleep(0)
    assert len(everybody.read) == len(old)
    for stream in old:
        stream.send(TextDelta(0, "y", 2))
    delivering.append(asyncio.create_task(delivery.deliver(new, DeltaBuffer(), reader.begin, reader.write)))
    await new.sink
    new.send(TextDelta(0, "z", 1))
    for _ in range(6):
        await asyncio.sleep(0)
    assert [message.text for message in reader.read] == ["z"]
    assert len(everybody.read) < 1.5 * len(old), "most of the others still wait"
    for each in delivering:
        each.cancel()
    await asyncio.gather(*delivering, return_exceptions=True)
