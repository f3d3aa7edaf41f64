"""A TCP proxy on loopback that behaves like a bad network. One per link, run in a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import random
from dataclasses import dataclass
from typing import Any

from tests.support.server_thread import ServerThread

SEGMENT_BYTES = 1448
"""What one packet carries: loss strikes one of these."""
READ_BYTES = 64 * 1024
QUEUE_BYTES = 256 * 1024
"""What a slow link holds before it makes the sender wait."""


@dataclass(frozen=True, slots=True)
class Link:
    """How a link behaves, each way. ``delay_s`` and ``jitter_s``: one way. ``loss``: share of packets that are lost,
    which TCP hides and which costs everything behind such a packet another round trip. ``bytes_per_s``: 0 for no limit.
    ``corrupt_every``: of that many packets one has a byte changed, below TLS; 0 for none."""

    delay_s: float = 0.0
    jitter_s: float = 0.0
    loss: float = 0.0
    bytes_per_s: float = 0.0
    corrupt_every: int = 0


GOOD = Link()


class FaultProxy(ServerThread):
    """Forwards connections to ``127.0.0.1:target_port``.

    ``cut()`` aborts what is open and refuses what comes; ``blackhole()`` keeps connections open and delivers nothing;
    ``lose_connections()`` does that to the open ones for ever, and to no new one; ``shape()`` makes the link slow, long
    or faulty; ``heal()`` ends everything but what was lost.
    """

    def __init__(self, target_port: int, *, seed: int = 0) -> None:
        super().__init__()
        self._target_port = target_port
        self._refusing = False
        self._link = GOOD
        self._changed = asyncio.Event()
        self._dice = random.Random(seed)
        self._flowing = asyncio.Event()
        self._pairs: dict[asyncio.Task[Any], set[asyncio.StreamWriter]] = {}
        self._lost: set[asyncio.Task[Any]] = set()
        self.connections = 0
        self.corrupted = 0
        self.packets_lost = 0
        self.port = self._start()
        self._loop.call_soon_threadsafe(self._flowing.set)

    @property
    def open_connections(self) -> int:
        """How many connections are open now, the lost ones too."""
        return len(self._pairs)

    def cut(self) -> None:
        """Reset every connection, refuse new ones."""
        self._refusing = True

        async def abort() -> None:
            for pair in tuple(self._pairs.values()):
                for writer in pair:
                    writer.transport.abort()

        self._call(abort())

    def blackhole(self) -> None:
        """Deliver nothing more, in either direction, and say nothing about it."""
        self._loop.call_soon_threadsafe(self._flowing.clear)

    def lose_connections(self) -> None:
        """Half-open: neither end of what is open now hears from the other again; new connections work."""

        async def lose() -> None:
            self._lost.update(self._pairs)

        self._call(lose())

    def shape(self, link: Link) -> None:
        """Behave like this from now on, on open connections too."""
        self._loop.call_soon_threadsafe(self._become, link)

    def _become(self, link: Link) -> None:
        self._link = link
        self._changed.set()  # what is under way arrives as the new link has it
        self._changed = asyncio.Event()

    def heal(self) -> None:
        """Behave again."""
        self._refusing = False
        self.shape(GOOD)
        self._loop.call_soon_threadsafe(self._flowing.set)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._refusing:
            writer.transport.abort()
            return
        self.connections += 1
        try:
            target_reader, target_writer = await asyncio.open_connection("127.0.0.1", self._target_port)
        except OSError:
            writer.transport.abort()
            return
        task = asyncio.current_task()
        assert task is not None
        pair = self._pairs[task] = {writer, target_writer}
        try:
            async with asyncio.TaskGroup() as tasks:
                for source, target in ((reader, target_writer), (target_reader, writer)):
                    way = _Way()
                    tasks.create_task(self._take(source, way))
                    tasks.create_task(self._deliver(target, way, task))
        except* (OSError, asyncio.CancelledError):
            pass
        finally:
            del self._pairs[task]
            self._lost.discard(task)
            for one in pair:
                with contextlib.suppress(OSError):
                    one.transport.abort()

    async def _take(self, reader: asyncio.StreamReader, way: _Way) -> None:
        """Read as much as the link holds, and decide when and how each packet arrives."""
        while True:
            await way.room.wait()
            data = await reader.read(READ_BYTES)
            size = READ_BYTES if self._link is GOOD else SEGMENT_BYTES
            for start in range(0, len(data), size):
                await way.room.wait()
                packet, link = data[start : start + size], self._link
                way.put(self._spoilt(packet, link), self._delay_s(link), link, self._changed)
            if not data:
                way.put(b"", 0.0, GOOD, self._changed)
                return

    def _spoilt(self, packet: bytes, link: Link) -> bytes:
        if not link.corrupt_every or self._dice.random() >= 1 / link.corrupt_every:
            return packet
        self.corrupted += 1
        damaged = bytearray(packet)
        damaged[self._dice.randrange(len(damaged))] ^= self._dice.randint(1, 255)
        return bytes(damaged)

    def _delay_s(self, link: Link) -> float:
        delay_s = link.delay_s + self._dice.random() * link.jitter_s
        if link.loss and self._dice.random() < link.loss:
            self.packets_lost += 1
            delay_s += 2 * link.delay_s + 0.01
        return delay_s

    async def _deliver(self, writer: asyncio.StreamWriter, way: _Way, connection: asyncio.Task[Any]) -> None:
        loop = asyncio.get_running_loop()
        while True:
            arrives_at_s, data, changed = await way.get()
            if arrives_at_s > loop.time():
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout_at(arrives_at_s):
                        await changed.wait()
            await self._flowing.wait()
            if connection in self._lost:
                await loop.create_future()
            if not data:
                writer.close()
                return
            writer.write(data)
            await writer.drain()


class _Way:
    """What is under way in one direction of one connection."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[tuple[float, bytes, asyncio.Event]] = asyncio.Queue()
        self._bytes = 0
        self._free_at_s = self._arrives_at_s = 0.0
        self._changed: asyncio.Event | None = None
        self.room = asyncio.Event()
        self.room.set()

    def put(self, packet: bytes, delay_s: float, link: Link, changed: asyncio.Event) -> None:
        """Send a packet; an empty one is the end. It arrives at once when ``changed`` is set."""
        now_s = asyncio.get_running_loop().time()
        if changed is not self._changed:
            self._changed, self._free_at_s, self._arrives_at_s = changed, now_s, now_s
        self._free_at_s = max(self._free_at_s, now_s)
        if link.bytes_per_s:
            self._free_at_s += len(packet) / link.bytes_per_s
        self._arrives_at_s = max(self._arrives_at_s, self._free_at_s + delay_s)  # TCP delivers in order
        self._queue.put_nowait((self._arrives_at_s, packet, changed))
        self._bytes += len(packet)
        if self._bytes >= QUEUE_BYTES:
            self.room.clear()

    async def get(self) -> tuple[float, bytes, asyncio.Event]:
        """The next packet, and when it arrives."""
        found = await self._queue.get()
        self._bytes -= len(found[1])
        if self._bytes < QUEUE_BYTES:
            self.room.set()
        return found
