"""Between a node and its Consul: an HTTP proxy that keeps what was written, and misbehaves one request at a time.

What it keeps is what Consul answered, also where the node never learns it, so that a run can be judged in the order in
which Consul applied things (``verdict.py``). One per node; a thread of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from tests.support.server_thread import ServerThread

_WRITES = re.compile(rb'"Verb":"(?:set|cas|lock|unlock|delete|delete-tree)"')
_HEAD_END = b"\r\n\r\n"

FAULTS = ("lose-answer", "swallow", "land-late", "delay")


def is_write(body: bytes) -> bool:
    """A transaction that changes something."""
    return _WRITES.search(body) is not None


def is_commit(body: bytes) -> bool:
    """A fenced transaction with a record of the log."""
    return b'"Verb":"check-session"' in body and b"/wal/" in body and b'"Verb":"cas"' in body


def is_acquire(body: bytes) -> bool:
    """A transaction that takes the lock."""
    return b'"Verb":"lock"' in body and b'"Verb":"cas"' in body


def is_flush(body: bytes) -> bool:
    """A fenced transaction that stores a part of the index."""
    return b'"Verb":"check-session"' in body and b"/checkpoint" in body


@dataclass(slots=True, eq=False)
class Exchange:
    """One writing transaction. ``status`` is 0 while Consul has not answered. ``order``: of answers over all taps.
    Times are on this process's monotonic clock."""

    node: str
    body: bytes
    sent_s: float
    status: int = 0
    answer: bytes = b""
    order: int = 0
    answered_s: float = float("inf")


@dataclass(slots=True, eq=False)
class Fault:
    """Of the next ``count`` transactions that match: ``lose-answer`` (applied, never answered), ``swallow`` (never
    sent), ``land-late`` (the sender is cut off, the request arrives ``for_s`` later), ``delay`` (by ``for_s``). Every
    ``every``-th one."""

    kind: str
    matches: Callable[[bytes], bool]
    count: int
    for_s: float
    every: int
    seen: int = 0


