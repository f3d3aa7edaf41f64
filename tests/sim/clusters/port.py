"""Cluster ports: the sockets of replication, simulated.

Production code dials with a ``PeerClient`` and serves on a ``ClusterListener``; here are both without TCP, TLS and HTTP
(:mod:`tests.sim.clusters.seams` puts them in). What TLS decides is decided here the same way: a certificate of another
authority, an SNI name that nobody serves, or a fingerprint that the purpose does not allow, ends the connection.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from aiohttp import web

from consul_backend.errors import BackendError
from sidecar.replication.channel import ChannelClosed
from sidecar.transport.listener import Peer, Purpose
from sidecar.transport.peer import (
    PeerAnswer,
    PeerIdentity,
    PeerOutcomeUnknown,
    PeerRefused,
    PeerStream,
    PeerUnreachable,
    parse_address,
)
from tests.sim.clusters.links import Channel, Connection, Links
from tests.sim.clusters.papers import fingerprint, name_in, vouches
from tests.sim.loop import Process

if TYPE_CHECKING:
    from tests.sim.clusters.node import SetNode


@dataclass(slots=True)
class _Entry:
    purpose: Purpose
    connections: list[Connection] = field(default_factory=list)
    handlers: set[asyncio.Task[None]] = field(default_factory=set)


class Request:
    """What a handler gets: the part of ``web.BaseRequest`` that production code reads."""

    def __init__(self, method: str, path: str, body: bytes, channel: Channel, peer: Peer) -> None:
        self.method = method
        self.path = path
        self.channel = channel
        self.peer = peer
        self._body = body

    async def read(self) -> bytes:
        """The whole body."""
        return self._body


class StreamResponse:
    """A long answer: pieces behind a status."""

    def __init__(self, headers: Mapping[str, str]) -> None:
        self.status = 200
        self._channel: Channel | None = None

    async def prepare(self, request: Request) -> None:
        self._channel = request.channel
        await request.channel.send(("status", 200, b""))

    async def write(self, piece: bytes) -> None:
        assert self._channel is not None
        try:
            await self._channel.send(piece)
        except ChannelClosed as closed:
            raise ConnectionResetError(str(closed)) from None

    async def write_eof(self) -> None:
        assert self._channel is not None
        await self._channel.close("eof")


class Port:
    """One process's ``ClusterListener``."""

    def __init__(self, links: Links, node: SetNode) -> None:
        self._links = links
        self._node = node
        self._entries: dict[str, _Entry] = {}

    def add(self, purpose: Purpose) -> None:
        """Serve it from now on."""
        if purpose.sni in self._entries:
            raise ValueError(f"the cluster port serves {purpose.sni} already")
        self._entries[purpose.sni] = _Entry(purpose)

    def renew(self, sni: str, credentials: object, trust_root_pem: bytes) -> None:
        """Certificates do not age here."""

    async def remove(self, sni: str) -> None:
        """Stop serving it: abort, cancel."""
        entry = self._entries.pop(sni, None)
        if entry is None:
            return
        for connection in list(entry.connections):
            connection.abort(by=connection.server)
        handlers = sorted(entry.handlers, key=hash)
        for handler in handlers:
            handler.cancel()
        if handlers:
            await asyncio.wait(handlers, timeout=1.0)

    def cut(self, client_fingerprint: str) -> int:
        """Abort what was opened with that certificate."""
        doomed = [
            connection
            for entry in self._entries.values()
            for connection in entry.connections
            if connection.peer.fingerprint == client_fingerprint
        ]
        for connection in doomed:
            connection.abort(by=connection.server)
        return len(doomed)

    def admit(self, links: Links, identity: PeerIdentity, client: Process, ways: tuple[str, str]) -> Connection | str:
        """What the handshake and the allow list say to whoever dials."""
        entry = self._entries.get(identity.sni)
        if entry is None or entry.purpose.alpn != identity.alpn:
            return "the TLS handshake was refused"
        if not vouches(identity.authority_pem, entry.purpose.credentials.certificate_pem):
            return "the server's certificate is not of the expected authority or name"
        shown = identity.credentials.certificate_pem
        if not vouches(entry.purpose.trust_root_pem, shown) or not entry.purpose.allow(fingerprint(shown)):
            return "the connection was ended without an answer"
        peer = Peer(fingerprint(shown), name_in(shown), ways[0])
        connection = Connection(links, client, self._node.process, ways, peer)
        entry.connections.append(connection)
        links.watcher.opened(self._node, peer.fingerprint)
        handler = self._node.process.spawn(self._serve(entry, connection))
        entry.handlers.add(handler)
        handler.add_done_callback(entry.handlers.discard)
        return connection

    async def _serve(self, entry: _Entry, connection: Connection) -> None:
        channel = connection.server
        try:
            method, path, body = await channel.recv()
            request = Request(method, path, body, channel, connection.peer)
            if not entry.purpose.allow(connection.peer.fingerprint):
                connection.abort(by=channel)
                return
            response = await entry.purpose.handler(request)  # type: ignore[arg-type]  # the part of one that is read
            if isinstance(response, web.Response):
                raw = response.body
                await channel.send(("whole", response.status, bytes(raw) if isinstance(raw, bytes) else b""))
                await channel.close("done")
        except (ChannelClosed, ConnectionError, BackendError):
            connection.abort(by=channel)  # as aiohttp does with a handler that failed, once it has begun to answer
        except Exception as error:  # whatever it is, production code let it out
            connection.abort(by=channel)
            self._links.watcher.crashed(self._node.process, error)
        finally:
            entry.connections.remove(connection)


