"""How much asyncio asks of a socket at once: 64 KiB instead of 256.

asyncio takes memory for all of it before each read and gives back what was not filled. The C library maps 128 KiB and
more anew each time where its heap has no room for it, which in some processes it never has: two page faults and three
system calls a read, 25 µs of a request's 100. Less than that always comes from the heap. TLS connections read into a
buffer of their own.
"""

from __future__ import annotations

from asyncio import selector_events

READ_BYTES = 64 * 1024


def limit_socket_reads() -> None:
    """Set it for every connection of this process.

    The class is private to asyncio; a unit test fails should a Python release rename it or stop using it.
    """
    selector_events._SelectorTransport.max_size = READ_BYTES  # type: ignore[attr-defined]  # there is no setting
