"""TCP ports on loopback that nobody takes between the moment they are chosen and the moment they are listened on.

A port that the kernel hands out for nothing ("bind to 0") may be given a moment later to any outgoing connection of the
machine, also while a killed node is about to start again on it. So ports come from below the range that connections are
given, and each test process takes them from a block of its own, in turn: a number comes back only when all the others
of the block have been used.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import socket
from collections.abc import Iterator
from pathlib import Path

FIRST_PORT = 10_000
BLOCK_PORTS = 200
_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_DEFAULT_RANGE_BEGIN = 32_768


class PortBlock:
    """``held`` is bound to the block's first port for as long as this process lives: that is how others know."""

    def __init__(self, held: socket.socket) -> None:
        self._held = held
        first = int(held.getsockname()[1])
        self._turn = itertools.cycle(range(first + 1, first + BLOCK_PORTS))

    def take(self) -> int:
        """The next port of the block that nobody listens on. Raises OSError when there is none."""
        for port in itertools.islice(self._turn, BLOCK_PORTS - 1):
            with contextlib.suppress(OSError), _bound(port):
                return port
        raise OSError(f"every port of the block at {self._held.getsockname()[1]} is in use")

    def close(self) -> None:
        """Let somebody else have the block."""
        self._held.close()


def _bound(port: int) -> socket.socket:
    made = socket.socket()
    try:
        made.bind(("127.0.0.1", port))
    except OSError:
        made.close()
        raise
    return made


def _blocks() -> Iterator[int]:
    """First ports of all the blocks there are, in an order of this process's own."""
    begin = int(_RANGE.read_text(encoding="ascii").split()[0]) if _RANGE.exists() else _DEFAULT_RANGE_BEGIN
    starts = list(range(FIRST_PORT, begin - BLOCK_PORTS + 1, BLOCK_PORTS))
    random.Random().shuffle(starts)
    yield from starts


def take_block() -> PortBlock | None:
    """A block that no other process has; None where connections are given every port."""
    for start in _blocks():
        with contextlib.suppress(OSError):
            return PortBlock(_bound(start))
    return None


_block: PortBlock | None = None


def free_port() -> int:
    """A port on loopback for this process's nodes. Raises OSError."""
    global _block
    _block = _block or take_block()
    if _block is not None:
        return _block.take()
    with _bound(0) as probe:
        return int(probe.getsockname()[1])


def two_free_ports() -> int:
    """The first of two ports that follow each other. Raises OSError."""
    while True:
        port = free_port()
        if _block is not None:
            if free_port() == port + 1:
                return port
            continue
        with contextlib.suppress(OSError), _bound(port + 1):
            return port