async def accept_websocket(request: Request) -> Channel:
    """The server's side of an upgrade."""
    await request.channel.send(("status", 101, b""))
    request.channel.carries_log = True
    return request.channel


# ---- the dialling side


async def _whole(body: bytes) -> AsyncIterator[bytes]:
    """The pieces of an answer that came at once."""
    yield body


class PortClient:
    """Stands for ``PeerClient`` on these links."""

    def __init__(
        self,
        links: Links,
        identity: PeerIdentity,
        address: str,
        *,
        connect_timeout_s: float = 5.0,
    ) -> None:
        parse_address(address)
        self._links = links
        self.address = address
        self._identity = identity
        self._timeout_s = connect_timeout_s
        self._open: list[Connection] = []

    async def _dial(self) -> Connection:
        connection = await self._links.dial(self._identity, self.address, self._timeout_s)
        self._open = [one for one in self._open if not one.client.closed] + [connection]
        return connection

    async def post(self, path: str, body: bytes, *, timeout_s: float, answer_bytes_max: int = 0) -> PeerAnswer:
        try:
            async with asyncio.timeout(timeout_s):
                connection = await self._dial()
                try:
                    await connection.client.send(("POST", path, body))
                    _, status, answer = await connection.client.recv()
                    return PeerAnswer(status, answer)
                finally:
                    await connection.client.close("done")
        except TimeoutError:
            raise PeerOutcomeUnknown(f"{self.address}: no answer within {timeout_s:g} s") from None
        except ChannelClosed as closed:
            raise PeerOutcomeUnknown(f"{self.address}: {closed}") from None

    @asynccontextmanager
    async def stream(self, path: str, body: bytes, *, idle_timeout_s: float) -> AsyncIterator[PeerStream]:
        connection = await self._dial()
        channel = connection.client
        try:
            try:
                await channel.send(("POST", path, body))
                async with asyncio.timeout(idle_timeout_s):
                    kind, status, body = await channel.recv()
            except (ChannelClosed, TimeoutError) as error:
                raise PeerOutcomeUnknown(f"{self.address}: {error}") from None
            pieces = _whole(body) if kind == "whole" else self._pieces(channel, idle_timeout_s)
            yield PeerStream(status, pieces)
        finally:
            await channel.close("done")

    async def _pieces(self, channel: Channel, idle_timeout_s: float) -> AsyncIterator[bytes]:
        while True:
            try:
                async with asyncio.timeout(idle_timeout_s):
                    piece = await channel.recv()
            except (ChannelClosed, TimeoutError) as error:
                if str(error).endswith("eof"):
                    return
                raise PeerOutcomeUnknown(f"{self.address}: {error}") from None
            yield piece

    async def websocket(self, path: str, *, message_bytes_max: int, open_timeout_s: float = 10.0) -> Channel:
        connection = await self._dial()
        try:
            async with asyncio.timeout(open_timeout_s):
                await connection.client.send(("GET", path, b""))
                _, status, _ = await connection.client.recv()
        except (ChannelClosed, TimeoutError) as error:
            connection.abort(by=connection.client)
            raise PeerUnreachable(f"{self.address}: {error}") from None
        if status != 101:
            await connection.client.close("refused")
            raise PeerRefused(status, f"{self.address} answered {status} to {path}")
        return connection.client

    async def close(self) -> None:
        for connection in self._open:
            if not connection.client.closed:
                await connection.client.close("the client was closed")
