"""One TLS port for every purpose of the cluster port, told apart by SNI *and* ALPN.

A purpose is a server name, an ALPN protocol, a server certificate, the one authority whose clients it takes, and a
handler. Rules, each held by a test of the matrix:

* no or unknown server name, no or another ALPN protocol, no client certificate, one of another authority, or one that
  ``allow`` refuses: the connection ends before a byte of it reaches a handler;
* ``allow`` is asked again for every request, and :meth:`ClusterListener.cut` aborts what is open, so a revoked peer is
  out at once, whatever it had open;
* the Host header must name the same purpose as the SNI did (421 otherwise).

A listener without purposes refuses everybody: that is a standby that has nothing to offer.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from sidecar.transport.certificates import Credentials, fingerprint
from sidecar.transport.tls import base_server_context, limit_tls_buffers, server_context

logger = logging.getLogger(__name__)

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True)
class Purpose:
    """What one (SNI name, ALPN protocol) pair serves.

    ``allow`` is asked with the client certificate's fingerprint when a connection is made and again for each request;
    it must be quick and must not raise.
    """

    sni: str
    alpn: str
    credentials: Credentials
    trust_root_pem: bytes
    handler: Handler
    allow: Callable[[str], bool]


@dataclass(frozen=True, slots=True)
class Peer:
    """The authenticated other end of a request: its certificate's fingerprint, its common name, its ``host:port``."""

    fingerprint: str
    common_name: str
    address: str


@dataclass(frozen=True, slots=True)
class ListenerOptions:
    """Bounds. ``body_bytes_max`` holds a merkle diff of 64 MiB; each call's own limit is smaller or equal."""

    handshake_timeout_s: float = 10.0
    connections_max: int = 1024
    body_bytes_max: int = 65 * 1024 * 1024
    keepalive_s: float = 75.0


@dataclass(eq=False, slots=True)
class _Entry:
    purpose: Purpose
    server: web.Server
    connections: set[_Connection] = field(default_factory=set)
    left: asyncio.Event = field(default_factory=asyncio.Event)

    def forget(self, connection: _Connection) -> None:
        """``connection`` is gone."""
        self.connections.discard(connection)
        if not self.connections:
            self.left.set()


class ClusterListener:
    """The cluster port of this node: where to listen; port 0 picks a free one (see :attr:`port`)."""

    def __init__(self, host: str, port: int, options: ListenerOptions | None = None) -> None:
        self._host = host
        self._port = port
        self._options = options or ListenerOptions()
        self._entries: dict[str, _Entry] = {}
        self._contexts: dict[str, ssl.SSLContext] = {}
        self._server: asyncio.Server | None = None
        self._refused = 0

    @property
    def port(self) -> int:
        """The port listened on; differs from the one asked for when that was 0."""
        if self._server is None or not self._server.sockets:
            return self._port
        bound: int = self._server.sockets[0].getsockname()[1]
        return bound

    async def start(self) -> None:
        """Bind and accept. Raises OSError when the address is taken."""
        limit_tls_buffers()
        base = base_server_context()
        base.sni_callback = self._choose
        self._server = await asyncio.get_running_loop().create_server(
            lambda: _Connection(self),
            self._host,
            self._port,
            ssl=base,
            ssl_handshake_timeout=self._options.handshake_timeout_s,
            backlog=128,
        )

    async def close(self) -> None:
        """Stop accepting and abort every connection."""
        if self._server is not None:
            self._server.close()
        for sni in tuple(self._entries):
            await self.remove(sni)
        if self._server is not None:
            await self._server.wait_closed()

    def add(self, purpose: Purpose) -> None:
        """Serve ``purpose``. Raises ValueError if its SNI name is served already, ssl.SSLError for bad credentials."""
        if purpose.sni in self._entries:
            raise ValueError(f"the cluster port serves {purpose.sni} already")
        context = server_context(purpose.credentials, purpose.trust_root_pem, purpose.alpn)
        server = web.Server(
            self._guarded(purpose),
            request_factory=self._make_request,
            access_log=None,
            keepalive_timeout=self._options.keepalive_s,
            auto_decompress=False,
        )
        self._entries[purpose.sni] = _Entry(purpose, server)
        self._contexts[purpose.sni] = context

    def renew(self, sni: str, credentials: Credentials, trust_root_pem: bytes) -> None:
        """Show another certificate for ``sni`` and trust these authorities, for connections made from now on; those
        that are open stay. Unknown names are no failure. Raises ssl.SSLError for bad credentials."""
        entry = self._entries.get(sni)
        if entry is not None:
            self._contexts[sni] = server_context(credentials, trust_root_pem, entry.purpose.alpn)

    async def remove(self, sni: str) -> None:
        """Stop serving ``sni``: abort its connections, cancel their handlers. Unknown names are no failure."""
        entry = self._entries.pop(sni, None)
        self._contexts.pop(sni, None)
        if entry is None:
            return
        for connection in tuple(entry.connections):
            connection.abort()
        await entry.server.shutdown(timeout=1.0)

    async def retire(self, sni: str, linger_s: float, *, at_least_s: float = 0.0) -> None:
        """:meth:`remove` once nobody is connected for ``sni`` any more, at the latest after ``linger_s``, and not
        before ``at_least_s``. New connections are taken until then: who knocks is to hear a refusal, which is better
        than nothing."""
        await asyncio.sleep(at_least_s)
        entry = self._entries.get(sni)
        if entry is not None and linger_s > 0:
            with suppress(TimeoutError):
                async with asyncio.timeout(linger_s):
                    while entry.connections:
                        entry.left.clear()
                        await entry.left.wait()
        await self.remove(sni)

    def cut(self, client_fingerprint: str) -> int:
        """Abort every open connection made with this client certificate; returns how many there were."""
        doomed = [
            connection
            for entry in self._entries.values()
            for connection in entry.connections
            if connection.peer is not None and connection.peer.fingerprint == client_fingerprint
        ]
        for connection in doomed:
            connection.abort()
        return len(doomed)

    def statistics(self) -> dict[str, int]:
        """``connections`` open now, and ``refused`` after a complete handshake since the start."""
        return {"connections": self._open(), "refused": self._refused}

    def _open(self) -> int:
        return sum(len(entry.connections) for entry in self._entries.values())

    def _choose(self, tls: Any, name: str | None, _base: ssl.SSLContext) -> int | None:
        context = self._contexts.get(name or "")
        if context is None:
            return ssl.ALERT_DESCRIPTION_UNRECOGNIZED_NAME
        tls.context = context
        return None

    def admit(self, transport: asyncio.Transport) -> tuple[_Entry, Peer] | None:
        """The purpose and peer of a connection whose handshake is complete, or None if it must be dropped."""
        tls: ssl.SSLObject = transport.get_extra_info("ssl_object")
        entry = next((e for sni, e in self._entries.items() if self._contexts[sni] is tls.context), None)
        certificate = tls.getpeercert(binary_form=True)
        if entry is None or certificate is None or tls.selected_alpn_protocol() != entry.purpose.alpn:
            self._refused += 1
            return None
        peer = Peer(fingerprint(certificate), _common_name(tls), _address(transport))
        if not entry.purpose.allow(peer.fingerprint) or self._open() >= self._options.connections_max:
            self._refused += 1
            logger.warning("cluster port: refused a connection for %s from %s", entry.purpose.alpn, peer.address)
            return None
        return entry, peer

    def _guarded(self, purpose: Purpose) -> Handler:
        async def handle(request: web.BaseRequest) -> web.StreamResponse:
            peer = peer_of(request)
            if not purpose.allow(peer.fingerprint):
                if request.transport is not None:
                    request.transport.abort()
                raise web.HTTPForbidden(text="this certificate is revoked")
            if (request.host or "").rsplit(":", 1)[0] != purpose.sni:
                raise web.HTTPMisdirectedRequest(text="the Host header names another server than the TLS handshake did")
            return await purpose.handler(request)

        return handle

    def _make_request(
        self,
        message: Any,
        payload: Any,
        protocol: Any,
        writer: Any,
        task: asyncio.Task[None],
    ) -> web.BaseRequest:
        return web.BaseRequest(
            message,
            payload,
            protocol,
            writer,
            task,
            asyncio.get_running_loop(),
            client_max_size=self._options.body_bytes_max,
        )


