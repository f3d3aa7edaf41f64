"""What a client's session has seen, on a node that is to answer it: told by ``X-Vault-Index``, waited for, told again.

:mod:`sidecar.replication.session_index` has the format and the rules. Here they meet this cluster's roles, its log, and
a secondary's applier, which is what is waited for.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from consul_backend.clock import Clock
from consul_backend.position import Position
from plugin_api.errors import InvalidRequest
from sidecar.replication.committer import stored_position
from sidecar.replication.mode_manager import ModeManager
from sidecar.replication.modes import PERFORMANCE
from sidecar.replication.protocol import is_none
from sidecar.replication.roles import DisabledRole, PrimaryRole, SecondaryRole
from sidecar.replication.session_index import (
    HEADER,
    KEY_LABEL,
    NO_NAME,
    BadSessionIndex,
    OwnLog,
    Point,
    SessionIndex,
    SetLog,
    Verdict,
    decode,
    encode,
    epoch_at,
    judge_local,
    judge_replicated,
    name_of,
)

log = logging.getLogger(__name__)

HEADERS_MAX = 16
LOOK_AGAIN_S = 0.25
"""How soon a wait looks again by itself: the service that it waits for may have been replaced."""

LOST = (
    "This session has seen a state of its primary that was not replicated before another cluster took its place: "
    "writes that it made or saw since are not part of this answer and will not come."
)
ELSEWHERE = (
    "A write that this session made or saw is of another replication set or another store than this cluster's: whether "
    "it is part of this answer is not known."
)


@dataclass(frozen=True, slots=True)
class Found:
    """Whether all that a session has seen is here. ``missing``: not yet; ``upstream``: what is missing is the
    replication primary's, which therefore has it. ``warnings`` are for the answer."""

    missing: bool = False
    upstream: bool = False
    warnings: tuple[str, ...] = ()


