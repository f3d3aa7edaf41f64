"""A replicated store in memory with the real record codec and the real forest, and frames that travel in memory."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence

from consul_backend.errors import FenceLost, TooLarge
from consul_backend.merkle import Forest, entry_digest
from consul_backend.position import Position
from consul_backend.wal import GENESIS_PREV, Head, Record, Write
from consul_backend.wal_reader import RecordGone
from sidecar.replication.channel import ChannelClosed


class FakeClock:
    """Both clocks move by hand; ``skew_ms`` is what the wall clock is wrong by."""

    def __init__(self, skew_ms: int = 0) -> None:
        self.now_s = 1000.0
        self.skew_ms = skew_ms

    def monotonic(self) -> float:
        return self.now_s

    def time_ms(self) -> int:
        return int(self.now_s * 1000) + 1_700_000_000_000 + self.skew_ms


LARGE_BYTES = 10_000


class Crash(Exception):
    """The process dies here."""


class MemoryStore:
    """What replication needs of a store. ``hook(name)`` is called at "before" and "after" each commit and may raise."""

    def __init__(self, writer: str = "node", writes_max: int = 61) -> None:
        self.writer = writer
        self.writes_max = writes_max
        self.data: dict[str, bytes] = {}
        self.forest = Forest()
        self.positions: dict[str, Position] = {}
        self.log: list[Record] = []
        self.oldest_index = 1
        self.holds: dict[str, int] = {}
        self.hook: Callable[[str], None] = lambda name: None
        self.tenure = 1
        self.deposed = False
        self.reads = 0
        self.reading: list[str] = []
        self.read_together: list[tuple[str, ...]] = []
        self._grown = asyncio.Event()
        self._append([], "genesis")
        self.inherited = self.head

    @property
    def head(self) -> Head:
        last = self.log[-1]
        return Head(last.index, last.chain_hash, last.header.time_ms)

    async def exists(self, key: str) -> bool:
        return await self.get(key) is not None

    async def require_tenure(self) -> None:
        if self.deposed:
            raise FenceLost("another tenure leads")

    def put_back(self, index: int) -> None:
        """As after an old snapshot was restored underneath: the log ends at ``index``, and another tenure begins."""
        self.log = self.log[:index]
        self.positions = dict(self.log[-1].header.positions)
        self.data, self.forest = {}, Forest()
        for record in self.log:
            for write in record.writes():
                self.data.pop(write.key, None)
                if write.value is not None:
                    self.data[write.key] = write.value
        self.forest.apply((key, entry_digest(key, value)) for key, value in self.data.items())
        self.inherited = self.head
        self.tenure += 1
        self._append([], "tenure")

    async def get(self, key: str) -> bytes | None:
        self.reading.append(key)
        self.read_together.append(tuple(self.reading))
        await asyncio.sleep(0)
        self.reading.remove(key)
        return self.data.get(key)

    async def get_many(self, keys: Sequence[str]) -> list[bytes | None]:
        return list(await asyncio.gather(*[self.get(key) for key in keys]))

    def may_be_large(self, key: str) -> bool:
        return len(self.data.get(key, b"")) > LARGE_BYTES

    async def commit(self, writes: Sequence[Write], *, positions: Mapping[str, Position] | None = None) -> Head:
        if len({write.key for write in writes}) > self.writes_max:
            raise TooLarge(f"{len(writes)} writes, {self.writes_max} fit")
        self.hook("before")
        await asyncio.sleep(0)
        self.positions |= positions or {}
        self._append(writes, "data")
        await asyncio.sleep(0)
        self.hook("after")
        return self.head

    def write(self, *pairs: tuple[str, bytes | None]) -> None:
        """A commit without an await, as if others had written."""
        self._append([Write(key, value) for key, value in pairs], "data")

    def _append(self, writes: Sequence[Write], kind: str) -> None:
        groups: dict[tuple[str, str], list[tuple[str, bytes | None]]] = {}
        for write in {write.key: write for write in writes}.values():
            cls, partition, path = write.key.split("/", 2)
            groups.setdefault((cls, partition), []).append((path, write.value))
            if write.value is None:
                self.data.pop(write.key, None)
            else:
                self.data[write.key] = write.value
            digest = None if write.value is None else entry_digest(write.key, write.value)
            self.forest.apply([(write.key, digest)])
        index = len(self.log) + 1
        record = Record.build(
            index=index,
            prev_hash=self.log[-1].chain_hash if self.log else GENESIS_PREV,
            epoch=self.tenure,
            writer=self.writer,
            batch_id=index.to_bytes(16, "big"),
            time_ms=index,
            kind=kind,
            positions=self.positions,
            groups=groups,
        )
        self.log.append(record)
        self._grown.set()
        self._grown = asyncio.Event()

    async def rooted(self) -> None:
        pass

    async def load_index(self, cls: str | None = None) -> None:
        pass

    async def wait_head(self, after: int) -> Head:
        while self.head.index <= after:
            await self._grown.wait()
        return self.head

    async def records(self, start: int, limit: int) -> list[Record]:
        self.reads += 1
        if start < self.oldest_index:
            raise RecordGone(f"record {start} was collected")
        return self.log[start - 1 : start - 1 + limit]

    def hold(self, name: str, index: int) -> None:
        self.holds[name] = index

    def unhold(self, name: str) -> None:
        self.holds.pop(name, None)

    def replicated(self) -> dict[str, bytes]:
        """The entries of class r."""
        return self.of_classes(("r",))

    def of_classes(self, classes: Collection[str]) -> dict[str, bytes]:
        """The entries of these classes."""
        return {key: value for key, value in self.data.items() if key.split("/", 1)[0] in classes}

    def fold(self, index: int) -> dict[str, bytes]:
        """What class r was at record ``index``, from the log alone."""
        state: dict[str, bytes] = {}
        for record in self.log[:index]:
            for write in record.writes():
                if write.key.startswith("r/"):
                    state.pop(write.key, None)
                    if write.value is not None:
                        state[write.key] = write.value
        return state


class MemoryChannel:
    """One end of a pair. ``tamper(frame)`` of the sending end may change, drop ([]) or multiply what it sends."""

    def __init__(self) -> None:
        self.peer: MemoryChannel = self
        self.tamper: Callable[[bytes], list[bytes]] = lambda frame: [frame]
        self._frames: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.closed = ""
        self.silence_s = float("inf")
        self.blocked: asyncio.Event | None = None

    async def send(self, frame: bytes) -> None:
        if self.closed:
            raise ChannelClosed(self.closed)
        if self.blocked is not None:
            await self.blocked.wait()
        for part in self.tamper(frame):
            self.peer._frames.put_nowait(part)
        await asyncio.sleep(0)

    async def recv(self) -> bytes:
        if self.closed and self._frames.empty():
            raise ChannelClosed(self.closed)
        frame = await self._frames.get()
        if frame is None:
            raise ChannelClosed(self.closed)
        return frame

    def silent_s(self) -> float:
        return self.silence_s

    async def close(self, reason: str) -> None:
        for end in (self, self.peer):
            if not end.closed:
                end.closed = reason or "closed"
                end._frames.put_nowait(None)


def channel_pair() -> tuple[MemoryChannel, MemoryChannel]:
    """Two ends; what one sends the other receives."""
    one, other = MemoryChannel(), MemoryChannel()
    one.peer, other.peer = other, one
    return one, other
