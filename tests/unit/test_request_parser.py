"""The parsers of a connection together against aiohttp's Python parser alone: the same requests, whatever the reads."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from aiohttp.base_protocol import BaseProtocol
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.http_parser import HttpRequestParserC, HttpRequestParserPy
from aiohttp.web_protocol import RequestPayloadError
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sidecar.api import request_parser
from sidecar.api.connection import Connection, Server, Times
from sidecar.api.request_parser import PlainRequestParser

HOST = b"Host: h\r\n"
TARGET_BYTES = bytes(set(range(0x21, 0x7F)) - {ord("#")})
LIMITS: dict[str, Any] = {
    "max_line_size": 600,
    "max_field_size": 500,
    "max_headers": 12,
    "payload_exception": RequestPayloadError,
    "auto_decompress": False,
    "max_msg_queue_size": 32,
}


@dataclass
class Seen:
    """What came of the bytes of one connection."""

    requests: list[tuple[Any, ...]] = field(default_factory=list)
    bodies: list[Any] = field(default_factory=list)
    left_http: bytes | None = None
    refused_at: int | None = None
    changed_over: bool = False

    def outcome(self) -> tuple[Any, ...]:
        """All of it that a handler or client could notice."""
        bodies = []
        for body in self.bodies:
            fault = type(body.exception()).__name__
            bodies.append((b"".join(getattr(body, "_buffer", ())), body.is_eof(), fault))
        return self.requests, bodies, self.left_http, self.refused_at


class Wire:
    """One connection's parser; ``plain`` with the C parser in front."""

    def __init__(self, *, plain: bool) -> None:
        self._loop = asyncio.new_event_loop()
        protocol: Any = BaseProtocol(self._loop)

        def parser(kind: Callable[..., Any]) -> Any:
            return kind(protocol, self._loop, 64 * 1024, **LIMITS)

        def change_over() -> Any:
            assert not self.seen.changed_over
            self.seen.changed_over = True
            protocol._parser = parser(HttpRequestParserPy)
            return protocol._parser

        self.seen = Seen()
        self._protocol = protocol
        fast = parser(HttpRequestParserC)
        protocol._parser = (
            PlainRequestParser(fast, change_over, head_bytes_max=500, lines_max=12)
            if plain
            else parser(HttpRequestParserPy)
        )

    def read(self, *chunks: bytes) -> Seen:
        """Feed what the reads of a socket gave, up to the first that is refused."""
        parser: Any
        for number, chunk in enumerate(chunks):
            parser = self._protocol._parser
            try:
                messages, upgraded, tail = parser.feed_data(chunk)
            except HttpProcessingError:
                self.seen.refused_at = number
                break
            for message, body in messages:
                self.seen.requests.append(_shown(message))
                self.seen.bodies.append(body)
            if upgraded:
                self.seen.left_http = tail
                break
            if messages and messages[-1][0].should_close:
                break  # the connection ends with the answer: nothing behind it is taken up
        self._loop.close()
        return self.seen


def _shown(message: Any) -> tuple[Any, ...]:
    headers = [(name.lower(), value) for name, value in message.headers.items()]
    return (
        message.method,
        message.path,
        tuple(message.version),
        headers,
        message.raw_headers,
        bool(message.should_close),
        message.compression,
        bool(message.upgrade),
        bool(message.chunked),
        message.url,
    )


def plain(*chunks: bytes) -> Seen:
    """What our parsers make of these reads, once it is sure that the Python parser makes the same of them."""
    ours, theirs = Wire(plain=True).read(*chunks), Wire(plain=False).read(*chunks)
    assert ours.outcome() == theirs.outcome()
    return ours


def verbs(seen: Seen) -> list[str]:
    return [request[0] for request in seen.requests]


def head(method: bytes = b"GET", *fields: bytes, target: bytes = b"/v1/a") -> bytes:
    return method + b" " + target + b" HTTP/1.1\r\n" + HOST + b"".join(each + b"\r\n" for each in fields) + b"\r\n"


# -- what goes to the C parser


@pytest.mark.parametrize("method", [b"GET", b"LIST", b"POST", b"PUT", b"DELETE", b"HEAD", b"PATCH", b"OPTIONS"])
def test_plain_requests_stay_with_the_c_parser(method: bytes) -> None:
    body = b"LIST /v1/b HTTP/1.1\r\n\r\n"
    with_body = head(method, b"content-length: %d" % len(body), b"Connection: Keep-Alive")
    seen = plain(head(method), with_body + body, with_body, body[:7], body[7:], head(b"LIST"))
    assert verbs(seen) == [*[method.decode()] * 3, "LIST"]
    assert [b"".join(each._buffer) for each in seen.bodies[1:3]] == [body, body]
    assert not seen.changed_over


