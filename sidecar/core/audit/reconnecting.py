"""A socket that a sink sends over, connected when there is something to send."""

from __future__ import annotations

import socket
from collections.abc import Callable


class ReconnectingSocket:
    """Connects by ``connect``. A connection that broke is made again once for every send, so what is sent must bear
    being sent twice."""

    def __init__(self, connect: Callable[[], socket.socket]) -> None:
        self._connect = connect
        self._socket: socket.socket | None = None

    def send(self, transmit: Callable[[socket.socket], None]) -> None:
        """Have ``transmit`` send over the connection. Raises OSError or what ``connect`` raises."""
        if self._socket is not None and not _is_open(self._socket):
            self.close()
        fresh = self._socket is None
        try:
            self._attempt(transmit)
        except OSError:
            if fresh:
                raise
            self._attempt(transmit)

    def reopen(self) -> None:
        """Make a new connection. Raises OSError or what ``connect`` raises."""
        self.close()
        self._socket = self._connect()

    def close(self) -> None:
        """End the connection, if there is one; the next send makes another."""
        connection, self._socket = self._socket, None
        if connection is not None:
            connection.close()

    def _attempt(self, transmit: Callable[[socket.socket], None]) -> None:
        if self._socket is None:
            self._socket = self._connect()
        try:
            transmit(self._socket)
        except OSError:
            # Half a line may be on its way: only a new connection begins with a whole one.
            self.close()
            raise


def _is_open(connection: socket.socket) -> bool:
    """False once the other side closed a stream: the first write after that would be lost without an error."""
    if connection.type == socket.SOCK_DGRAM:
        return True
    try:
        return bool(connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
    except BlockingIOError:
        return True
    except OSError:
        return False
