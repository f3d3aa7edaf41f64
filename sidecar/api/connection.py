"""One client connection of the API port: aiohttp's protocol with parsers that know every verb
(:mod:`sidecar.api.request_parser`), and with deadlines for the head of a request and for a client that does not read
its answer, which aiohttp does not have.

The parser of a connection is in an attribute of aiohttp's own; ``tests/unit/test_request_parser.py`` pins that it is.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import Any

from aiohttp import StreamReader, web
from aiohttp.http_exceptions import LineTooLong
from aiohttp.http_parser import HttpRequestParserPy
from aiohttp.web_exceptions import HTTPBadRequest
from aiohttp.web_protocol import RequestHandler, RequestPayloadError

from sidecar.api import envelopes, json_codec
from sidecar.api.patience import Patience
from sidecar.api.request_parser import PlainRequestParser
from sidecar.api.response_headers import STRICT_TRANSPORT, STRICT_TRANSPORT_VALUE

log = logging.getLogger("http")

SERVER_NAME = "Outrider"
"""aiohttp would tell its version and Python's."""
READ_BYTES = 64 * 1024
_TOO_LONG = "the request line or a header is longer than this server takes"
# As many pipelined requests as aiohttp itself lets wait.
_PIPELINE_MAX = 32


@dataclass(frozen=True, slots=True)
class Times:
    """Deadlines in seconds of a loop that turns (:mod:`sidecar.api.patience`), 0 for none: from a request's first byte,
    or the connection's beginning, to the end of its head; and for a client to go on reading."""

    head_s: float = 10.0
    write_s: float = 60.0


class Connection(RequestHandler):
    """Made by :class:`Server` for each socket. ``client_host`` is the client's address where a proxy told it;
    ``client_ended`` once the client closed its sending half, or all."""

    __slots__ = ("_head_timer", "_last_body", "_times", "_write_timer", "client_ended", "client_host")

    def __init__(
        self, manager: Server, *, loop: asyncio.AbstractEventLoop, client_host: str, times: Times, **settings: Any
    ) -> None:
        # A compressed body is not inflated: a small one could unpack to gigabytes.
        super().__init__(manager, loop=loop, read_bufsize=READ_BYTES, auto_decompress=False, **settings)
        self.client_host = client_host
        self.client_ended = False
        self._times = times
        self._head_timer: Patience | None = None
        self._write_timer: Patience | None = None
        self._last_body: StreamReader | None = None
        # aiohttp has made its C parser by the arguments above, where there is one, as on every supported platform.
        self._parser: Any = PlainRequestParser(
            self._parser,
            self._change_over,
            head_bytes_max=min(self.max_line_size, self.max_field_size),
            lines_max=self.max_headers,
        )

    def _change_over(self) -> HttpRequestParserPy:
        """The parser of this connection from now on."""
        parser = HttpRequestParserPy(
            self,
            self._loop,
            READ_BYTES,
            max_line_size=self.max_line_size,
            max_field_size=self.max_field_size,
            max_headers=self.max_headers,
            payload_exception=RequestPayloadError,
            auto_decompress=False,
            max_msg_queue_size=_PIPELINE_MAX,
        )
        self._parser = parser
        return parser

    # -- deadlines: a connection that waits costs memory, so who is slow is not waited for without end

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        before = self._request_count
        super().data_received(data)
        if self._request_count != before:
            self._last_body = self._messages[-1][1]
            self._forget_head_timer()
        elif self._head_timer is None and self._current_request is None and not self._messages:
            self._expect_head()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._times.write_s:
            self._write_timer = Patience(self._loop, self._times.write_s, lambda: self._give_up("answer"))

    def resume_writing(self) -> None:
        super().resume_writing()
        self._forget_write_timer()

    def eof_received(self) -> bool:  # type: ignore[override]  # aiohttp's returns None: close at once
        """A client may close its sending half after its request: it gets the answer, then the connection ends. Of
        requests sent ahead none but the first is begun. (asyncio cannot keep the other half of TLS open.)"""
        self.client_ended = True
        waiting = self._waiter is not None and not self._waiter.done()
        if waiting or self._last_body is None or not self._last_body.is_eof():
            return False
        self.close()
        return True

    def connection_lost(self, exc: BaseException | None) -> None:
        self._forget_head_timer()
        self._forget_write_timer()
        super().connection_lost(exc)

    def _expect_head(self) -> None:
        if self._times.head_s:
            self._head_timer = Patience(self._loop, self._times.head_s, lambda: self._give_up("head"))

    def _forget_head_timer(self) -> None:
        _cancel(self._head_timer)
        self._head_timer = None

    def _forget_write_timer(self) -> None:
        _cancel(self._write_timer)
        self._write_timer = None

    def _give_up(self, what: str) -> None:
        log.debug("a client was too slow with the %s of a request: its connection was closed", what)
        if self.transport is not None:
            self.transport.abort()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """What cannot be parsed as HTTP. Neither the answer nor the log repeats it: it may hold a token."""
        log.debug("unreadable request: address=%s error=%s", request.remote, type(exc).__name__)
        status = status if 400 <= status < 600 else HTTPBadRequest.status_code
        response = web.Response(
            status=status,
            body=json_codec.encode(envelopes.errors((_TOO_LONG,) if isinstance(exc, LineTooLong) else ())),
            content_type="application/json",
            headers={"Cache-Control": "no-store", STRICT_TRANSPORT: STRICT_TRANSPORT_VALUE, "Server": SERVER_NAME},
        )
        response.force_close()
        return response


def _cancel(timer: Patience | None) -> None:
    if timer is not None:
        timer.cancel()


class Server(web.Server):
    """aiohttp's low-level server with :class:`Connection` and a bound on how many there are."""

    def __init__(self, handler: Any, *, connections_max: int, times: Times, **settings: Any) -> None:
        super().__init__(handler)
        self._connections_max = connections_max
        self._times = times
        self._settings = settings

    def __call__(self, client_host: str = "") -> RequestHandler:
        return Connection(
            self, loop=asyncio.get_running_loop(), client_host=client_host, times=self._times, **self._settings
        )

    def connection_made(self, handler: RequestHandler, transport: asyncio.Transport) -> None:
        super().connection_made(handler, transport)
        if len(self.connections) > self._connections_max:
            log.warning("too many connections: one was refused")
            transport.abort()
