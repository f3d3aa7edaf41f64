"""What one Consul takes in a transaction: asked for at the start, learnt from every refusal, doubted after silence.

A read-only transaction shows what the server takes without changing anything: as many operations as a newer Consul
allows, and a body padded with spaces, which JSON ignores. Limits only shrink while a process runs.

A server whose limit was lowered answers 413, which is certain, or, where it or a proxy before it does not read so much,
closes the connection. Then nobody knows whether a size was the reason. So after a lost connection a request of that
size is preceded by a read-only one of the same size: answered → something else was the reason; 413 → the limit is
learnt; closed again, twice, while a small one is answered → the size is the reason, and half of it is tried.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace

from consul_backend.errors import TooLarge, Unavailable
from consul_backend.limits import BODY_BYTES_MIN, Limits, learnt
from consul_backend.transport import ConnectionLost
from consul_backend.txn import CheckNotExists
from consul_backend.wire import encode_txn

PROBED_OPS_MAX = 128
"""Consul 1.14 and newer take this many operations, older ones 64."""

START_BYTES_MIN = 64 * 1024
"""Less at the start is a mistake of the server's configuration: the largest flush of the index would not fit, an extent
with its partition's heads and the checkpoint, and the log would grow for ever. (A limit that is lowered under a running
node is lived with.)"""

_PROBES_OF_DOUBT = 2

Ask = Callable[[bytes], Awaitable[object]]
"""Sends one read-only transaction. Raises TooLarge, PermissionDenied, Unavailable; ConnectionLost where it closes
without an answer."""


class LimitsProbe:
    """``limits`` are what is known to be taken, or believed; ``ask`` may repeat, ``ask_once`` does not."""

    def __init__(self, prefix: str, *, ask: Ask, ask_once: Ask) -> None:
        self.limits = Limits(prefix_bytes=len(prefix))
        self._prefix = prefix
        self._ask = ask
        self._ask_once = ask_once
        self._doubted_bytes = 0

    async def find(self) -> None:
        """Ask the server. Raises PermissionDenied, Unavailable."""
        ops_max = PROBED_OPS_MAX
        try:
            await self._ask(encode_txn([CheckNotExists("probe")] * PROBED_OPS_MAX, self._prefix))
        except TooLarge:
            ops_max = Limits().ops_max
        self.limits = replace(self.limits, ops_max=ops_max, body_bytes_max=await self._find_body_bytes_max())

    async def _find_body_bytes_max(self) -> int:
        """What the server takes, our default at most."""
        size = Limits().body_bytes_max
        while True:
            try:
                await self._ask(self._body(size))
            except TooLarge:
                size //= 2
            else:
                return size
            if size < START_BYTES_MIN:
                raise Unavailable(
                    f"this Consul takes no transaction of {START_BYTES_MIN} bytes: raise limits.txn_max_req_len and"
                    " limits.kv_max_value_size in its configuration"
                )

    def refused(self, ops_count: int, size_bytes: int, text: str) -> None:
        """The server refused a transaction for its size: another one than was asked, or a setting that changed."""
        self.limits = learnt(self.limits, ops_count, size_bytes, text)

    def unanswered(self, size_bytes: int) -> None:
        """The server closed the connection on a transaction of that size."""
        if size_bytes >= BODY_BYTES_MIN:
            self._doubted_bytes = min(size_bytes, self._doubted_bytes or size_bytes)

    async def settle(self, size_bytes: int) -> None:
        """Before a transaction of that size is sent: returns when its size is in no doubt. Raises TooLarge, with the
        limits learnt; Unavailable: it cannot be told now."""
        doubted = self._doubted_bytes
        if not doubted or size_bytes < doubted:
            return
        for _ in range(_PROBES_OF_DOUBT):
            try:
                await self._ask_once(self._body(doubted))
            except ConnectionLost:
                continue
            except TooLarge as refusal:
                self._learnt(doubted, str(refusal))
                raise
            self._doubted_bytes = 0
            return
        try:
            await self._ask_once(self._body(0))
        except ConnectionLost as error:
            raise Unavailable(str(error)) from error
        self._learnt(doubted, "")
        raise TooLarge(f"Consul closes the connection on a transaction of {doubted} bytes instead of answering it")

    def _learnt(self, size_bytes: int, text: str) -> None:
        self.refused(1, size_bytes, text)
        self._doubted_bytes = 0

    def _body(self, size_bytes: int) -> bytes:
        return encode_txn([CheckNotExists("probe")], self._prefix).ljust(size_bytes)