class ConsulTap(ServerThread):
    """Forwards to the Consul at ``target`` (host:port); give its ``address`` to the node ``name``."""

    _orders = 0

    def __init__(self, name: str, target: str) -> None:
        super().__init__()
        self.name = name
        self.exchanges: list[Exchange] = []
        self.done: Counter[str] = Counter()
        self.open = 0
        self.open_peak = 0
        self._host, port = target.rsplit(":", 1)
        self._port = int(port)
        self._faults: list[Fault] = []
        self._refusing = False
        self._clients: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._flowing, self._reading = asyncio.Event(), asyncio.Event()
        self.address = f"127.0.0.1:{self._start()}"
        self.heal()

    # -- faults

    def inject(
        self,
        kind: str,
        *,
        matches: Callable[[bytes], bool] = is_commit,
        count: int = 1,
        for_s: float = 0.0,
        every: int = 1,
    ) -> Fault:
        """See :class:`Fault`; ``count`` goes down to 0 as it happens."""
        if kind not in FAULTS:
            raise ValueError(f"no such fault: {kind}")
        fault = Fault(kind, matches, count, for_s, every)
        self._faults.append(fault)
        return fault

    def clear(self) -> None:
        """Forget faults that have not happened."""
        self._faults.clear()

    def cut(self) -> None:
        """Reset every connection, refuse new ones."""
        self._refusing = True

        async def abort() -> None:
            for writer in tuple(self._clients):
                writer.transport.abort()

        self._call(abort())

    def blackhole(self) -> None:
        """Take everything, deliver nothing in either direction; what was taken arrives when it heals."""
        self._loop.call_soon_threadsafe(self._flowing.clear)

    def half_open(self) -> None:
        """Accept connections and read nothing more from any."""
        self._loop.call_soon_threadsafe(self._reading.clear)

    def heal(self) -> None:
        """Behave again."""
        self._refusing = False
        self._loop.call_soon_threadsafe(self._flowing.set)
        self._loop.call_soon_threadsafe(self._reading.set)

    # -- inside

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._refusing:
            writer.transport.abort()
            return
        self._clients.add(writer)
        self.open += 1
        self.open_peak = max(self.open_peak, self.open)
        upstream = _Upstream(self._host, self._port)
        try:
            await self._converse(reader, writer, upstream)
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self.open -= 1
            self._clients.discard(writer)
            upstream.abort()
            writer.transport.abort()

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, upstream: _Upstream) -> None:
        first = b""
        while True:
            await self._reading.wait()
            head, body = await _read_message(reader, first)
            exchange = self._noted(head, body)
            fault = self._fault(body) if exchange is not None else None
            await self._flowing.wait()
            if fault is not None and fault.kind == "swallow":
                return
            if fault is not None and fault.kind == "land-late":
                self._later(fault.for_s, head + body, exchange)
                return
            if fault is not None and fault.kind == "delay":
                await asyncio.sleep(fault.for_s)
            answering = asyncio.ensure_future(upstream.ask(head + body))
            leaving = asyncio.ensure_future(reader.read(1))
            try:
                await asyncio.wait([answering, leaving], return_when=asyncio.FIRST_COMPLETED)
                if leaving.done() and not leaving.result() and exchange is None:
                    return  # nobody waits for this read any more
                answer_head, answer = await answering
                self._note_answer(exchange, answer_head, answer)
                await self._flowing.wait()
                if fault is not None and fault.kind == "lose-answer":
                    return
                writer.write(answer_head + answer)
                await writer.drain()
                first = await leaving
                if not first:
                    return
            finally:
                for task in (answering, leaving):
                    task.cancel()
                await asyncio.gather(answering, leaving, return_exceptions=True)

    def _noted(self, head: bytes, body: bytes) -> Exchange | None:
        if not head.startswith(b"PUT /v1/txn") or not is_write(body):
            return None
        exchange = Exchange(self.name, body, time.monotonic())
        self.exchanges.append(exchange)
        return exchange

    def _note_answer(self, exchange: Exchange | None, head: bytes, answer: bytes) -> None:
        if exchange is not None:
            ConsulTap._orders += 1
            exchange.status, exchange.answer = int(head.split(b" ", 2)[1]), _unchunked(head, answer)
            exchange.order, exchange.answered_s = ConsulTap._orders, time.monotonic()

    def _fault(self, body: bytes) -> Fault | None:
        for fault in tuple(self._faults):
            if fault.matches(body):
                fault.seen += 1
                if fault.seen % fault.every:
                    continue
                fault.count -= 1
                if fault.count <= 0:
                    with contextlib.suppress(ValueError):
                        self._faults.remove(fault)
                self.done[fault.kind] += 1
                return fault
        return None

    def _later(self, for_s: float, request: bytes, exchange: Exchange | None) -> None:
        async def land() -> None:
            await asyncio.sleep(for_s)
            upstream = _Upstream(self._host, self._port)
            try:
                self._note_answer(exchange, *await upstream.ask(request))
            except (OSError, asyncio.IncompleteReadError):
                pass
            finally:
                upstream.abort()

        task = self._loop.create_task(land())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class _Upstream:
    def __init__(self, host: str, port: int) -> None:
        self._address = (host, port)
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, request: bytes) -> tuple[bytes, bytes]:
        if self._streams is None:
            self._streams = await asyncio.open_connection(*self._address)
        reader, writer = self._streams
        writer.write(request)
        await writer.drain()
        return await _read_message(reader, b"")

    def abort(self) -> None:
        if self._streams is not None:
            self._streams[1].transport.abort()


async def _read_message(reader: asyncio.StreamReader, first: bytes) -> tuple[bytes, bytes]:
    """Head and raw body of one HTTP/1.1 message. Raises IncompleteReadError at the end of the stream."""
    head = first + await reader.readuntil(_HEAD_END)
    fields = head.lower()
    if b"transfer-encoding: chunked" in fields:
        body = b""
        while True:
            line = await reader.readuntil(b"\r\n")
            piece = await reader.readexactly(int(line, 16) + 2)
            body += line + piece
            if len(piece) == 2:
                return head, body
    length = re.search(rb"content-length: *(\d+)", fields)
    return head, await reader.readexactly(int(length[1])) if length else b""


def _unchunked(head: bytes, body: bytes) -> bytes:
    if b"transfer-encoding: chunked" not in head.lower():
        return body
    plain, at = b"", 0
    while True:
        end = body.index(b"\r\n", at)
        size = int(body[at:end], 16)
        if not size:
            return plain
        plain += body[end + 2 : end + 2 + size]
        at = end + 2 + size + 2
