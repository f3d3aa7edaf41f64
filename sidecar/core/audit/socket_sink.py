"""Lines sent over TCP, UDP or a Unix stream socket."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Sequence
from functools import partial

from sidecar.core.audit.reconnecting import ReconnectingSocket
from sidecar.core.audit.sink import SinkError

TCP, UDP, UNIX = "tcp", "udp", "unix"
TYPES = (TCP, UDP, UNIX)


class SocketSink:
    """Connects to ``address`` (``host:port``, or a path for ``unix``). A connection that broke is made again once for
    every write; lines it may have taken already are sent again."""

    def __init__(self, kind: str, address: str, *, timeout_s: float) -> None:
        self._kind = kind
        self._address = address
        self._timeout_s = timeout_s
        self._connection = ReconnectingSocket(self._connect)

    def write(self, lines: Sequence[bytes]) -> None:
        self._connection.send(partial(self._transmit, lines=lines))

    def reopen(self) -> None:
        self._connection.reopen()

    def close(self) -> None:
        self._connection.close()

    def _transmit(self, connection: socket.socket, lines: Sequence[bytes]) -> None:
        if self._kind == UDP:
            for line in lines:
                connection.send(line)
        else:
            connection.sendall(b"".join(lines))

    def _connect(self) -> socket.socket:
        if self._kind == TCP:
            return socket.create_connection(split_host(self._address), self._timeout_s)
        if self._kind == UDP:
            family, kind, protocol, _, target = socket.getaddrinfo(*split_host(self._address), type=socket.SOCK_DGRAM)[
                0
            ]
            return _connected(socket.socket(family, kind, protocol), target, self._timeout_s)
        return _connected(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM), self._address, self._timeout_s)


def split_host(address: str) -> tuple[str, int]:
    """``host:port`` or ``[v6]:port``. Raises SinkError."""
    host, _, port = address.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise SinkError("the address is not host:port")
    return host.removeprefix("[").removesuffix("]"), int(port)


def _connected(made: socket.socket, target: object, timeout_s: float) -> socket.socket:
    with contextlib.ExitStack() as stack:
        stack.callback(made.close)
        made.settimeout(timeout_s)
        made.connect(target)  # type: ignore[arg-type]  # what getaddrinfo gave, or a path
        stack.pop_all()
        return made
