"""Replication of one cluster, in both modes, for one tenure of its active node: the calls of ``sys/replication``.

Each mode has a manager of its own (:mod:`sidecar.replication.mode_manager`), which owns its role. Here is what
concerns both, and which combinations there are: a cluster may be primary or secondary in mode performance and primary
in mode dr; a DR secondary mirrors everything, the performance role of its primary included, and does nothing else.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from consul_backend.failpoint import failpoint
from consul_backend.position import Position
from consul_backend.reindex import ReindexOptions
from consul_backend.wal import Write
from plugin_api.errors import InvalidRequest, Unavailable
from plugin_api.request import Response
from sidecar.replication import enrolment, roles
from sidecar.replication import status as statuses
from sidecar.replication.activation import ActivationRequest
from sidecar.replication.denials import Denials
from sidecar.replication.filters import Filters
from sidecar.replication.forecast import forecast, objections, require_safe
from sidecar.replication.going_on import begin_anew, go_on, of_secondaries
from sidecar.replication.history import Promotion
from sidecar.replication.lost_writes import page_number, shown_entries, summary
from sidecar.replication.mode_manager import ModeManager
from sidecar.replication.mode_status import gauges_of, status_of
from sidecar.replication.modes import DR, PERFORMANCE, Mode, mode_named
from sidecar.replication.roles import DisabledRole, PrimaryRole, Role, SecondaryRole
from sidecar.replication.sessions import Sessions
from sidecar.replication.texts import (
    DELETIONS_ACCEPTED,
    DEMOTING,
    DISABLING,
    DR_PATH_DISABLED,
    ENABLING_PRIMARY,
    ENABLING_SECONDARY,
    FORCED,
    FORGETTING,
    PLAIN_HTTP,
    PROMOTING,
    REINDEXING,
    UPDATING_PRIMARY,
)
from sidecar.replication.upkeep import IndexUpkeep
from sidecar.replication.wiring import AuthLike, Callbacks, ForwardAnswer, Wiring
from sidecar.transport.forwarding import RequestLike

logger = logging.getLogger(__name__)


class Replication:
    """See the module."""

    def __init__(self, wiring: Wiring) -> None:
        callbacks = wiring.callbacks
        self._wiring = wiring
        self._store = wiring.store
        self._sealed = wiring.sealed
        self._listener = wiring.listener
        self._node = wiring.node
        self._callbacks = callbacks
        self._clock = wiring.clock
        self._options = wiring.options
        self._activating = asyncio.Lock()
        self._bootstrapping: Mode | None = None
        self._began_as_mirror = False
        self._upkeep = IndexUpkeep(wiring.store, wiring.sealed, wiring.clock, self._ask_secondaries)
        self.denials = Denials(self._restrict, callbacks.set_gate)
        self.performance = self._manager(PERFORMANCE, replace(callbacks, set_gate=self.denials.fill))
        self.filters = Filters(self.performance, lambda: self._steady(PERFORMANCE.name))
        # Reads are gated for performance alone: a DR secondary serves none.
        self.dr = self._manager(DR, replace(callbacks, on_applied=self._mirrored, set_gate=lambda reason: None))
        self.sessions = Sessions(
            self.performance,
            self.dr,
            cluster_id=wiring.node.local_cluster_id,
            clock=wiring.clock,
            wait_s=self._options.wal_wait_s,
            derived_key=callbacks.derived_key,
        )

    def _manager(self, mode: Mode, callbacks: Callbacks) -> ModeManager:
        return ModeManager(
            mode,
            replace(self._wiring, callbacks=callbacks),
            restrict=self._restrict,
            denials=self.denials,
            mirrored=self._followed if mode is PERFORMANCE else None,
        )

    async def _followed(self) -> None:
        """Wait a moment until the DR secondaries that are there have everything."""
        if self.dr.primary is not None:
            await self.dr.primary.followed()

    @property
    def mirrors(self) -> bool:
        """Whether this cluster is a DR secondary: it mirrors its primary and serves nobody."""
        return isinstance(self.dr.role, SecondaryRole)

    def modes(self) -> tuple[str, str]:
        """Performance and DR mode, as in ``sys/health``: disabled, primary, secondary or bootstrapping. A DR secondary
        shows the performance role that it mirrors."""
        performance, disaster = (
            "bootstrapping" if self._bootstrapping is manager.mode else manager.role.kind
            for manager in (self.performance, self.dr)
        )
        if self.dr.ending and self._began_as_mirror:
            disaster = "secondary"  # nobody is served before the next tenure, whatever was committed
        return performance, disaster

    async def load(self) -> None:
        """Read both roles; once, before anything else. Raises BackendError."""
        await self.performance.load()
        await self.dr.load()
        await self._upkeep.load()
        self._began_as_mirror = self.mirrors
        self._restrict()

    async def run(self) -> None:
        """Act as the roles say until cancelled, through every change of them. What ends the tenure comes out as an
        exception group: the errors of this cluster's own store, and bugs."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._upkeep.run(), name="index upkeep")
            tasks.create_task(self.dr.run(), name="dr replication")
            if not self.mirrors:
                tasks.create_task(self.performance.run(), name="performance replication")

    def require_steady(self) -> None:
        """Raises Unavailable while a committed change of role waits for the next tenure."""
        self.dr.require_steady()

    def is_primary_writable(self) -> bool:
        """Whether this cluster may write class ``r``."""
        return not self.mirrors and not isinstance(self.performance.role, SecondaryRole)

    def _restrict(self) -> None:
        self._callbacks.gate.restrict({*self.performance.restricted(), *self.dr.restricted()})

    async def _mirrored(self, keys: Sequence[str]) -> None:
        if PERFORMANCE.role_key in keys:
            await self.performance.reload()
        await self._callbacks.on_applied(keys)

    async def forward_to_primary(self, request: RequestLike, auth: AuthLike) -> ForwardAnswer:
        """See :meth:`SecondaryService.forward`. Raises Unavailable, PluginError."""
        secondary = self.performance.secondary
        if secondary is None:
            raise Unavailable("this cluster is not following a replication primary right now")
        return await secondary.forward(request, auth)

    # ---- looking

    def lag_s(self) -> float:
        """How long ago this cluster had everything of its primaries; 0 where it has none, or none was heard of."""
        services = [manager.secondary for manager in (self.dr, self.performance) if manager.secondary is not None]
        return max((lag_s for one in services if (lag_s := one.applier.lag_s()) is not None), default=0.0)

    def gauges(self) -> dict[str, float]:
        """Each mode's state as numbers, by the names of the telemetry."""
        shown = (self.dr,) if self.mirrors else (self.dr, self.performance)
        return {name: value for manager in shown for name, value in gauges_of(manager).items()}

    async def status(self, mode: str | None) -> dict[str, Any]:
        """The status of one mode, or of both for None (contract 1.2)."""
        if mode is None:
            return {manager.mode.name: await self._status(manager) for manager in (self.dr, self.performance)}
        return await self._status(self._of(mode))

    async def _status(self, manager: ModeManager) -> dict[str, Any]:
        if self._bootstrapping is manager.mode:
            return statuses.bootstrapping_status()
        if self.mirrors and manager.mode is PERFORMANCE:
            return dict(statuses.DISABLED)  # it is the primary's role, not this cluster's
        return await status_of(manager, self._upkeep.facts())

    async def merkle_check(self) -> Response:
        """Compare the index with everything stored; read-only (contract 1.14)."""
        return Response(data=await self._upkeep.check())

    async def _ask_secondaries(self, wanted: Mapping[str, bytes]) -> Mapping[str, bytes]:
        """Entries that this cluster lost, from whoever follows it."""
        return await of_secondaries((self.performance, self.dr), wanted)

    async def reindex(self, diff: bool, force: bool, skip_flush: bool, deletions: int = 0) -> Response:
        """Start to repair index and data keys in the background (contract 1.13)."""
        self._upkeep.start(ReindexOptions(diff, force, skip_flush, deletions, self._options.allowance))
        return Response(warnings=[REINDEXING])

    async def recover(self, *, force: bool = False) -> Response:
        """Try to leave an adverse state: a running reindex is cancelled, a secondary begins anew (contract 1.13). With
        ``force`` go on with a store that secondaries deny."""
        managers = (self.performance, self.dr)
        if force and self.denials.stopped:
            return Response(warnings=[await go_on(managers, self._store, self._began)])
        return Response(warnings=[await begin_anew(managers, self._upkeep)])

    # ---- a primary

    async def primary_enable(self, mode: str, primary_cluster_addr: str) -> Response:
        """Become the primary of a new set (contract 1.3)."""
        manager = self._steady(mode)
        roles.check_cluster_addr(primary_cluster_addr)
        roles.require(manager.mode, manager.role, "primary/enable")
        set_id = str(uuid.uuid4())
        authority = await enrolment.make_authority(manager.mode, set_id)
        await manager.change(
            lambda role: roles.enable_primary(
                manager.mode,
                role,
                set_id=set_id,
                began=self._began(1, None),
                cluster_addr=primary_cluster_addr,
                authority=authority,
            )
        )
        await manager.turn()
        return Response(warnings=[ENABLING_PRIMARY])

    async def primary_disable(self, mode: str) -> Response:
        """Forget the set; every secondary is cut (contract 1.5)."""
        manager = self._steady(mode)
        await manager.change(lambda role: roles.disable(manager.mode, role, "primary/disable"))
        await manager.turn()
        return Response(warnings=[DISABLING])

    async def primary_demote(self, mode: str) -> Response:
        """Become a secondary that follows nobody yet (contract 1.4). As a DR secondary this cluster serves nobody."""
        manager = self._steady(mode)
        if manager is not self.dr:
            await manager.demote()
            return Response(warnings=[DEMOTING])
        # What performance replication still wrote here would come after the end that the demotion names.
        async with self.performance.still():
            await manager.demote()
            self.performance.rest()
        return Response(warnings=[DEMOTING])

    async def secondary_token(
        self,
        mode: str,
        id: str,  # noqa: A002 - the API's own name
        ttl_s: int,
        public_key: str,
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """(payload to wrap, extra JWT claims) for a new secondary, which is known from now on (contract 1.6)."""
        return await enrolment.issue(self._steady(mode), self._listener, id, ttl_s, public_key, self._node.cluster_addr)

    async def revoke_secondary(self, mode: str, id: str) -> None:  # noqa: A002 - the API's own name
        """Commit that it is unknown, then cut it off (contract 1.7)."""
        await enrolment.revoke_secondary(self._steady(mode), self._listener, id)

    async def rotate_authority(self, mode: str, overlap_s: float, *, force: bool) -> Response:
        """Replace the set's certificate authority, with overlap; ``force`` ends an overlap now."""
        return await enrolment.rotate_authority(self._steady(mode), overlap_s, force=force)

    async def lacking_record(self, index: int) -> list[str]:
        """Which secondaries of this primary do not have a record of its log, as mode and id."""
        serving = [(manager.mode.name, manager.primary) for manager in (self.performance, self.dr)]
        return [f"{mode} {name}" for mode, primary in serving if primary for name in await primary.lacking(index)]

    # ---- a secondary

    async def secondary_public_key(self, mode: str) -> Response:
        """Make a key that an activation token can be encrypted to (contract 1.8)."""
        return await enrolment.make_public_key(self._steady(mode), self._sealed)

    async def secondary_preflight(
        self, mode: str, token: str, primary_api_addr: str, ca_file: str, ca_path: str
    ) -> Response:
        """Check whether :meth:`secondary_enable` would work, as far as that can be seen without using the token."""
        manager = self._of(mode)
        try:
            self._enabled_by(self._steady(mode))
            refusal = ""
        except (InvalidRequest, Unavailable) as error:
            refusal = str(error)
        asked = ActivationRequest(token, primary_api_addr, ca_file, ca_path)
        return await enrolment.checked(manager, self._sealed, asked, refusal)

    def _enabled_by(self, manager: ModeManager) -> None:
        """Raises InvalidRequest unless this cluster may become a secondary in that mode."""
        roles.require(manager.mode, manager.role, "secondary/enable")
        other = self.dr if manager is self.performance else self.performance
        if not isinstance(other.role, DisabledRole):
            raise InvalidRequest(
                f"this cluster has {other.mode.label} enabled, which becoming a {manager.mode.label} secondary "
                "would destroy; disable it first",
            )

    async def secondary_enable(
        self, mode: str, token: str, primary_api_addr: str, ca_file: str, ca_path: str
    ) -> Response:
        """Become a secondary of the token's issuer; replaces everything this cluster holds (contract 1.9).

        Any failure before the flip leaves this cluster as it was.
        """
        manager = self._steady(mode)
        if not token:
            raise InvalidRequest('missing "token"')
        asked = ActivationRequest(token, primary_api_addr, ca_file, ca_path)
        async with self._activating:
            self._enabled_by(manager)
            self._bootstrapping = manager.mode
            flipped = False
            try:
                result = await enrolment.activated(manager, self._sealed, asked)
                failpoint("activation:after-bootstrap")
                await self._callbacks.flip(result)
                flipped = True  # until the end of the tenure this cluster is between its two stores
            finally:
                if not flipped:
                    self._bootstrapping = None
        return Response(warnings=[ENABLING_SECONDARY] if result.protected else [ENABLING_SECONDARY, PLAIN_HTTP])

    async def secondary_disable(self, mode: str) -> Response:
        """Become a cluster of its own with the data there is (contract 1.11)."""
        manager = self._steady(mode)
        roles.require(manager.mode, manager.role, "secondary/disable")
        lacking = tuple(await self.performance.lacking_ids())
        also: list[Write] = []
        if manager is self.dr:
            # The primary goes on as what it is: its copy must not come up as a second one.
            also = [Write(PERFORMANCE.role_key, roles.encode_role(DisabledRole(lacking)))]
            also += await self._callbacks.standalone()
        own = lacking if manager is self.performance else ()
        await manager.commit_with(lambda role: roles.disable(manager.mode, role, "secondary/disable", own), also)
        self.denials.fill(None)
        return Response(warnings=[DISABLING])

    async def secondary_promote(self, mode: str, primary_cluster_addr: str, *, force: bool, preview: bool) -> Response:
        """Become the primary of the set (contract 1.10). With ``preview`` say only what may be lost. Raises Unavailable
        while it may still catch up, InvalidRequest for another objection that only ``force`` overrules."""
        manager = self._steady(mode)
        roles.check_cluster_addr(primary_cluster_addr)
        role = roles.require_secondary(manager.mode, manager.role)
        standing = await manager.standing(probe=True)
        said: dict[str, Any] = {
            "progress": 0,
            "required": 1,
            "complete": False,
            "promotion_forecast": forecast(standing),
        }
        if preview:
            return Response(data=said)
        if not force:
            require_safe(standing)
        authority = await enrolment.make_authority(manager.mode, role.set_id)

        async def build(newest: Role, position: Position | None) -> tuple[PrimaryRole, Sequence[Write]]:
            began = self._began(roles.next_number(newest), position)
            after = roles.promote(
                manager.mode,
                newest,
                began=began,
                cluster_addr=primary_cluster_addr,
                authority=authority,
                not_held=[mount.uuid for mount in manager.lacking()],
            )
            return after, await self._taken_over(position) if manager is self.dr else []

        await manager.promote(build)
        self.denials.fill(None)
        warnings = [PROMOTING, *(FORCED.format(objection=text) for text in objections(standing))]
        return Response(data=said, warnings=warnings)

    async def _taken_over(self, position: Position | None) -> Sequence[Write]:
        """The performance role that a promoted DR secondary goes on with."""
        await self.performance.reload()
        before = self.performance.role
        after = roles.take_over(before, began=self._began(roles.next_number(before), position))
        return [] if after is before else [Write(PERFORMANCE.role_key, roles.encode_role(after))]

    async def secondary_update_primary(
        self,
        mode: str,
        token: str,
        *,
        primary_api_addr: str = "",
        ca_file: str = "",
        ca_path: str = "",
        addresses: Sequence[str] = (),
    ) -> Response:
        """Follow another primary of the same set, keeping all data (contract 1.12). With addresses instead of a token
        the credentials stay; with neither it follows nobody."""
        manager = self._steady(mode)
        role = roles.require_secondary(manager.mode, manager.role)
        if token and addresses:
            raise InvalidRequest('"token" and "update_primary_addrs" cannot be given together')
        if addresses:
            await manager.change(lambda newest: roles.redirect(manager.mode, newest, addresses))
            await manager.turn()
            return Response(warnings=[UPDATING_PRIMARY])
        if not token:
            await manager.change(lambda newest: roles.forget_primary(manager.mode, newest))
            await manager.turn()
            return Response(warnings=[FORGETTING])
        asked = ActivationRequest(token, primary_api_addr, ca_file, ca_path)
        async with self._activating:
            result = await enrolment.activated(manager, self._sealed, asked, set_id=role.set_id)
            await enrolment.point_at(manager, self._sealed, self._callbacks, token, result)
            await manager.turn()
        return Response(warnings=[UPDATING_PRIMARY] if result.protected else [UPDATING_PRIMARY, PLAIN_HTTP])

    async def accept_deletions(self, mode: str, deletions: int) -> Response:
        """An operator agrees to what the mass-delete brake stopped. Raises InvalidRequest."""
        manager = self._steady(mode)
        roles.require_secondary(manager.mode, manager.role)
        if manager.secondary is None:
            raise Unavailable("this secondary is just starting; try again shortly")
        manager.secondary.accept_deletions(deletions)
        return Response(warnings=[DELETIONS_ACCEPTED])

    # ---- what was lost

    async def lost_writes(self, mode: str) -> Response:
        """Every record of lost writes: counts and ranges, no keys."""
        return Response(data={"lost_writes": [summary(head) for head in self._of(mode).lost_heads]})

    async def lost_writes_read(self, mode: str, name: str, page: str, *, values: bool) -> Response:
        """One page of one record: its keys, with ``values`` their plaintext in base64 too. Raises NotFound."""
        manager = self._of(mode)
        head = await manager.lost.find(name)
        entries = await manager.lost.page(head, page_number(page, head)) if head.pages else []
        shown = await shown_entries(entries, self._callbacks.open_entry if values else None)
        return Response(data={**summary(head), "lost_entries": shown})

    async def lost_writes_delete(self, mode: str, name: str) -> None:
        """Forget one record. Raises NotFound."""
        manager = self._of(mode)
        await manager.lost.delete(name)
        manager.lost_heads = [head for head in manager.lost_heads if head.id != name]
        logger.warning("replication: the %s lost-writes %s were deleted", mode, name)

    # ---- common

    def _of(self, mode: str) -> ModeManager:
        return self.dr if mode_named(mode) is DR else self.performance

    def _steady(self, mode: str) -> ModeManager:
        """The mode's manager, if its role may be changed now. Raises InvalidRequest, Unavailable."""
        manager = self._of(mode)
        if self._bootstrapping is not None:
            raise InvalidRequest("an activation of this cluster as a secondary is running already")
        self.dr.require_steady()
        if self.mirrors and manager is self.performance:
            raise InvalidRequest(DR_PATH_DISABLED)
        return manager

    def _began(self, number: int, fork: Position | None) -> Promotion:
        """An epoch that begins now, here."""
        return Promotion(
            number,
            str(uuid.uuid4()),
            self._clock.time_ms(),
            fork,
            self._store.generation,
            self._store.head.index,
        )