def test_every_character_of_a_target_is_read_alike() -> None:
    for byte in TARGET_BYTES:
        seen = plain(head(b"LIST", target=b"/v1/a" + bytes([byte]) + b"b"))
        assert (verbs(seen), seen.changed_over) == (["LIST"], False)


def test_requests_that_no_plain_one_may_be_are_refused_by_both() -> None:
    for broken in (
        b"Host: again",
        b"X-A : 1",
        b"X-A: \x00",
        b": 1",
        b" folded: 1",
        b"X-A: 1\n2",
        b"X-A: 1\r2",
        b"X\xe9: 1",
    ):
        seen = plain(head(b"LIST", broken))
        assert (seen.refused_at, seen.changed_over) == (0, False), broken
    assert plain(b"LIST /v1/a HTTP/1.1\r\n\r\n").refused_at == 0


def test_heads_at_the_limits() -> None:
    for size in range(470, 700):
        plain(head(b"LIST", b"X-A: " + b"x" * size))
        plain(head(b"LIST", target=b"/v1/" + b"x" * size))
    for count in range(7, 14):
        plain(head(b"LIST", *[b"X-A: x"] * count))


# -- what does not


@pytest.mark.parametrize(
    ("chunks", "expected"),
    [
        ([b"LI", b"ST /v1/a HTTP/1.1\r\n" + HOST + b"\r\n"], ["LIST"]),
        ([head(b"LIST")[at : at + 1] for at in range(len(head(b"LIST")))], ["LIST"]),
        ([head() + head(b"LIST")], ["GET", "LIST"]),
        ([head(b"LIST") + head(b"LIST") + head(b"LINK")], ["LIST", "LIST", "LINK"]),
        ([head(b"POST", b"Content-Length: 5") + b"LIST " + head(b"LIST")], ["POST", "LIST"]),
        ([head(b"POST", b"Content-Length: 5"), b"LI", b"ST " + head(b"LIST"), head(b"LINK")], ["POST", "LIST", "LINK"]),
        ([head(b"PUT", b"Content-Length: 5"), b"LIST LI", b"ST /v1/a HTTP/1.1\r\n" + HOST + b"\r\n"], ["PUT", "LIST"]),
        ([head(b"POST", b"Transfer-Encoding: chunked") + b"5\r\nLIST \r\n0\r\n\r\n", head(b"LIST")], ["POST", "LIST"]),
        ([head(b"LIST", b"transfer-ENCODING: chunked"), b"5\r\nLI", b"ST \r\n0\r\n\r\n", head()], ["LIST", "GET"]),
        ([head(b"LINK"), head(b"LIST")], ["LINK", "LIST"]),
        ([head(b"list"), head(b"Link")], ["LIST", "LINK"]),
        ([b"\r\n" + head(b"LIST")], ["LIST"]),
        ([head(b"LIST", target=b"http://h/v1/a"), head(b"LIST", target=b"/v1/a#b")], ["LIST", "LIST"]),
        ([b"LIST /v1/a HTTP/1.0\r\n\r\n"], ["LIST"]),
        ([head(b"LIST", b"Connection: close") + head()], []),
        ([head(b"LIST", b"Connection: close"), head()], ["LIST"]),
        ([head(b"LIST", b"Content-Length: 65537"), b"x" * 65537 + head(b"LIST")], ["LIST", "LIST"]),
        ([head(b"GET", b"Connection: Upgrade", b"Upgrade: websocket") + b"LIST "], ["GET"]),
        ([head(b"POST", b"Content-Length: 4", b"Content-Length: 4") + b"LIST"], []),
        ([head(b"POST", b"Content-Length: +4") + b"LIST"], []),
        ([head(b"POST", b"Content-Length: 4", b"Transfer-Encoding: chunked") + b"LIST"], []),
        ([head(b"POST", b"X: 1\nTransfer-Encoding: chunked") + b"LIST"], []),
    ],
    ids=lambda value: repr(value)[:60],
)  # fmt: skip
def test_what_is_not_plain_is_the_python_parser_s(chunks: list[bytes], expected: list[str]) -> None:
    seen = plain(*chunks)
    assert verbs(seen) == expected
    assert seen.changed_over


def test_a_client_that_waits_with_its_body() -> None:
    seen = plain(head(b"PUT", b"Expect: 100-continue", b"Content-Length: 9"), b"LIST /v1/", head(b"LIST"))
    assert (verbs(seen), seen.changed_over) == (["PUT", "LIST"], False)


# -- any requests, any reads

