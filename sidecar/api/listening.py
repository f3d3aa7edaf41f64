"""The sockets of the API port: TCP and Unix, with TLS, with a PROXY header before it.

A PROXY header comes before the TLS handshake. It is looked at while it still lies in the socket's buffer and taken out
to the byte, so that whoever reads the connection next sees it as if nothing had been there.
"""

from __future__ import annotations

import asyncio
import grp
import logging
import os
import pwd
import socket
import ssl
import stat
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from sidecar.api.patience import patience
from sidecar.api.proxy_protocol import NO_HEADER, V2_BYTES_MAX, Header, MalformedHeader, ProxyRule, parse
from sidecar.api.sockets import BACKLOG

log = logging.getLogger("http")

HANDSHAKE_TIMEOUT_S = 5.0
HEADER_TIMEOUT_S = 5.0
# asyncio's own timer goes by the clock; ours by the loop's turns decides. Its own is for a loop that never recovers.
_ASYNCIO_HANDSHAKE_S = 600.0
_ACCEPT_RETRY_S = 0.1

ProtocolFactory = Callable[[str], asyncio.Protocol]
"""Makes a connection's protocol, from the client's address where a proxy told it, else from an empty text."""


@dataclass(frozen=True, slots=True)
class SocketAccess:
    """Who may use a Unix socket; None and empty leave the process' own. ``user`` and ``group`` are names or numbers."""

    mode: int | None = None
    user: str = ""
    group: str = ""


class Listening:
    """Listening sockets of one server. ``connections_max`` bounds the connections of each that wait for their PROXY
    header or handshake."""

    def __init__(self, factory: ProtocolFactory, *, connections_max: int) -> None:
        self._factory = factory
        self._connections_max = connections_max
        self._servers: list[asyncio.Server] = []
        self._accepting: list[asyncio.Task[None]] = []
        self._sockets: list[socket.socket] = []
        self._paths: list[str] = []
        self._addresses: list[tuple[str, int]] = []

    @property
    def addresses(self) -> list[tuple[str, int]]:
        """(host, port) of every TCP socket, in the order they were opened."""
        return list(self._addresses)

    async def tcp(
        self, listeners: Sequence[socket.socket], tls: ssl.SSLContext | None, proxy: ProxyRule | None
    ) -> tuple[str, int]:
        """Serve listening sockets, which are this object's to close from here on; returns the first one's (host, port),
        which matters for port 0."""
        loop = asyncio.get_running_loop()
        bound = listeners[0].getsockname()
        if proxy is None and tls is None:
            for each in listeners:
                server = await loop.create_server(lambda: self._factory(""), sock=each, backlog=BACKLOG)
                self._servers.append(server)
        else:
            self._sockets.extend(listeners)
            self._accepting.extend(
                asyncio.create_task(self._accept(each, tls, proxy), name="accept") for each in listeners
            )
        self._addresses.append((bound[0], bound[1]))
        return self._addresses[-1]

    async def unix(self, path: str, access: SocketAccess) -> None:
        """Open a Unix socket, in the place of one that an earlier process left. Raises OSError, also where another
        process listens there, and for a user or group that there is none of."""
        bound = _bind_unix(path, access)
        self._paths.append(path)
        loop = asyncio.get_running_loop()
        self._servers.append(await loop.create_unix_server(lambda: self._factory(""), sock=bound, backlog=BACKLOG))

    async def close(self) -> None:
        """Take no more connections."""
        for task in self._accepting:
            task.cancel()
        await asyncio.gather(*self._accepting, return_exceptions=True)
        for each in self._sockets:
            each.close()
        for server in self._servers:
            server.close()
        for path in self._paths:
            with suppress(OSError):
                os.unlink(path)
        self._servers, self._accepting, self._sockets, self._paths, self._addresses = [], [], [], [], []

    # -- with TLS or a PROXY header: what comes before the first byte of HTTP has its own deadline

    async def _accept(self, listener: socket.socket, tls: ssl.SSLContext | None, proxy: ProxyRule | None) -> None:
        """Take connections until cancelled; none of them can end it, whatever it sends."""
        loop = asyncio.get_running_loop()
        free = asyncio.Semaphore(self._connections_max)
        async with asyncio.TaskGroup() as tasks:
            while True:
                await free.acquire()
                try:
                    connection, _ = await loop.sock_accept(listener)
                except OSError as error:
                    free.release()
                    log.warning("a connection could not be accepted: %s", error)
                    await asyncio.sleep(_ACCEPT_RETRY_S)  # out of file descriptors, mostly: not in a hot loop
                    continue
                task = tasks.create_task(self._introduce(connection, tls, proxy), name="connection")
                task.add_done_callback(lambda _: free.release())

    async def _introduce(self, connection: socket.socket, tls: ssl.SSLContext | None, proxy: ProxyRule | None) -> None:
        """Read the header of one connection, if there is to be one, and hand the connection over."""
        loop = asyncio.get_running_loop()
        ours = True
        try:
            connection.setblocking(False)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            client = ""
            if proxy is not None:
                client = await _client_of(loop, connection, proxy)
            ours = False  # from here on the loop closes it, also when the handshake fails
            async with patience(HANDSHAKE_TIMEOUT_S if tls else 0.0):
                await loop.connect_accepted_socket(
                    lambda: self._factory(client),
                    connection,
                    ssl=tls,
                    ssl_handshake_timeout=_ASYNCIO_HANDSHAKE_S if tls else None,
                )
        except (OSError, TimeoutError, MalformedHeader) as error:
            log.debug("a connection was closed before its first request: %s: %s", type(error).__name__, error)
        finally:
            if ours:
                connection.close()


