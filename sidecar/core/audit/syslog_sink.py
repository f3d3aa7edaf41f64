"""Lines handed to the machine's own syslog."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from functools import partial

from sidecar.core.audit.reconnecting import ReconnectingSocket
from sidecar.core.audit.sink import SinkError

SOCKETS = ("/dev/log", "/var/run/syslog", "/var/run/log")
_FACILITIES = (
    *("KERN", "USER", "MAIL", "DAEMON", "AUTH", "SYSLOG", "LPR", "NEWS", "UUCP", "CRON", "AUTHPRIV", "FTP"),
    *("", "", "", ""),
    *(f"LOCAL{number}" for number in range(8)),
)
FACILITIES = {name: number for number, name in enumerate(_FACILITIES) if name}
_INFO = 6


class SyslogSink:
    """Sends to the first of ``sockets`` that takes it, one message a line, as ``facility`` (a key of FACILITIES) at
    level info."""

    def __init__(self, facility: str, tag: str, *, timeout_s: float, sockets: Sequence[str] = SOCKETS) -> None:
        self._priority = FACILITIES[facility] * 8 + _INFO
        self._tag = tag
        self._timeout_s = timeout_s
        self._sockets = sockets
        self._connection = ReconnectingSocket(self._connect)

    def write(self, lines: Sequence[bytes]) -> None:
        for line in lines:
            message = self._message(line)
            self._connection.send(partial(_transmit, message=message))

    def reopen(self) -> None:
        self._connection.reopen()

    def close(self) -> None:
        self._connection.close()

    def _message(self, line: bytes) -> bytes:
        stamp = time.strftime("%b %e %H:%M:%S")
        return f"<{self._priority}>{stamp} {self._tag}[{os.getpid()}]: ".encode() + line

    def _connect(self) -> socket.socket:
        for path in self._sockets:
            for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM):
                made = socket.socket(socket.AF_UNIX, kind)
                try:
                    made.settimeout(self._timeout_s)
                    made.connect(path)
                except OSError:
                    made.close()
                else:
                    return made
        raise SinkError("no syslog is listening on this machine")


def _transmit(connection: socket.socket, message: bytes) -> None:
    if connection.type == socket.SOCK_DGRAM:
        connection.send(message.rstrip(b"\n"))
    else:
        connection.sendall(message)