_VERBS = st.sampled_from(
    [b"GET", b"LIST", b"LIST", b"POST", b"PUT", b"LINK", b"HEAD", b"DELETE", b"OPTIONS", b"list", b"BREW"]
)
_TARGETS = st.sampled_from(
    [b"/v1/a", b"/v1/LIST /b", b"/v1/a?list=true", b"/v1/a#b", b"/v1/\xc3\xa9", b"*", b"http://h/v1/a", b"/"]
)
_FIELDS = st.sampled_from(
    [b"X-Vault-Token: t", b"connection: keep-alive", b"Connection: keep-alive, x", b"Connection: close",
     b"Expect: 100-continue", b"Content-Encoding: gzip", b"Upgrade: websocket", b"Connection: upgrade",
     b"Content-Length: 3", b"content-length:2 ", b"Content-Length-X: 1", b"X: LIST /v1/a HTTP/1.1",
     b"Sec-WebSocket-Key1: a", b"A" * 600 + b": 1", b"B: " + b"b" * 450]
)  # fmt: skip
_BODIES = st.one_of(
    st.sampled_from([b"", b"LIST ", b"\r\n\r\n", b"LIST /v1/b HTTP/1.1\r\n\r\n", b"{}"]), st.binary(max_size=9)
)


@st.composite
def _request(draw: st.DrawFn) -> bytes:
    body = draw(_BODIES)
    fields = draw(st.lists(_FIELDS, max_size=2)) if draw(st.booleans()) else []
    framed = draw(st.sampled_from(["length", "length", "length", "chunked", "none"]))
    if framed == "chunked":
        fields.append(b"Transfer-Encoding: chunked")
        body = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (body[:2], body[2:]) if part) + b"0\r\n\r\n"
    elif framed == "length" and body:
        fields.append(b"Content-Length: %d" % len(body))
    return head(draw(_VERBS), *fields, target=draw(_TARGETS) if draw(st.booleans()) else b"/v1/a") + body


def _cuts(draw: st.DrawFn, data: bytes) -> Iterator[bytes]:
    places = draw(st.lists(st.integers(1, max(len(data) - 1, 1)), max_size=4))
    start = 0
    for place in [*sorted(places), len(data)]:
        if place > start:
            yield data[start:place]
            start = place


@st.composite
def _reads(draw: st.DrawFn) -> list[bytes]:
    """Requests, most of them one read each as clients send them, some cut or joined, some with a byte that is wrong."""
    requests = draw(st.lists(_request(), min_size=1, max_size=5))
    if draw(st.booleans()):
        reads = [part for each in requests for part in (_cuts(draw, each) if draw(st.booleans()) else [each])]
    else:
        reads = list(_cuts(draw, b"".join(requests)))
    if draw(st.integers(0, 3)) == 0:
        which = draw(st.integers(0, len(reads) - 1))
        at = draw(st.integers(0, len(reads[which])))
        odd = draw(
            st.sampled_from([b"\r", b"\n", b"\r\n", b" ", b"\t", b"\x00", b"\x7f", b"\xe9", b":", b"#", b"LIST "])
        )
        reads[which] = reads[which][:at] + odd + reads[which][at + draw(st.integers(0, 2)) :]
    return [each for each in reads if each]


@settings(max_examples=500, deadline=None)
@given(_reads())
@example([head(b"POST", b"Content-Length: 5"), b"LIST ", head(b"LIST")])
def test_any_requests_in_any_reads_are_what_the_python_parser_reads(reads: list[bytes]) -> None:
    plain(*reads)


# -- controls


def test_control_a_rename_in_the_wrong_place_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_parser, "_LIST", b"POST")
    with pytest.raises(AssertionError):
        plain(head(b"POST"))


def test_control_a_head_believed_to_be_plain_ends_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_parser, "_FRAMING", re.compile(rb"\r\n(never)(.*)"))
    for field_, body in (
        (b"Transfer-Encoding: chunked", b""),
        (b"Content-Length: 5", b""),
        (b"Content-Length: 5", b"GET /"),
    ):
        wire = Wire(plain=True)
        assert wire.read(head(b"POST", field_) + body).refused_at == 0 or wire.seen.changed_over


# -- that connections have it


async def test_connections_begin_with_the_c_parser_and_change_over_once() -> None:
    async def answer(_: Any) -> Any:
        raise AssertionError

    server = Server(answer, connections_max=1, times=Times(), max_line_size=100, max_field_size=90)
    connection = server()
    assert isinstance(connection, Connection)
    first = connection._parser
    assert isinstance(first, PlainRequestParser)
    assert isinstance(first._fast, HttpRequestParserC)
    connection.data_received(head(b"LIST"))
    assert connection._parser is first
    connection.data_received(b"LI")
    second = connection._parser
    assert isinstance(second, HttpRequestParserPy)
    assert (second.max_line_size, second.max_field_size, second.max_headers) == (100, 90, 128)
    connection.data_received(b"ST /v1/b HTTP/1.1\r\n" + HOST + b"\r\n")
    assert connection._parser is second
    messages: list[Any] = [message for message, _ in connection._messages]
    assert [(message.method, message.path) for message in messages] == [("LIST", "/v1/a"), ("LIST", "/v1/b")]
