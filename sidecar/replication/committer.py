"""Commits that a secondary makes of what its primary sent: the position rides in the same record as the data."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from consul_backend.errors import NotApplied, Overloaded, Unavailable
from consul_backend.position import Position
from consul_backend.wal import Write
from sidecar.replication.modes import Mode
from sidecar.replication.store_view import Head, SecondaryStore

_SETTLE_S = 10.0
"""How long a cancelled caller waits for its commit: longer than the store needs to resolve an unknown outcome."""

_RETRY_S_MIN = 0.05
_RETRY_S_MAX = 2.0


async def commit(store: SecondaryStore, writes: Sequence[Write], positions: Mapping[str, Position]) -> None:
    """Commit ``writes`` and the positions together, once. Errors that say *nothing was written, try again* are tried
    again, for as long as the tenure lasts; raises TooLarge, FenceLost, OutcomeUnknown and what else ends a tenure.

    A caller that is cancelled learns of it only after the commit in flight has ended, so that whoever comes next finds
    the position that holds."""
    delay_s = _RETRY_S_MIN
    while True:
        try:
            await _settled(store, writes, positions)
        except (Overloaded, NotApplied, Unavailable):
            await asyncio.sleep(delay_s)
            delay_s = min(2 * delay_s, _RETRY_S_MAX)
        else:
            return


async def _settled(store: SecondaryStore, writes: Sequence[Write], positions: Mapping[str, Position]) -> Head:
    committing = asyncio.ensure_future(store.commit(writes, positions=positions))
    try:
        return await asyncio.shield(committing)
    except asyncio.CancelledError:
        await asyncio.wait({committing}, timeout=_SETTLE_S)
        if not committing.done():
            committing.cancel()
        elif not committing.cancelled():
            committing.exception()  # the cancellation is what the caller hears; mark the error as seen
        raise


def stored_position(store: SecondaryStore, mode: Mode) -> Position | None:
    """The newest durable position in a mode; None when there never was one."""
    return store.positions.get(mode.name)


def positions_at(mode: Mode, position: Position, source: Mapping[str, Position] | None = None) -> dict[str, Position]:
    """What a secondary's record says of where it stands: at ``position`` in its own mode; and, where class ``l``
    travels, wherever the primary itself stood in other modes, as the primary's record says. So a DR secondary can be
    promoted in the middle of a performance set and goes on where its primary was."""
    if "l" not in mode.classes:
        return {mode.name: position}
    return {name: other for name, other in (source or {}).items() if name != mode.name} | {mode.name: position}
