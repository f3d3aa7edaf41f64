"""Commits that a secondary makes of what its primary sent: the position rides in the same record as the data."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from consul_backend.errors import NotApplied, Overloaded, Unavailable
from consul_backend.position import Position
from consul_backend.wal import Write
from sidecar.replication.store_view import Head, SecondaryStore

MODE = "performance"

_SETTLE_S = 10.0
"""How long a cancelled caller waits for its commit: longer than the store needs to resolve an unknown outcome."""

_RETRY_S_MIN = 0.05
_RETRY_S_MAX = 2.0


async def commit(store: SecondaryStore, writes: Sequence[Write], position: Position) -> None:
    """Commit ``writes`` and ``position`` together, once. Errors that say *nothing was written, try again* are tried
    again, for as long as the tenure lasts; raises TooLarge, FenceLost, OutcomeUnknown and what else ends a tenure.

    A caller that is cancelled learns of it only after the commit in flight has ended, so that whoever comes next finds
    the position that holds."""
    delay_s = _RETRY_S_MIN
    while True:
        try:
            await _settled(store, writes, position)
        except (Overloaded, NotApplied, Unavailable):
            await asyncio.sleep(delay_s)
            delay_s = min(2 * delay_s, _RETRY_S_MAX)
        else:
            return


async def _settled(store: SecondaryStore, writes: Sequence[Write], position: Position) -> Head:
    committing = asyncio.ensure_future(store.commit(writes, positions={MODE: position}))
    try:
        return await asyncio.shield(committing)
    except asyncio.CancelledError:
        await asyncio.wait({committing}, timeout=_SETTLE_S)
        if not committing.done():
            committing.cancel()
        elif not committing.cancelled():
            committing.exception()  # the cancellation is what the caller hears; mark the error as seen
        raise


def stored_position(store: SecondaryStore) -> Position | None:
    """The newest durable position; None when there never was one."""
    return store.positions.get(MODE)
