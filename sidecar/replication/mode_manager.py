"""One mode of replication in one tenure of the active node: its role, its task scope, and the changes of both.

:class:`ModeManager` owns the role: the one entry that says what this cluster is, and the scope in which it acts as
such. A change is committed first; then :meth:`run` leaves the old role's scope and enters the new one's, or, where the
whole node must begin anew (a DR secondary serves nobody, a promoted one everybody), the tenure ends. What each change
allows is decided in :mod:`sidecar.replication.roles`; across modes in :mod:`sidecar.replication.manager`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TypeVar

from consul_backend.clock import SteadyTime
from consul_backend.failpoint import failpoint
from consul_backend.position import Position
from consul_backend.wal import Write
from plugin_api.errors import Unavailable
from sidecar.replication import authorities, roles
from sidecar.replication.committer import stored_position
from sidecar.replication.denials import Denials
from sidecar.replication.forecast import Standing
from sidecar.replication.former import FormerPrimary
from sidecar.replication.heard import HeardKeeper, load_heard, resume
from sidecar.replication.hello import Source
from sidecar.replication.history import Epoch, history_of_data, parting
from sidecar.replication.lost_writes import LostHead, LostWrites, log_loss
from sidecar.replication.modes import DR, PERFORMANCE, Mode
from sidecar.replication.primary import PrimaryService
from sidecar.replication.protocol import is_none
from sidecar.replication.roles import DisabledRole, PrimaryRole, Role, SecondaryRole
from sidecar.replication.secondary import SecondaryService
from sidecar.replication.selection import EVERYTHING, Mount, Partitions, selection_for
from sidecar.replication.wiring import Wiring
from sidecar.transport.certificates import Credentials

logger = logging.getLogger(__name__)

SERVING_WAIT_S = 5.0
SETTLE_S = 10.0
"""How long a cancelled change waits for its commit: longer than the store needs to resolve an unknown outcome."""
CHANGING = "the role of this cluster is being changed; try again shortly"

_R = TypeVar("_R", bound=Role)


class ModeManager:
    """See the module. ``mirrored`` waits a moment for whoever would take this cluster's place; None where its roles are
    not mirrored."""

    def __init__(
        self,
        mode: Mode,
        wiring: Wiring,
        *,
        restrict: Callable[[], None],
        denials: Denials,
        mirrored: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self.mode = mode
        self.denials = denials
        self._restrict = restrict
        self._mirrored = mirrored
        self.store = wiring.store
        self.clock = wiring.clock
        self.steady = SteadyTime(wiring.clock)
        self.options = wiring.options
        self.primary: PrimaryService | None = None
        self.secondary: SecondaryService | None = None
        self.former: FormerPrimary | None = None
        self.lost = LostWrites(mode, wiring.store, wiring.sealed)
        self.lost_heads: list[LostHead] = []
        self._wiring = wiring
        self._sealed = wiring.sealed
        self._node = wiring.node
        self._callbacks = wiring.callbacks
        self._role: Role = DisabledRole()
        self._changing = asyncio.Lock()
        self._turned = asyncio.Event()
        self._serving = asyncio.Event()
        self._resting = asyncio.Event()
        self._resting.set()
        self._allowed = asyncio.Event()
        self._allowed.set()
        self._running = False
        self._ending = False
        self._selections: dict[str, tuple[tuple[object, ...], Partitions]] = {}

    @property
    def role(self) -> Role:
        """The newest committed role; it holds secrets."""
        return self._role

    @property
    def cluster_addresses(self) -> tuple[str, ...]:
        """Where a new secondary of this primary would dial, in order."""
        configured = self._role.primary_cluster_addr if isinstance(self._role, PrimaryRole) else ""
        own = (self._node.cluster_addr, *self._node.cluster_addresses())
        return tuple(dict.fromkeys(one for one in (configured, *own) if one))

    async def load(self) -> None:
        """Read the role; once, before anything else. Raises BackendError."""
        self._role = roles.decode_role(await self._sealed.get(self.mode.role_key))
        self.lost_heads = await self.lost.heads()

    async def reload(self) -> None:
        """The entry was changed by another mode's replication."""
        self._role = roles.decode_role(await self._sealed.get(self.mode.role_key))

    async def run(self) -> None:
        """Act as the role says until cancelled, through every change of it. What ends the tenure comes out as an
        exception group: the errors of this cluster's own store, and bugs."""
        self._running = True
        try:
            while True:
                await self._allowed.wait()
                self._turned.clear()
                self._resting.clear()
                try:
                    await self._act()
                finally:
                    self._resting.set()
        finally:
            self._running = False

    # ---- changes of the role

    async def change(self, change: Callable[[Role], _R]) -> _R:
        """Apply ``change`` to the newest role and commit the result, one change at a time.

        The role in memory moves only after the commit: nobody is let in, or acts, by a role that a crash would undo.
        """
        async with self._changing:
            self.require_steady()
            return await self._commit(change(self._role))

    async def _commit(self, after: _R, also: Sequence[Write] = (), positions: dict[str, Position] | None = None) -> _R:
        if after is self._role and not also and not positions:
            return after
        committing = asyncio.create_task(self._store_role(after, also, positions))
        try:
            await asyncio.shield(committing)
        except asyncio.CancelledError:
            # The role in memory must not fall behind the stored one because a scope was left meanwhile.
            await asyncio.wait({committing}, timeout=SETTLE_S)
            if committing.done() and not committing.cancelled():
                committing.exception()
            raise
        return after

    async def _store_role(self, after: Role, also: Sequence[Write], positions: dict[str, Position] | None) -> None:
        failpoint("role:before-commit")
        entries = [Write(self.mode.role_key, roles.encode_role(after)), *also]
        await self.store.commit([self._sealed.encode(entry) for entry in entries], positions=positions)
        failpoint("role:after-commit")
        before, self._role = self._role, after
        if isinstance(before, PrimaryRole) and (not isinstance(after, PrimaryRole) or after.epoch != before.epoch):
            self.denials.forget(self.mode.name)

    async def turn(self) -> None:
        """Have :meth:`run` enter the new role, and wait a moment until a new primary is on the cluster port."""
        self._serving.clear()
        self._turned.set()
        if not self._running or not isinstance(self._role, PrimaryRole):
            return
        try:
            async with asyncio.timeout(SERVING_WAIT_S):
                await self._serving.wait()
        except TimeoutError:
            logger.warning("replication: the cluster port does not serve the new role yet")

    def require_steady(self) -> None:
        """Raises Unavailable once a change was committed that ends this tenure."""
        if self._ending:
            raise Unavailable(CHANGING)

    @property
    def ending(self) -> bool:
        """Whether a committed change is about to end this tenure."""
        return self._ending

    def end_tenure(self) -> None:
        """A change was committed that only a new tenure can put into effect."""
        self._ending = True
        self._callbacks.restart()

    async def demote(self) -> SecondaryRole:
        """Stop being primary, with nothing half done: no write is let in, connected secondaries get what they lack,
        and then the role is committed together with where this cluster stands: at the end of its own log."""
        roles.require(self.mode, self._role, "primary/demote")
        gate = self._callbacks.gate
        gate.restrict(DR.classes)  # tokens too: else the log would grow on while secondaries catch up
        try:
            await self._settle()
            await self._drain()
            async with self.halted(), self._changing:
                self.require_steady()
                after = roles.demote(self.mode, self._role)
                head = self.store.head
                position = Position(
                    after.set_id, self.store.generation, after.epoch.number, head.index, head.chain_hash
                )
                await self._callbacks.keep_keys()
                failpoint("demote:before-commit")
                await self._commit(after, positions={self.mode.name: position})
                failpoint("demote:after-commit")
                if self.mode is DR:
                    self.end_tenure()
                return after
        finally:
            self._restrict()

    async def _settle(self) -> None:
        """Wait for commits that were let in before the gate closed; what a caller gave up has ended when another commit
        behind it has. Raises Unavailable when the store is too slow."""
        try:
            async with asyncio.timeout(SETTLE_S):
                await self._callbacks.gate.settled()
                async with self._changing:
                    same = Write(self.mode.role_key, roles.encode_role(self._role))
                    await self.store.commit([self._sealed.encode(same)])
        except TimeoutError:
            raise Unavailable("the store is too slow to demote this cluster now: nothing was changed") from None

    async def _drain(self) -> None:
        primary = self.primary
        if primary is None:
            return
        try:
            async with asyncio.timeout(self.options.demote_drain_s):
                await primary.drained()
        except TimeoutError:
            late = primary.behind(self.store.head.index)
            logger.warning("demotion: these secondaries do not have everything: %s", ", ".join(late))

    def selected(self, secondary_id: str) -> Partitions:
        """What may travel to a secondary of this primary now."""
        role = self._role
        if self.mode is not PERFORMANCE or not isinstance(role, PrimaryRole):
            return EVERYTHING
        filtered = role.filters.get(secondary_id)
        if filtered is None and not role.not_held:
            return EVERYTHING
        made_of = (self._callbacks.mounts(), filtered, role.not_held)
        known = self._selections.get(secondary_id)
        if known is not None and all(one is other for one, other in zip(known[0], made_of, strict=True)):
            return known[1]  # streams ask before each frame
        selection = selection_for(filtered, made_of[0], role.not_held)
        self._selections[secondary_id] = (made_of, selection)
        return selection

    def mounts(self) -> Sequence[Mount]:
        """The replicated mounts of this cluster, hidden ones too."""
        return self._callbacks.mounts()

    def lacking(self) -> list[Mount]:
        """The replicated mounts whose data is not here, by path."""
        if self.mode is not PERFORMANCE:
            return []
        return sorted(mount for mount in self.mounts() if mount.filterable and roles.not_held(self._role, mount.uuid))

    async def lacking_ids(self) -> list[str]:
        """:meth:`lacking`, from the store: a cluster that mirrors another serves no mounts."""
        if self.mode is not PERFORMANCE:
            return []
        names = [name for table in ("mounts", "auth") for name in await self._sealed.list(f"r/core/{table}/")]
        return sorted(name for name in names if roles.not_held(self._role, name))

    async def reselected(self) -> None:
        """What is hidden or not held has changed."""
        await self._callbacks.reselected()

    def restricted(self) -> tuple[str, ...]:
        """The classes that nobody but replication may write in this role."""
        stopped = DR.classes if self.denials.stopped else ()
        return self.mode.classes if isinstance(self._role, SecondaryRole) else stopped

    @asynccontextmanager
    async def halted(self) -> AsyncIterator[None]:
        """Inside, no scope runs: nothing is shipped, served or applied. Afterwards the newest role's scope begins."""
        self._allowed.clear()
        self._serving.clear()
        self._turned.set()
        try:
            await self._resting.wait()
            yield
        finally:
            if not self._ending:
                self._allowed.set()

    @asynccontextmanager
    async def still(self) -> AsyncIterator[None]:
        """Inside, this mode neither acts nor changes its role: nothing of it writes to the store."""
        async with self.halted(), self._changing:
            yield

    def rest(self) -> None:
        """Another mode has ended the tenure: nothing here acts or changes any more."""
        self._ending = True

    async def promote(
        self, build: Callable[[Role, Position | None], Awaitable[tuple[PrimaryRole, Sequence[Write]]]]
    ) -> PrimaryRole:
        """Become primary: ``build`` makes the role, and what else is to be committed with it, from the role and the
        position at which nothing more is applied."""
        async with self.halted(), self._changing:
            self.require_steady()
            position = stored_position(self.store, self.mode)
            failpoint("promote:before-commit")
            after, also = await build(self._role, None if is_none(position) else position)
            await self._commit(after, also)
            failpoint("promote:after-commit")
            if self.mode is DR:
                self.end_tenure()
        self._restrict()
        await self.reselected()
        logger.warning("replication: promoted to %s primary, epoch %d", self.mode.name, after.epoch.number)
        return after

    async def commit_with(self, change: Callable[[Role], _R], also: Sequence[Write]) -> _R:
        """:meth:`change` together with other entries, while nothing runs. Ends the tenure in mode DR."""
        async with self.halted(), self._changing:
            self.require_steady()
            after = await self._commit(change(self._role), also)
            if self.mode is DR:
                self.end_tenure()
        self._restrict()
        await self.reselected()
        return after

    async def standing(self, *, probe: bool) -> Standing:
        """Where a secondary stands now. With ``probe`` the primary is looked for, which takes up to twice the probe
        time-out. Raises InvalidRequest for what is no secondary."""
        role = roles.require_secondary(self.mode, self._role)
        alive_at = ""
        if probe and self.secondary is not None and role.attached:
            alive_at = await self.secondary.primary_lives(self.options.probe_timeout_s)
            roles.require_secondary(self.mode, self._role)
        # What follows is of one instant: the stream went on while the primary was looked for.
        position = stored_position(self.store, self.mode)
        service, now_s = self.secondary, self.clock.monotonic()
        upstream = service.applier.upstream if service is not None else None
        applied = service.applier.position if service is not None else position
        heard_at_s = upstream.heard_at_s if upstream is not None else None
        return Standing(
            attached=role.attached,
            complete=not is_none(position),
            applied=applied.index if applied is not None else 0,
            seen=upstream.head_index if upstream is not None else 0,
            heard_age_s=None if heard_at_s is None else now_s - heard_at_s,
            complete_age_s=service.applier.lag_s() if service is not None else None,
            connected=upstream is not None and upstream.connected,
            alive_at=alive_at,
            lag_max_s=self.options.promotion_lag_max_s,
            not_held=[mount.path for mount in self.lacking()],
        )

    # ---- acting as the role says

    async def _act(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            acting = tasks.create_task(self._act_as(self._role), name=f"{self.mode.name} {self._role.kind}")
            await self._turned.wait()
            acting.cancel()

    async def _act_as(self, role: Role) -> None:
        try:
            if isinstance(role, PrimaryRole):
                self.primary = PrimaryService(
                    self.mode,
                    self._wiring,
                    role,
                    newest=self._primary_of(role.epoch),
                    steady=self.steady,
                    select=self.selected,
                    change=self._change_primary,
                    serving=self._serving,
                    denied=lambda name, reason: self.denials.tell(self.mode.name, name, reason),
                )
                async with asyncio.TaskGroup() as tasks:
                    if role.former is not None:
                        self.former = FormerPrimary(self.mode, role.former, role.epoch, self.options)
                        tasks.create_task(self.former.watch(), name="former primary")
                    tasks.create_task(self.primary.run(), name=f"{self.mode.name} primary")
            elif isinstance(role, SecondaryRole):
                heard = await load_heard(self.mode, self._sealed)
                self.secondary = SecondaryService(
                    self.mode,
                    self._wiring,
                    role,
                    learned=self._learned,
                    adopt=self._adopt,
                    synced=self._synced,
                    renewed=self._renewed,
                )
                resume(self.secondary.applier, heard, self.clock)
                await self._follow(self.secondary)
        finally:
            self.primary = self.secondary = self.former = None

    async def _follow(self, service: SecondaryService) -> None:
        """Follow the primary, and keep what is heard of it."""
        keeper = HeardKeeper(self.mode, self._sealed, lambda: service.applier, self.clock, self.options.beat_s)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(keeper.run(), name="keep what was heard")
            tasks.create_task(service.run(), name=f"{self.mode.name} secondary")

    def _primary_of(self, epoch: Epoch) -> Callable[[], PrimaryRole | None]:
        def newest() -> PrimaryRole | None:
            role = self._role
            return role if isinstance(role, PrimaryRole) and role.epoch == epoch else None

        return newest

    async def _change_primary(self, change: Callable[[Role], PrimaryRole]) -> PrimaryRole:
        """What a secondary relies on from now on: a DR secondary that is promoted must let it in."""
        before, after = self._role, await self.change(change)
        if after is not before and self._mirrored is not None:
            await self._mirrored()
        return after

    async def _learned(self, addresses: Sequence[str]) -> SecondaryRole | None:
        def learn(newest: Role) -> Role:
            return roles.learn_addresses(newest, addresses) if isinstance(newest, SecondaryRole) else newest

        after = await self.change(learn)
        return after if isinstance(after, SecondaryRole) else None

    async def _renewed(self, replaces: bytes, credentials: Credentials, trusted_pem: bytes) -> SecondaryRole | None:
        def renew(newest: Role) -> Role:
            if not isinstance(newest, SecondaryRole):
                return newest
            return authorities.renew(newest, replaces, credentials, trusted_pem)

        after = await self.change(renew)
        # Its first use is the end of the certificate before: a DR secondary that knew only that would be locked out.
        if self._mirrored is not None:
            await self._mirrored()
        return after if isinstance(after, SecondaryRole) else None

    async def _synced(self, selection: Partitions) -> SecondaryRole | None:
        def complete(newest: Role) -> Role:
            return roles.synced(newest, selection) if isinstance(newest, SecondaryRole) else newest

        after = await self.change(complete)
        return after if isinstance(after, SecondaryRole) else None

    async def _adopt(self, source: Source, selection: Partitions) -> SecondaryRole | None:
        """A primary answered the hello: take over its history, after keeping what this cluster holds and the primary's
        history never had, and what it says of the partitions that travel. None when this is no secondary any more.
        Raises BackendError."""
        async with self._changing:
            role = self._role
            if not isinstance(role, SecondaryRole) or role.set_id != source.set_id or not source.history:
                return None
            selecting = roles.select(role, selection)
            if role.history == source.history and role.accepts is None:
                return await self._commit(selecting)
            mine = history_of_data(role.history, role.before, stored_position(self.store, self.mode))
            where = parting(mine, source.history, self.store.generation)
            head = await self.lost.gather(
                where,
                set_id=role.set_id,
                epoch=mine[-1].number,
                new_epoch=Epoch(source.epoch, source.epoch_id),
                now_ms=self.clock.time_ms(),
            )
            also: list[Write] = []
            if head is not None:
                await self._callbacks.keep_keys()
                also = [self.lost.head(head)]
                failpoint("lost-writes:before-head")
            after = await self._commit(roles.adopt(selecting, source.history, mine), also)
            if head is not None:
                self.lost_heads = [*(one for one in self.lost_heads if one.id != head.id), head]
                log_loss(head)
            return after
