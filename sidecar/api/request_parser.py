"""The parser of one client connection: aiohttp's C parser for plain requests, its Python parser for all others.

The C parser takes a third of the time, but knows no verb LIST, which half of the clients of this API use, and the two
do not read every odd request alike. So nothing but a *plain* request goes to it: one whose head is complete in one read
and of a form that both read alike, with a body of an announced length or none, and nothing behind it. Where such a
request ends is known to the byte, so it is known where the next begins, and only there is a LIST renamed to a verb of
the same length, and renamed back in the message that comes of it. A request of any other form, that verb itself among
them, changes the connection over to the Python parser for good, before a byte of it was parsed.

``tests/unit/test_request_parser.py`` holds the two against each other: any requests, however the reads cut them, give
what the Python parser alone gives.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from aiohttp.http_exceptions import BadHttpMessage
from aiohttp.streams import StreamReader

Parsed = tuple[Sequence[tuple[Any, StreamReader]], bool, bytes]
"""Messages with their bodies; whether the connection left HTTP; the bytes behind that."""

BODY_BYTES_MAX = 64 * 1024
"""Of a plain request. A longer body may have to wait in the parser for its reader, who is to find its end there."""

_LIST, _STAND_IN = b"LIST", b"LINK"
# Bytes in the target that only one of the two refuses, and a fragment, are left to the Python parser.
_LINE = re.compile(rb"(?:GET|LIST|POST|PUT|DELETE|HEAD|PATCH|OPTIONS) /[!\"$-~]* HTTP/1\.1\r\n")
# What decides where a request ends and what comes after it. A longer name that begins so is not plain either.
_FRAMING = re.compile(rb"\r\n(connection|content-length|transfer-encoding|upgrade)([^\r]*)", re.IGNORECASE)
_LENGTH = re.compile(rb": ?([0-9]{1,5})")
_KEEP_ALIVE = re.compile(rb": ?keep-alive", re.IGNORECASE)


class Parser(Protocol):
    """What aiohttp's connection uses of either of its parsers."""

    def feed_data(self, data: bytes, /) -> Parsed: ...

    def message_consumed(self) -> None: ...

    def pause_reading(self) -> None: ...

    def set_upgraded(self, val: bool, /) -> None: ...


class PlainRequestParser:
    """Made at a connection's beginning. ``change_over`` makes the Python parser and puts it in this one's place.

    ``head_bytes_max`` is the smallest limit that a part of a head has: a head as short as that is within all of them,
    however a parser counts. ``lines_max`` bounds its lines, the empty one included.
    """

    __slots__ = ("_body", "_body_bytes_left", "_change_over", "_fast", "_head_bytes_max", "_lines_max")

    def __init__(self, fast: Parser, change_over: Callable[[], Parser], *, head_bytes_max: int, lines_max: int) -> None:
        self._fast = fast
        self._change_over = change_over
        self._head_bytes_max = head_bytes_max
        self._lines_max = lines_max
        self._body: StreamReader | None = None
        self._body_bytes_left = 0

    def feed_data(self, data: bytes) -> Parsed:
        """The requests that ``data`` completes the heads of. Raises aiohttp's HttpProcessingError."""
        if not data:
            return (), False, b""
        if self._body_bytes_left:
            return self._feed_body(data)
        body_bytes = self._plain_body_bytes(data)
        if body_bytes is None:
            return self._change_over().feed_data(data)
        listing = data.startswith(_LIST)
        parsed = self._fast.feed_data(_STAND_IN + data[len(_LIST) :] if listing else data)
        messages, upgraded, _ = parsed
        if len(messages) != 1 or upgraded:
            raise BadHttpMessage("a plain request was not read as one")
        message, body = messages[0]
        if body_bytes:
            self._body, self._body_bytes_left = body, body_bytes
        if body.is_eof() == (body_bytes > 0) or message.chunked or message.upgrade:
            raise BadHttpMessage("a plain request does not end where it should")
        return ([(message._replace(method="LIST"), body)], False, b"") if listing else parsed

    def _feed_body(self, data: bytes) -> Parsed:
        size_bytes = self._body_bytes_left
        if len(data) < size_bytes:
            self._body_bytes_left -= len(data)
            return self._fast.feed_data(data)
        parsed = self._fast.feed_data(data[:size_bytes])
        if parsed[0] or self._body is None or not self._body.is_eof():
            raise BadHttpMessage("a body does not end where it should")
        self._body, self._body_bytes_left = None, 0
        return parsed if len(data) == size_bytes else self._change_over().feed_data(data[size_bytes:])

    def _plain_body_bytes(self, data: bytes) -> int | None:
        """How much is still to come of the body of the request that ``data`` begins with; None if it is not plain."""
        line = _LINE.match(data)
        if line is None:
            return None
        head_bytes = data.find(b"\r\n\r\n", line.end() - 2) + 4
        if not 4 <= head_bytes <= self._head_bytes_max or data.count(b"\r\n", 0, head_bytes) > self._lines_max:
            return None
        length_bytes: int | None = None
        for name, value in _FRAMING.findall(data, line.end() - 2, head_bytes):
            length = _LENGTH.fullmatch(value)
            if length and length_bytes is None and name.lower() == b"content-length":
                length_bytes = int(length[1])
            elif not (_KEEP_ALIVE.fullmatch(value) and name.lower() == b"connection"):
                return None
        body_bytes = length_bytes or 0
        left_bytes = head_bytes + body_bytes - len(data)
        return left_bytes if left_bytes >= 0 and body_bytes <= BODY_BYTES_MAX else None

    def message_consumed(self) -> None:
        """A message of this parser was taken up."""
        self._fast.message_consumed()

    def pause_reading(self) -> None:
        """The reader of a body has enough. Not asked for: no plain body is long enough."""
        self._fast.pause_reading()

    def set_upgraded(self, val: bool) -> None:
        """No plain request leaves HTTP."""
        self._fast.set_upgraded(val)
