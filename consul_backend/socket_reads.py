"""How much asyncio asks of a socket at once: 64 KiB instead of 256.

asyncio takes memory for all of it before each read and gives back what was not filled. The C library maps 128 KiB and
more anew each time, in every other process (it depends on where the heap happens to lie): 25 µs of a request's 100 go
into page faults then. Less than that comes from the heap. TLS connections read into a buffer of their own.
"""

from __future__ import annotations

from asyncio import selector_events

READ_BYTES = 64 * 1024


def limit_socket_reads() -> None:
    """Set it for every connection of this process.

    The class is private to asyncio; a unit test fails should a Python release rename it or stop using it.
    """
    selector_events._SelectorTransport.max_size = READ_BYTES  # type: ignore[attr-defined]  # there is no setting
