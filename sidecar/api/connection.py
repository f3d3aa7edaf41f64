"""One client connection of the API port: aiohttp's protocol with a parser that knows every verb.

aiohttp's C parser refuses the verb LIST, which half of the clients of this API use. Its Python parser, maintained for
platforms without the C one, takes any verb; it replaces the other on these connections only. ``tests/unit`` pins that
it does, for the attribute is aiohttp's own.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from aiohttp import web
from aiohttp.http_parser import HttpRequestParserPy
from aiohttp.web_exceptions import HTTPBadRequest
from aiohttp.web_protocol import RequestHandler, RequestPayloadError

from sidecar.api import envelopes, json_codec

log = logging.getLogger("http")

SERVER_NAME = "Outrider"
"""aiohttp would tell its version and Python's."""
READ_BYTES = 64 * 1024
# As many pipelined requests as aiohttp itself lets wait.
_PIPELINE_MAX = 32


class Connection(RequestHandler):
    """Made by :class:`Server` for each socket."""

    __slots__ = ()

    def __init__(self, manager: Server, *, loop: asyncio.AbstractEventLoop, **settings: Any) -> None:
        super().__init__(manager, loop=loop, read_bufsize=READ_BYTES, **settings)
        self._parser = HttpRequestParserPy(
            self,
            loop,
            READ_BYTES,
            max_line_size=self.max_line_size,
            max_field_size=self.max_field_size,
            max_headers=self.max_headers,
            payload_exception=RequestPayloadError,
            # A compressed body is not inflated: a small one could unpack to gigabytes.
            auto_decompress=False,
            max_msg_queue_size=_PIPELINE_MAX,
        )

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
            body=json_codec.encode(envelopes.errors(())),
            content_type="application/json",
            headers={"Cache-Control": "no-store", "Server": SERVER_NAME},
        )
        response.force_close()
        return response


class Server(web.Server):
    """aiohttp's low-level server with :class:`Connection` and a bound on how many there are."""

    def __init__(self, handler: Any, *, connections_max: int, **settings: Any) -> None:
        super().__init__(handler)
        self._connections_max = connections_max
        self._settings = settings

    def __call__(self) -> RequestHandler:
        return Connection(self, loop=asyncio.get_running_loop(), **self._settings)

    def connection_made(self, handler: RequestHandler, transport: asyncio.Transport) -> None:
        super().connection_made(handler, transport)
        if len(self.connections) > self._connections_max:
            log.warning("too many connections: one was refused")
            transport.abort()
