"""Transactions over HTTP/1.1 with nothing in between: one connection, one request, one answer.

A commit waits for this exchange and one is under way at a time, so what an HTTP client library does around a request
(about 0.3 ms of work on aiohttp's way) is time in which nothing is committed. The rules are the transport's: a request
is written once, on a connection that was alive; no redirect is followed; times and sizes are bounded. Answers are
parsed by httptools (llhttp). A connection serves again only after an answer that was complete and said nothing else.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Awaitable, Callable
from typing import cast

import httptools

from consul_backend.socket_reads import limit_socket_reads

CONNECT_TIMEOUT_S = 5.0
CONNECTIONS_MAX = 8
"""Commits use one; roll-forwards, flushes, collection and reads of values share the rest."""
IDLE_S = 55.0
"""Below the idle time-outs of the usual proxies, so that we close first."""
HEAD_BYTES_MAX = 64 * 1024

_CONTINUE_STATUS_MAX = 199


class NeverSent(Exception):
    """No connection could be made: not a byte of the request has left. The cause says why."""


class NoAnswer(Exception):
    """The request was written, and no complete answer came: it may have been carried out."""


class Closed(NoAnswer):
    """The connection ended before a complete answer."""


class TooBig(Exception):
    """The answer has more bytes than are taken."""


class Connection(asyncio.Protocol):
    """One connection; ``request`` must not be called while another is under way."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._answer: asyncio.Future[tuple[int, bytes]] | None = None
        self._body: list[bytes] = []
        self._in_head = True
        self._head_bytes = self._body_bytes = self._body_bytes_max = 0
        self._idle_since_s = 0.0

    async def request(self, text: bytes, answer_bytes_max: int, deadline_s: float) -> tuple[int, bytes]:
        """Status and body of the answer to ``text``, which must come until ``deadline_s`` in the loop's time. Raises
        NoAnswer, TooBig. Cancelled or failed, it is closed."""
        transport = self._transport
        if transport is None or transport.is_closing() or self._answer is not None:
            raise AssertionError("a request on a connection that is closed or in use")
        self._body_bytes_max = answer_bytes_max
        loop = asyncio.get_running_loop()
        self._answer = loop.create_future()
        late = loop.call_at(deadline_s, self._late)
        try:
            transport.write(text)
            return await self._answer
        except BaseException:
            transport.abort()
            raise
        finally:
            late.cancel()
            self._answer = None
            self._idle_since_s = time.monotonic()

    @property
    def usable(self) -> bool:
        """Whether another request may be written to it: it is open, has not idled too long, and has sent all of ours
        (an answer may come before the server has read the request)."""
        transport = self._transport
        if transport is None or transport.is_closing() or transport.get_write_buffer_size():
            return False
        return time.monotonic() - self._idle_since_s < IDLE_S

    def close(self) -> None:
        """Give it up."""
        if self._transport is not None:
            self._transport.abort()

    # -- asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._idle_since_s = time.monotonic()

    def data_received(self, data: bytes) -> None:
        if self._answer is None:
            self.close()  # nobody asked: what follows cannot be told from an answer
            return
        if self._in_head:
            self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(NoAnswer(f"what came is no HTTP answer ({type(error).__name__})"))
        except httptools.HttpParserUpgrade:
            self._fail(NoAnswer("the server left HTTP"))
        if self._in_head and self._head_bytes > HEAD_BYTES_MAX:
            self._fail(NoAnswer("the head of the answer has no end"))

    def eof_received(self) -> None:
        self._fail(Closed("the connection was closed"))

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self._fail(Closed("the connection was lost"), error)

    def _late(self) -> None:
        self._fail(NoAnswer("timed out"))

    def _fail(self, failure: Exception, cause: Exception | None = None) -> None:
        failure.__cause__ = cause
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(failure)
        self.close()

    # -- httptools' side

    def on_message_begin(self) -> None:
        if self._answer is None or self._answer.done():
            self.close()  # more than one answer: the next request would get the rest of it

    def on_headers_complete(self) -> None:
        self._in_head = False

    def on_body(self, data: bytes) -> None:
        self._body_bytes += len(data)
        if self._body_bytes > self._body_bytes_max:
            self._fail(TooBig())
        elif self._answer is not None and not self._answer.done():
            self._body.append(data)

    def on_message_complete(self) -> None:
        status = self._parser.get_status_code()
        body = self._body[0] if len(self._body) == 1 else b"".join(self._body)
        self._body = []
        self._in_head = True
        self._head_bytes = self._body_bytes = 0
        if status <= _CONTINUE_STATUS_MAX or self._answer is None or self._answer.done():
            return
        if not self._parser.should_keep_alive():
            self.close()
        self._answer.set_result((status, body))


class Exchange:
    """A few connections, the one used last first. ``connect`` makes a new one."""

    def __init__(self, connect: Callable[[], Awaitable[Connection]]) -> None:
        self._connect = connect
        self._idle: list[Connection] = []
        self._busy: set[Connection] = set()
        self._room = asyncio.Semaphore(CONNECTIONS_MAX)
        self._closed = False

    async def request(self, text: bytes, *, timeout_s: float, answer_bytes_max: int) -> tuple[int, bytes]:
        """Write ``text``, a whole request, once; status and body of the answer. Cancelling it gives the connection up.

        Raises NeverSent, NoAnswer (Closed), TooBig."""
        deadline_s = asyncio.get_running_loop().time() + timeout_s
        if self._room.locked():
            try:
                async with asyncio.timeout_at(deadline_s):
                    await self._room.acquire()
            except TimeoutError as error:
                raise NeverSent from error
        else:
            await self._room.acquire()  # at once
        try:
            connection = await self._alive(deadline_s)
            self._busy.add(connection)
            try:
                answer = await connection.request(text, answer_bytes_max, deadline_s)
            finally:
                self._busy.discard(connection)
            if connection.usable and not self._closed:
                self._idle.append(connection)
            else:
                connection.close()
            return answer
        finally:
            self._room.release()

    async def close(self) -> None:
        """Close every connection; what is under way fails as NoAnswer."""
        self._closed = True
        for connection in (*self._idle, *self._busy):
            connection.close()
        self._idle.clear()
        await asyncio.sleep(0)  # connections end in the loop's next turn

    async def _alive(self, deadline_s: float) -> Connection:
        while self._idle:
            connection = self._idle.pop()
            if connection.usable:
                return connection
            connection.close()
        try:
            async with asyncio.timeout_at(min(deadline_s, asyncio.get_running_loop().time() + CONNECT_TIMEOUT_S)):
                return await self._connect()
        except OSError as error:  # refused, unreachable, timed out, a name that is not known, TLS
            raise NeverSent from error


def connector(
    host: str, port: int, socket_path: str, context: ssl.SSLContext | None, server_name: str | None
) -> Callable[[], Awaitable[Connection]]:
    """How to reach Consul: a Unix socket if ``socket_path`` is given, else TCP, with TLS if there is a ``context``."""
    limit_socket_reads()

    async def connect() -> Connection:
        loop = asyncio.get_running_loop()
        if socket_path:
            return (await loop.create_unix_connection(Connection, socket_path))[1]
        name = (server_name or host) if context is not None else None
        return (await loop.create_connection(Connection, host, port, ssl=context, server_hostname=name))[1]

    return connect
