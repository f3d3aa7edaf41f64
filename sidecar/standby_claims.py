"""What standbys have seen of the log, held against it: they may know of records that it lost before this tenure."""

from __future__ import annotations

import asyncio
import logging
from typing import NoReturn

from consul_backend.errors import BackendError, FenceLost, StoreWentBack
from consul_backend.went_back import Log, require_record
from sidecar.transport.forwarding import Echo

log = logging.getLogger("core")

RETRY_S = 1.0


class StandbyClaims:
    """Of one tenure on one store generation. Later heartbeats tell what this tenure told, so the first one counts."""

    def __init__(self, generation: str) -> None:
        self._generation = generation
        self._echoes: asyncio.Queue[Echo] = asyncio.Queue()

    def heard(self, echo: Echo) -> None:
        """The first heartbeat of a standby."""
        if echo.seen_index and echo.generation == self._generation:
            self._echoes.put_nowait(echo)

    async def run(self, store: Log) -> NoReturn:
        """Until cancelled. Raises StoreWentBack, FenceLost; what passes is tried again."""
        while True:
            echo = await self._echoes.get()
            try:
                await require_record(store, echo.seen_index, echo.seen_hash)
            except (StoreWentBack, FenceLost):
                raise
            except BackendError as error:
                log.warning("what %s has seen cannot be looked up, trying again: %s", echo.node_id, error)
                self._echoes.put_nowait(echo)
                await asyncio.sleep(RETRY_S)
