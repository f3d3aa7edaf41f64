"""Lines handed to the machine's own syslog."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence

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
        self._socket: socket.socket | None = None

    def write(self, lines: Sequence[bytes]) -> None:
        for line in lines:
            message = self._message(line)
            fresh = self._socket is None
            try:
                self._send(message)
            except OSError:
                if fresh:
                    raise
                self._send(message)

    def reopen(self) -> None:
        self.close()
        self._socket = self._connect()

    def close(self) -> None:
        connection, self._socket = self._socket, None
        if connection is not None:
            connection.close()

    def _message(self, line: bytes) -> bytes:
        stamp = time.strftime("%b %e %H:%M:%S")
        return f"<{self._priority}>{stamp} {self._tag}[{os.getpid()}]: ".encode() + line

    def _send(self, message: bytes) -> None:
        if self._socket is None:
            self._socket = self._connect()
        try:
            if self._socket.type == socket.SOCK_DGRAM:
                self._socket.send(message.rstrip(b"\n"))
            else:
                self._socket.sendall(message)
        except OSError:
            self.close()
            raise

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
