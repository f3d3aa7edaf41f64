"""What a secondary last heard of its primary, kept over restarts: a promotion after one still says what may be lost.

Kept is the newest record that the primary is known to have and the moment of which everything is here. It is stored as
soon as records are known that are not here yet, else now and then, so an idle secondary writes next to nothing; what is
read back is therefore too old rather than too new, and never claims less of a loss than there may be.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import NoReturn

import msgspec

from consul_backend.clock import Clock
from consul_backend.errors import NotApplied, Overloaded, Unavailable
from consul_backend.position import Position
from sidecar.replication.applier import Applier
from sidecar.replication.modes import Mode
from sidecar.replication.wiring import SealedEntries

logger = logging.getLogger(__name__)

LOOK_S_MAX = 1.0
BEATS_BETWEEN = 6


class Heard(msgspec.Struct, frozen=True):
    """``head_index``: the primary's newest record heard of, in the log of its store ``generation``; ``heard_ms`` when
    it was last heard, and ``complete_ms`` the newest moment everything of which is here (0: none), both by this
    cluster's own clock, in unix milliseconds."""

    generation: str
    head_index: int
    heard_ms: int
    complete_ms: int


def heard_key(mode: Mode) -> str:
    """Class ``c``: it is of no use to anybody else."""
    return f"c/replication/heard-{mode.name}"


async def load_heard(mode: Mode, sealed: SealedEntries) -> Heard | None:
    """What was kept; None where nothing was, or where it cannot be read. Raises BackendError."""
    raw = await sealed.get(heard_key(mode))
    if raw is None:
        return None
    try:
        return msgspec.msgpack.decode(raw, type=Heard)
    except msgspec.MsgspecError:
        logger.warning("replication: what was last heard of the primary cannot be read, and is left out")
        return None


def resume(applier: Applier, heard: Heard | None, clock: Clock) -> None:
    """Let ``applier`` go on from what was heard before this tenure, if it was heard of the log that it follows."""
    position = applier.position
    if heard is None or position is None or position.generation != heard.generation:
        return
    now_ms = clock.time_ms()
    complete_age_s = max(now_ms - heard.complete_ms, 0) / 1000 if heard.complete_ms else None
    applier.resume(heard.head_index, max(now_ms - heard.heard_ms, 0) / 1000, complete_age_s)


class HeardKeeper:
    """Stores it while ``applier`` works. ``stored`` is what the store holds."""

    def __init__(
        self, mode: Mode, sealed: SealedEntries, applier: Callable[[], Applier], clock: Clock, beat_s: float
    ) -> None:
        self._mode = mode
        self._sealed = sealed
        self._applier = applier
        self._clock = clock
        self._beat_s = beat_s
        self._stored: Heard | None = None

    async def run(self) -> NoReturn:
        """Until cancelled."""
        while True:
            await asyncio.sleep(min(self._beat_s, LOOK_S_MAX))
            newest = self._now()
            if newest is None or not self._news(newest):
                continue
            try:
                await self._sealed.put(heard_key(self._mode), msgspec.msgpack.encode(newest))
            except (Overloaded, NotApplied, Unavailable) as error:
                logger.info("replication: what was heard of the primary was not stored, next time: %s", error)
                continue
            self._stored = newest

    def _now(self) -> Heard | None:
        applier = self._applier()
        upstream, position = applier.upstream, applier.position
        if not upstream.connected or upstream.heard_at_s is None or position is None:
            return None
        lag_s = applier.lag_s()
        now_ms, silent_s = self._clock.time_ms(), self._clock.monotonic() - upstream.heard_at_s
        return Heard(
            generation=position.generation,
            head_index=upstream.head_index,
            heard_ms=now_ms - int(silent_s * 1000),
            complete_ms=0 if lag_s is None else now_ms - int(lag_s * 1000),
        )

    def _news(self, newest: Heard) -> bool:
        stored = self._stored
        if stored is None or stored.generation != newest.generation:
            return True
        position: Position | None = self._applier().position
        unseen = newest.head_index > max(stored.head_index, position.index if position else 0)
        return unseen or newest.heard_ms - stored.heard_ms >= self._beat_s * BEATS_BETWEEN * 1000