async def _client_of(loop: asyncio.AbstractEventLoop, connection: socket.socket, proxy: ProxyRule) -> str:
    """The client's address as the proxy tells it, empty where the proxy is not believed. Raises ConnectionError for one
    that is refused, TimeoutError, MalformedHeader, OSError."""
    peer = str(connection.getpeername()[0])
    if proxy.refuses(peer):
        log.warning("a connection from %s was closed: not one of proxy_protocol_authorized_addrs", peer)
        raise ConnectionAbortedError("not one of proxy_protocol_authorized_addrs")
    async with patience(HEADER_TIMEOUT_S):
        header = await _take_header(loop, connection)
    return header.client if proxy.trusts(peer) else ""


async def _take_header(loop: asyncio.AbstractEventLoop, connection: socket.socket) -> Header:
    """Take a header out of the socket's buffer. Raises MalformedHeader, OSError."""
    seen = -1
    while True:
        try:
            data = connection.recv(V2_BYTES_MAX, socket.MSG_PEEK)
        except BlockingIOError:
            await _readable(loop, connection)
            continue
        header = parse(data)
        if header is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)
            if header is not NO_HEADER:
                connection.recv(header.length)
            return header
        if len(data) == seen or not data:
            raise MalformedHeader("the connection ended within its header")
        seen = len(data)
        # What was looked at stays readable: wait until there is more than that.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, seen + 1)
        await _readable(loop, connection)


async def _readable(loop: asyncio.AbstractEventLoop, connection: socket.socket) -> None:
    ready = loop.create_future()

    def wake() -> None:
        if not ready.done():
            ready.set_result(None)

    loop.add_reader(connection.fileno(), wake)
    try:
        await ready
    finally:
        loop.remove_reader(connection.fileno())


def _bind_unix(path: str, access: SocketAccess) -> socket.socket:
    owner = (_user(access.user), _group(access.group))
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except OSError:
            if os.path.lexists(path) and stat.S_ISSOCK(os.lstat(path).st_mode):
                os.unlink(path)  # left by a process that is no more
        else:
            raise OSError(f"another process listens on {path}")
    bound = socket.socket(socket.AF_UNIX)
    umask = os.umask(0o077)  # nobody else may connect before the mode is what it shall be
    try:
        bound.bind(path)
        if owner != (-1, -1):
            os.chown(path, *owner)
        if access.mode is not None:
            os.chmod(path, access.mode)
    except OSError as error:
        bound.close()
        raise OSError(error.errno, f"{error.strerror}: {path}") from error
    finally:
        os.umask(umask)
    return bound


def _user(name: str) -> int:
    return _number(name, lambda: pwd.getpwnam(name).pw_uid, "user")


def _group(name: str) -> int:
    return _number(name, lambda: grp.getgrnam(name).gr_gid, "group")


def _number(name: str, look_up: Callable[[], int], what: str) -> int:
    if not name:
        return -1
    if name.isdigit():
        return int(name)
    try:
        return look_up()
    except KeyError:
        raise OSError(f"there is no {what} {name!r} for the Unix socket") from None
