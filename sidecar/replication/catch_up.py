"""What one stream of a secondary brought until it was in step: bytes and keys."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from sidecar.replication.channel import Channel
from sidecar.replication.status import SyncFacts

logger = logging.getLogger(__name__)


class Counted:
    """A channel that counts what it receives."""

    def __init__(self, inner: Channel) -> None:
        self._inner = inner
        self.received_bytes = 0

    async def send(self, frame: bytes) -> None:
        await self._inner.send(frame)

    async def recv(self) -> bytes:
        frame = await self._inner.recv()
        self.received_bytes += len(frame)
        return frame

    def silent_s(self) -> float:
        return self._inner.silent_s()

    async def close(self, reason: str) -> None:
        await self._inner.close(reason)


@dataclass(slots=True)
class CatchUp:
    """A stream until the first time it is in step, unless it follows a sync, which told its own figures."""

    channel: Counted
    started_s: float
    index: int
    keys: int = 0

    def done(self, index: int, now_s: float) -> SyncFacts | None:
        """It is in step, at the primary's record ``index``; None when there was nothing to catch up with."""
        if index == self.index:
            return None
        facts = SyncFacts("wal", 1, self.channel.received_bytes, self.keys, now_s - self.started_s)
        logger.info(
            "replication: in step again by the write-ahead log: %d records, %d keys, %d bytes, %.3f s",
            index - self.index,
            facts.keys,
            facts.bytes,
            facts.seconds,
        )
        return facts
