"""Answers as nearly all are: whole, on a connection that stays open, without headers but the position of a write.

aiohttp works out the head of an answer header by header, in a dozen calls; of a plain answer's head only status,
position, length and time change. Every other answer (to HEAD or HTTP/1.0, the last on its connection, a stream, one
with more headers) is aiohttp's own; ``tests/unit/test_plain_answer.py`` holds the two against each other.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from email.utils import formatdate
from http import HTTPStatus

from aiohttp import web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http import HttpVersion11

from sidecar.api.directives import INDEX_HEADER
from sidecar.request.types import HttpResponse


def plain_answer(request: web.BaseRequest, answer: HttpResponse, head: Callable[[int], bytes]) -> PlainAnswer | None:
    """``answer`` if it is a plain one. ``head`` gives the status line and the headers that every answer has."""
    status, body, position = answer.status, answer.body, ""
    if (
        status < 200
        or status == HTTPStatus.NOT_MODIFIED
        or bool(body) == (status == HTTPStatus.NO_CONTENT)
        or request.version != HttpVersion11
        or not request.keep_alive
        or request.method == "HEAD"
    ):
        return None
    if answer.headers:
        position = answer.headers.get(INDEX_HEADER, "")
        # A line break would begin a header of its own: aiohttp refuses it.
        if len(answer.headers) != 1 or not (position.isascii() and position.isprintable() and position):
            return None
    tail = _tail(position, len(body) if body else None, int(time.time()))
    return PlainAnswer(status, b"%b%b%b" % (head(status), tail, body))


class PlainAnswer(web.StreamResponse):
    """``text`` is all of the answer. aiohttp's connection sends it as any other."""

    def __init__(self, status: int, text: bytes) -> None:
        super().__init__(status=status)
        self._text = text

    @property
    def keep_alive(self) -> bool:
        return True

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        """Send it all, and wait while the client does not read. Raises ConnectionResetError where it has left."""
        transport = request.transport
        if transport is None or transport.is_closing():
            raise ConnectionResetError("the client has left")
        transport.write(self._text)
        await request.writer.drain()
        return None

    async def write_eof(self, data: bytes = b"") -> None:
        """Nothing is left to send."""


def _tail(position: str, length: int | None, now_s: int) -> bytes:
    told = f"{INDEX_HEADER}: {position}\r\n" if position else ""
    announced = "" if length is None else f"Content-Length: {length}\r\n"
    return f"{told}{announced}Date: {_date(now_s)}\r\n\r\n".encode()


@functools.lru_cache(maxsize=2)
def _date(now_s: int) -> str:
    return formatdate(now_s, usegmt=True)