class _Connection(asyncio.Protocol):
    """One accepted connection: decides by what the handshake negotiated, then passes everything on to aiohttp."""

    def __init__(self, listener: ClusterListener) -> None:
        self._listener = listener
        self._transport: asyncio.Transport | None = None
        self._entry: _Entry | None = None
        self._inner: Any = None
        self._aborted = False
        self.peer: Peer | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if not isinstance(transport, asyncio.Transport):
            raise TypeError("the cluster port accepts streams only")
        admitted = self._listener.admit(transport)
        if admitted is None:
            transport.abort()
            return
        self._transport = transport
        self._entry, self.peer = admitted
        self._entry.connections.add(self)
        self._inner = self._entry.server()
        self._inner.connection_made(transport)

    def data_received(self, data: bytes) -> None:
        if self._inner is not None and not self._aborted:
            self._inner.data_received(data)

    def eof_received(self) -> bool | None:
        return self._inner.eof_received() if self._inner is not None else None

    def pause_writing(self) -> None:
        if self._inner is not None:
            self._inner.pause_writing()

    def resume_writing(self) -> None:
        if self._inner is not None:
            self._inner.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._entry is not None:
            self._entry.forget(self)
        if self._inner is not None:
            self._inner.connection_lost(exc)

    def abort(self) -> None:
        """Drop the connection now, unsent bytes included; nothing that still arrives on it is read."""
        self._aborted = True
        if self._entry is not None:
            self._entry.forget(self)
        if self._transport is not None:
            self._transport.abort()


def peer_of(request: web.BaseRequest) -> Peer:
    """Who sent ``request``, from its TLS connection. Raises ConnectionResetError when that is gone."""
    transport = request.transport
    tls = transport.get_extra_info("ssl_object") if transport is not None else None
    certificate = tls.getpeercert(binary_form=True) if tls is not None else None
    if transport is None or tls is None or certificate is None:
        raise ConnectionResetError("the connection is gone")
    return Peer(fingerprint(certificate), _common_name(tls), _address(transport))


def _common_name(tls: ssl.SSLObject) -> str:
    subject = (tls.getpeercert() or {}).get("subject", ())
    for attributes in subject:
        for attribute in attributes:
            if len(attribute) == 2 and attribute[0] == "commonName":
                return str(attribute[1])
    return ""


def _address(transport: asyncio.BaseTransport) -> str:
    name = transport.get_extra_info("peername")
    return f"{name[0]}:{name[1]}" if isinstance(name, tuple) else ""