class Sessions:
    """One per tenure."""

    def __init__(
        self,
        performance: ModeManager,
        dr: ModeManager,
        *,
        cluster_id: str,
        clock: Clock,
        wait_s: float,
        derived_key: Callable[[bytes], bytes],
    ) -> None:
        self._performance = performance
        self._dr = dr
        self._store = performance.store
        self._cluster_id = cluster_id
        self._clock = clock
        self._wait_s = wait_s
        self._key = derived_key(KEY_LABEL)

    async def require(self, headers: Sequence[str]) -> Found:
        """Wait, bounded, until everything that ``headers`` name is here. Raises InvalidRequest for a header that no
        cluster of this set made."""
        wanted = self._read(headers)
        if not wanted:
            return Found()
        give_up_s = self._clock.monotonic() + self._wait_s
        while True:
            found = self._look(wanted)
            left_s = give_up_s - self._clock.monotonic()
            if not found.missing or left_s <= 0:
                return found
            await self._moved(min(left_s, LOOK_AGAIN_S))

    def after(self, *, written: int, answered: str, asked: bool) -> str:
        """The header of an answer; empty where it has none. ``written``: the newest record that the request committed
        here, 0 for none; ``answered``: the header of the primary's answer to a forwarded request. With ``asked`` the
        session wants to know what it has seen, whether it wrote or not."""
        if not (written or answered or asked):
            return ""  # as for nearly every read
        upstream = self._upstream(answered)
        if not (written or upstream.replicated.index or asked):
            return ""
        own = self._own()
        local = Point(own.number, own.head_index if asked else written)
        replicated = upstream
        set_log, secondary = self._set()
        if not secondary or self._just_demoted(set_log, written):
            replicated = self._at(set_log, local.index)
        elif asked and self._is_here(upstream):
            replicated = self._at(set_log, None)
        return encode(
            SessionIndex(
                self._cluster_id,
                local,
                name_of(own.generation),
                replicated.replicated,
                replicated.set,
                replicated.epoch,
            ),
            self._key,
        )

    def _read(self, headers: Sequence[str]) -> list[SessionIndex]:
        texts = [text.strip() for header in headers for text in header.split(",") if text.strip()]
        if len(texts) > HEADERS_MAX:
            raise InvalidRequest(f"more than {HEADERS_MAX} values of {HEADER}")
        try:
            return [decode(text, self._key) for text in texts]
        except BadSessionIndex as error:
            raise InvalidRequest(f"invalid {HEADER} header: {error}") from None

    def _look(self, wanted: Sequence[SessionIndex]) -> Found:
        own = self._own()
        set_log, secondary = self._set()
        local = {judge_local(one, own) for one in wanted}
        replicated = {judge_replicated(one, self._cluster_id, set_log, secondary=secondary) for one in wanted}
        both = local | replicated
        texts = {Verdict.LOST: LOST, Verdict.ELSEWHERE: ELSEWHERE}
        return Found(
            missing=Verdict.MISSING in both,
            upstream=secondary and Verdict.MISSING in replicated and Verdict.MISSING not in local,
            warnings=tuple(text for verdict, text in texts.items() if verdict in both),
        )

    def _own(self) -> OwnLog:
        role = self._dr.role
        history = () if isinstance(role, DisabledRole) else role.history
        return OwnLog(self._cluster_id, self._store.generation, self._store.head.index, history)

    def _set(self) -> tuple[SetLog | None, bool]:
        """The performance set's log as it is here, and whether this cluster is a secondary of it."""
        role = self._performance.role
        if isinstance(role, SecondaryRole):
            return SetLog(role.set_id, role.history, self._applied()), True
        if isinstance(role, PrimaryRole):
            head = self._store.head
            at = Position(role.set_id, self._store.generation, role.epoch.number, head.index, head.chain_hash)
            return SetLog(role.set_id, role.history, at), False
        return None, False

    def _applied(self) -> Position | None:
        service = self._performance.secondary
        at = service.applier.position if service is not None else stored_position(self._store, PERFORMANCE)
        return None if is_none(at) else at

    def _just_demoted(self, set_log: SetLog | None, written: int) -> bool:
        """Whether a write of a primary is answered after its demotion, which waited for its commit."""
        at = set_log.at if set_log is not None else None
        return at is not None and at.generation == self._store.generation and 0 < written <= at.index

    def _seen(self, log_: SetLog) -> Position | None:
        """As far as an answer of this moment may show: a commit is readable a moment before it counts as applied."""
        stored, at = stored_position(self._store, PERFORMANCE), log_.at
        if stored is None or is_none(stored) or at is None:
            return at
        return stored if stored.generation != at.generation or stored.index > at.index else at

    def _at(self, set_log: SetLog | None, index: int | None) -> SessionIndex:
        """Only what concerns the set: at ``index`` of a primary's own log, or None for what a secondary shows now."""
        nothing = SessionIndex("", Point())
        if set_log is None:
            return nothing
        at = set_log.at if index is not None else self._seen(set_log)
        if at is None:
            return nothing
        began = epoch_at(at, set_log.history) if index is None else set_log.history[-1]
        number = at.epoch if began is None else began.number
        # Without a name it is of a branch that is being given up, and counts as lost from then on.
        epoch = NO_NAME if began is None else name_of(began.id)
        point = Point(number, at.index if index is None else index)
        return SessionIndex("", Point(), NO_NAME, point, set=name_of(set_log.set_id), epoch=epoch)

    def _upstream(self, answered: str) -> SessionIndex:
        try:
            return decode(answered, self._key) if answered else SessionIndex("", Point())
        except BadSessionIndex as error:
            log.warning("the primary's %s header is left out: %s", HEADER, error)
            return SessionIndex("", Point())

    def _is_here(self, upstream: SessionIndex) -> bool:
        set_log, secondary = self._set()
        return judge_replicated(upstream, self._cluster_id, set_log, secondary=secondary) is Verdict.PRESENT

    async def _moved(self, timeout_s: float) -> None:
        service = self._performance.secondary
        if service is None:
            await asyncio.sleep(timeout_s)
        else:
            await service.applier.wait_moved(timeout_s)
