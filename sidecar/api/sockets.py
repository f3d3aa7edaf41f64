"""Listening sockets of the API port, opened apart from the server that will serve them.

The command opens them right after it has read its configuration, before it loads the server: who connects in that
second waits instead of being refused, as with a server that starts at once. Only standard modules, for that reason.
"""

from __future__ import annotations

import socket

BACKLOG = 512


def listening_sockets(host: str, port: int) -> list[socket.socket]:
    """A listening socket for each address of ``host``, non-blocking. Raises OSError, and then leaves none open."""
    infos = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    listeners: list[socket.socket] = []
    try:
        for family, address in dict.fromkeys((info[0], info[4]) for info in infos):
            listener = socket.create_server((address[0], address[1]), family=family, backlog=BACKLOG)
            listeners.append(listener)
            listener.setblocking(False)
    except OSError:
        for listener in listeners:
            listener.close()
        raise
    return listeners
