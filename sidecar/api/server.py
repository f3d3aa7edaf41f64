"""The API port: bytes from a socket become an :class:`~sidecar.request.types.HttpRequest`, its answer becomes bytes.

Every bound of a request is here: size of the line, of headers and of the body, memory for all bodies together, and
time. A body is refused by its announced length before a byte of it is read.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import socket
import ssl
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from http import HTTPStatus

from aiohttp import HttpVersion10, HttpVersion11, web
from multidict import CIMultiDict, CIMultiDictProxy

from consul_backend.deadline import time_limit
from consul_backend.socket_reads import limit_socket_reads
from sidecar.api import envelopes, json_codec, paths
from sidecar.api.client_address import HEADER, AddressRefused, ForwardedFor
from sidecar.api.connection import SERVER_NAME, Connection, Server, Times
from sidecar.api.listening import Listening, SocketAccess
from sidecar.api.patience import patience
from sidecar.api.plain_answer import plain_answer
from sidecar.api.proxy_protocol import ProxyRule
from sidecar.api.response_headers import STRICT_TRANSPORT, STRICT_TRANSPORT_VALUE, ResponseHeaders
from sidecar.api.sockets import listening_sockets
from sidecar.api.statuses import RETRY_AFTER_S
from sidecar.core.metrics import METRICS
from sidecar.core.unicode_text import is_encodable
from sidecar.request.types import USUAL_DISCLOSURE, Disclosure, HttpRequest, HttpResponse

log = logging.getLogger("http")

JSON_TYPE = "application/json"
_BODY_METHODS = frozenset({"POST", "PUT", "PATCH", "DELETE", "LIST"})
_METHODS = _BODY_METHODS | {"GET", "HEAD", "OPTIONS"}
# Set by hops inside the cluster, never by a client: what the cluster port knows travels in its own frame.
_INTERNAL_PREFIX = "x-vault-internal-"
_VERSIONS = (HttpVersion11, HttpVersion10)
_SHUTDOWN_TIMEOUT_S = 2.0
# On every answer, also an empty one: clients compare the content type by equality.
_ALWAYS = CIMultiDict(
    {
        "Content-Type": JSON_TYPE,
        "Cache-Control": "no-store",
        STRICT_TRANSPORT: STRICT_TRANSPORT_VALUE,
        "Server": SERVER_NAME,
    }
)


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """Bounds of one listener. ``buffered_bytes_max`` is for all bodies in memory together. ``request_timeout_s`` is the
    deadline of a request's writes (:mod:`consul_backend.deadline`). Of the other times, ``head``, ``body`` and
    ``write`` may be 0 for none; these count only while the loop turns (:mod:`sidecar.api.patience`)."""

    body_bytes_max: int = 32 * 1024 * 1024
    buffered_bytes_max: int = 256 * 1024 * 1024
    line_bytes_max: int = 8190
    field_bytes_max: int = 8190
    head_timeout_s: float = 10.0
    body_timeout_s: float = 30.0
    request_timeout_s: float = 90.0
    write_timeout_s: float = 60.0
    idle_timeout_s: float = 300.0
    connections_max: int = 4096
    require_request_header: bool = False
    forwarded_for: ForwardedFor | None = None
    disclosure: Disclosure = USUAL_DISCLOSURE
    response_headers: ResponseHeaders = field(default_factory=lambda: ResponseHeaders({}))


Handler = Callable[[HttpRequest], Awaitable[HttpResponse]]
Fallback = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


class _Refused(Exception):
    """The request ends here with this status and these texts."""

    def __init__(self, status: int, *texts: str, close: bool = False) -> None:
        super().__init__(status)
        self.status = status
        self.texts = texts
        self.close = close


class ApiServer:
    """Serves ``/v1/`` with ``handler``; other paths go to ``fallback`` (the web UI) or get 404.

    One object may listen on several addresses. :meth:`close` drains connections.
    """

    def __init__(
        self, handler: Handler, *, limits: ServerLimits | None = None, fallback: Fallback | None = None
    ) -> None:
        self._handler = handler
        self._limits = limits or ServerLimits()
        self._fallback = fallback
        self._buffered_bytes = 0
        self._server: Server | None = None
        self._listening: Listening | None = None

    async def listen(
        self,
        host: str,
        port: int,
        *,
        tls: ssl.SSLContext | None = None,
        proxy: ProxyRule | None = None,
        listeners: Sequence[socket.socket] = (),
    ) -> tuple[str, int]:
        """Open one more listening socket, with ``proxy`` one before whose bytes a proxy says who the client is; returns
        its (host, port), which matters for port 0. ``listeners`` are the sockets where they are open already. Raises
        OSError."""
        opened = listeners or await asyncio.to_thread(listening_sockets, host, port)
        return await self._started().tcp(opened, tls, proxy)

    async def listen_unix(self, path: str, access: SocketAccess) -> None:
        """Open a Unix socket. Raises OSError."""
        await self._started().unix(path, access)

    def addresses(self) -> list[tuple[str, int]]:
        """(host, port) of every TCP socket."""
        return self._listening.addresses if self._listening else []

    async def close(self) -> None:
        """Stop listening and wait briefly for answers under way."""
        server, listening, self._server, self._listening = self._server, self._listening, None, None
        if server is None or listening is None:
            return
        await listening.close()
        await asyncio.sleep(0)  # requests that have just arrived begin before idle connections are closed
        server.pre_shutdown()
        await server.shutdown(_SHUTDOWN_TIMEOUT_S)

    def _started(self) -> Listening:
        if self._listening is None:
            limits = self._limits
            limit_socket_reads()
            self._server = server = Server(
                self._serve,
                connections_max=limits.connections_max,
                times=Times(limits.head_timeout_s, limits.write_timeout_s),
                access_log=None,
                logger=log,
                keepalive_timeout=limits.idle_timeout_s,
                max_line_size=limits.line_bytes_max,
                max_field_size=limits.field_bytes_max,
            )
            self._listening = Listening(server, connections_max=limits.connections_max)
        return self._listening

    async def _serve(self, request: web.BaseRequest) -> web.StreamResponse:
        held_bytes = 0
        try:
            path, query = paths.split_target(request.raw_path)
            address = self._client_address(request)
            if not path.startswith("/v1/"):
                return await self._other(request, path)
            self._check_head(request)
            held_bytes = self._reserve(request)
            body = await self._read_body(request)
            message = self._message(request, path, query, body, address)
            async with time_limit(self._limits.request_timeout_s):
                answer = await self._handler(message)
            if answer.stream is not None:
                return await self._streamed(request, answer, answer.stream)
            if not self._limits.response_headers.in_use and (plain := plain_answer(request, answer, _plain_head)):
                return plain
            return self._to_web(answer)
        except paths.PathRefused as refused:
            return self._error(400, *refused.args)
        except _Refused as refused:
            return await self._refuse(request, refused)
        except TimeoutError:
            return self._error(503, "the request took too long and was given up; a write may still have been applied")
        except Exception:  # the edge: a defect must not reach the client as a trace, nor end the server
            incident = str(uuid.uuid4())
            log.exception("request failed: incident=%s", incident)
            return self._error(500, f"internal error (incident {incident})")
        finally:
            self._buffered_bytes -= held_bytes

    async def _other(self, request: web.BaseRequest, path: str) -> web.StreamResponse:
        if self._fallback is None:
            return self._error(404)
        paths.decode_path(path)
        return await self._fallback(request)

    def _check_head(self, request: web.BaseRequest) -> None:
        if request.version not in _VERSIONS:
            raise _Refused(505, "only HTTP/1.1 and HTTP/1.0 are served", close=True)
        if request.method not in _METHODS:
            # Closed, because what follows is not always a request: after CONNECT it would be somebody's tunnel.
            raise _Refused(405, close=True)
        if request.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise _Refused(415, "a compressed request body is not accepted", close=True)
        if self._limits.require_request_header and request.headers.get("X-Vault-Request") != "true":
            raise _Refused(412, "missing 'X-Vault-Request' header", close=True)

    def _reserve(self, request: web.BaseRequest) -> int:
        """Account for the body before reading it: its announced length, or the maximum when it is chunked."""
        length = request.content_length
        if length is None:
            length = self._limits.body_bytes_max if request.body_exists else 0
        if length > self._limits.body_bytes_max:
            raise _Refused(413, "request body too large", close=True)
        if self._buffered_bytes + length > self._limits.buffered_bytes_max:
            METRICS.increment("core.http.overloaded")
            raise _Refused(503, "too many large requests at once; try again", close=True)
        self._buffered_bytes += length
        return length

    async def _read_body(self, request: web.BaseRequest) -> bytes:
        if not request.body_exists:
            return b""
        await _continue(request)
        if request.content.is_eof() and request.content_length is not None:
            return request.content.read_nowait()  # as most bodies are: it came with its head
        parts: list[bytes] = []
        size_bytes = 0
        try:
            async with patience(self._limits.body_timeout_s):
                async for part in request.content.iter_any():
                    size_bytes += len(part)
                    if size_bytes > self._limits.body_bytes_max:
                        raise _Refused(413, "request body too large", close=True)
                    parts.append(part)
        except TimeoutError:
            raise _Refused(408, "the request body did not arrive in time", close=True) from None
        except ConnectionError:  # nobody is there any more to be answered
            raise _Refused(400, "the connection ended before the request did", close=True) from None
        return b"".join(parts)

    def _client_address(self, request: web.BaseRequest) -> str:
        """Decided before anything of the request is looked at or read."""
        rule = self._limits.forwarded_for
        peer = request.protocol.client_host if isinstance(request.protocol, Connection) else ""
        peer = peer or request.remote or ""
        if rule is None:
            return peer
        try:
            return rule.client_address(peer, request.headers.getall(HEADER, ()))
        except AddressRefused as refused:
            raise _Refused(400, str(refused), close=True) from None

    def _message(self, request: web.BaseRequest, path: str, query: str, body: bytes, address: str) -> HttpRequest:
        headers = _readable(request.headers)
        for name in [name for name in headers if name[: len(_INTERNAL_PREFIX)].lower() == _INTERNAL_PREFIX]:
            headers.popall(name, None)
        return HttpRequest(
            method=request.method,
            path=paths.decode_path(path)[len("v1/") :],
            query=paths.decode_query(query),
            headers=headers,
            body=body,
            remote_address=address,
            remote_port=_port_of(request),
            raw_target=request.raw_path,
            disclosure=self._limits.disclosure,
        )

    async def _refuse(self, request: web.BaseRequest, refused: _Refused) -> web.StreamResponse:
        response = self._error(refused.status, *refused.texts)
        if refused.status == HTTPStatus.SERVICE_UNAVAILABLE:
            response.headers["Retry-After"] = str(RETRY_AFTER_S)
        if refused.close:
            # The rest of the body is not read: the connection cannot carry another request.
            response.force_close()
            with suppress(ConnectionError):
                await response.prepare(request)
                await response.write_eof()
            if request.transport is not None:
                request.transport.close()
        return response

    async def _streamed(
        self, request: web.BaseRequest, answer: HttpResponse, pieces: AsyncGenerator[bytes]
    ) -> web.StreamResponse:
        """Send pieces as they come, until there are no more or the client has left."""
        response = web.StreamResponse(
            status=answer.status, reason=_reason(answer.status), headers=self._headers(answer)
        )
        response.force_close()
        with suppress(ConnectionError):
            await response.prepare(request)
            async with contextlib.aclosing(pieces) as open_pieces:
                async for piece in open_pieces:
                    if _has_left(request):
                        break
                    if piece:
                        await response.write(piece)
            await response.write_eof()
        return response

    def _to_web(self, answer: HttpResponse) -> web.Response:
        headers = self._headers(answer)
        return web.Response(status=answer.status, reason=_reason(answer.status), body=answer.body, headers=headers)

    def _error(self, status: int, *texts: str) -> web.Response:
        return self._to_web(HttpResponse(status, body=json_codec.encode(envelopes.errors(texts))))

    def _headers(self, answer: HttpResponse) -> CIMultiDict[str]:
        return self._limits.response_headers.added(answer.status, _own_headers(answer))


def _has_left(request: web.BaseRequest) -> bool:
    """Who waits for an answer may have closed the sending half before; whose stream has no end is gone with it."""
    ended = isinstance(request.protocol, Connection) and request.protocol.client_ended
    return ended or request.transport is None or request.transport.is_closing()


def _port_of(request: web.BaseRequest) -> int:
    """The port of the other end: the client's, or that of the proxy's connection. 0 where there is none, and where a
    PROXY header tells of another connection."""
    if request.transport is None or (isinstance(request.protocol, Connection) and request.protocol.client_host):
        return 0
    peer = request.transport.get_extra_info("peername")
    return int(peer[1]) if isinstance(peer, tuple) else 0


def _readable(headers: CIMultiDictProxy[str]) -> CIMultiDict[str]:
    """A copy in which every value is text. Bytes that are not UTF-8 come from aiohttp as lone surrogates, which cannot
    be sent to another node. RFC 9110 (5.5) calls them obsolete text, once ISO 8859-1, and they are read as that."""
    copied = headers.copy()
    for name in {name for name, value in copied.items() if not (value.isascii() or is_encodable(value))}:
        values = [value.encode("utf-8", "surrogateescape").decode("latin-1") for value in copied.popall(name)]
        for value in values:
            copied.add(name, value)
    return copied


async def _continue(request: web.BaseRequest) -> None:
    """Tell a client that waits with a large body to send it; its length has been accepted by now."""
    if request.version < (1, 1) or "Expect" not in request.headers:
        return
    if request.headers["Expect"].lower() != "100-continue":
        raise _Refused(417, close=True)
    # aiohttp does this for its own router only. What was sent here is no part of the answer.
    await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    request.writer.output_size = 0


def _own_headers(answer: HttpResponse) -> CIMultiDict[str]:
    if not answer.headers:
        return _ALWAYS.copy()
    headers = CIMultiDict(answer.headers)
    for name, value in _ALWAYS.items():
        headers.setdefault(name, value)
    headers["Server"] = SERVER_NAME
    return headers


@functools.lru_cache(maxsize=64)
def _plain_head(status: int) -> bytes:
    """Status line and headers of an answer that has none of its own."""
    lines = [f"HTTP/1.1 {status} {_reason(status)}", *(f"{name}: {value}" for name, value in _ALWAYS.items()), ""]
    return "\r\n".join(lines).encode()


@functools.cache
def _reason(status: int) -> str:
    """A phrase also for the numbers this API made up."""
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "Status"
