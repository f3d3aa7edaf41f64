"""Answers as nearly all are: whole, small, on a connection that stays open, with no headers of their own.

aiohttp works out the head of an answer header by header, in a dozen calls; of a plain answer's head only status, length
and time change. Every other answer (to HEAD or HTTP/1.0, the last on its connection, a stream, one with headers) is
aiohttp's own; ``tests/unit/test_plain_answer.py`` holds the two against each other, byte by byte.
"""

from __future__ import annotations

import functools
import time
from email.utils import formatdate

from aiohttp import web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http import HttpVersion11

_NO_CONTENT = 204


def is_plain(request: web.BaseRequest, status: int, body: bytes) -> bool:
    """Whether an answer without headers of its own may be a :class:`PlainAnswer`."""
    whole = bool(body) if status != _NO_CONTENT else not body
    return (
        status >= 200
        and status != web.HTTPNotModified.status_code
        and whole
        and request.version == HttpVersion11
        and request.keep_alive
        and request.method != "HEAD"
    )


class PlainAnswer(web.StreamResponse):
    """``head`` is the status line and the headers that every answer has; length and date are added here. aiohttp's
    connection sends it as any other answer."""

    def __init__(self, status: int, head: bytes, body: bytes) -> None:
        super().__init__(status=status)
        self._text = b"%b%b%b" % (head, _tail(len(body) if body else None, int(time.time())), body)

    @property
    def keep_alive(self) -> bool:
        return True

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        """Send it all. Raises ConnectionResetError where the client has left."""
        transport = request.transport
        if transport is None or transport.is_closing():
            raise ConnectionResetError("the client has left")
        transport.write(self._text)
        await request.writer.drain()
        return None

    async def write_eof(self, data: bytes = b"") -> None:
        """Nothing is left to send."""


def _tail(length: int | None, now_s: int) -> bytes:
    announced = "" if length is None else f"Content-Length: {length}\r\n"
    return f"{announced}Date: {_date(now_s)}\r\n\r\n".encode()


@functools.lru_cache(maxsize=2)
def _date(now_s: int) -> str:
    return formatdate(now_s, usegmt=True)
