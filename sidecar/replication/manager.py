"""Performance replication of one cluster, for one tenure of its active node.

:class:`PerformanceReplication` owns the role: the one entry that says what this cluster is, and the task scope in which
it acts as such. A change of role is committed first; then :meth:`run` leaves the old role's scope and enters the new
one's. The calls of ``sys/replication`` are methods here; what each allows is decided in
:mod:`sidecar.replication.roles`.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from consul_backend.clock import Clock
from consul_backend.errors import NotLoaded
from consul_backend.failpoint import failpoint
from consul_backend.reindex import ReindexOptions
from plugin_api.errors import InvalidRequest, Unavailable
from plugin_api.request import Response
from sidecar.replication import roles
from sidecar.replication import status as statuses
from sidecar.replication.activation import activate, build_bundle
from sidecar.replication.committer import stored_position
from sidecar.replication.intake import REPLICATED
from sidecar.replication.primary import PrimaryService
from sidecar.replication.roles import DisabledRole, PrimaryRole, Role, SecondaryRole
from sidecar.replication.secondary import SecondaryService
from sidecar.replication.shipper import Peer
from sidecar.replication.upkeep import IndexUpkeep
from sidecar.replication.wiring import (
    AuthLike,
    Callbacks,
    ClusterStore,
    ForwardAnswer,
    NodeInfo,
    ReplicationOptions,
    SealedEntries,
)
from sidecar.transport import certificates
from sidecar.transport.forwarding import RequestLike
from sidecar.transport.listener import ClusterListener

logger = logging.getLogger(__name__)

ENABLING_PRIMARY = (
    "This cluster is being enabled as a primary for replication. Vault will be unavailable for a brief period and will "
    "resume service shortly."
)
DISABLING = (
    "This cluster is having replication disabled. Vault will be unavailable for a brief period and will resume service "
    "shortly."
)
ENABLING_SECONDARY = (
    "Vault has successfully found secondary information; it may take a while to perform setup tasks. Vault will be "
    "unavailable until these tasks and initial sync complete."
)
PLAIN_HTTP = (
    "The primary's API address is not https: the activation token was sent to it unprotected, and anybody on the way "
    "could have used it."
)
REINDEXING = "The reindex runs in the background; see sys/replication/status for its progress."
REINDEX_CANCELLED = "The running reindex was cancelled. What it repaired stays repaired; start it again for the rest."
RECOVERING = "This cluster is trying to leave an adverse state; see sys/replication/status."
SERVING_WAIT_S = 5.0

_R = TypeVar("_R", bound=Role)


class PerformanceReplication:
    """See the module. ``store`` is the raw replicated store, ``sealed`` the same through the barrier."""

    def __init__(
        self,
        *,
        store: ClusterStore,
        sealed: SealedEntries,
        listener: ClusterListener,
        node: NodeInfo,
        callbacks: Callbacks,
        clock: Clock,
        options: ReplicationOptions | None = None,
    ) -> None:
        self._store = store
        self._sealed = sealed
        self._listener = listener
        self._node = node
        self._callbacks = callbacks
        self._clock = clock
        self._options = options or ReplicationOptions()
        self._role: Role = DisabledRole()
        self._changing = asyncio.Lock()
        self._activating = asyncio.Lock()
        self._turned = asyncio.Event()
        self._serving = asyncio.Event()
        self._running = False
        self._flipped = False
        self._primary: PrimaryService | None = None
        self._secondary: SecondaryService | None = None
        self._upkeep = IndexUpkeep(store, sealed, clock)

    @property
    def role(self) -> Role:
        """The newest committed role; it holds secrets."""
        return self._role

    @property
    def mode(self) -> str:
        """``disabled``, ``primary``, ``secondary`` or ``bootstrapping``, as in ``sys/health``."""
        if self._bootstrapping():
            return "bootstrapping"
        if isinstance(self._role, PrimaryRole):
            return "primary"
        return "secondary" if isinstance(self._role, SecondaryRole) else "disabled"

    async def load(self) -> None:
        """Read the role; once, before anything else. Raises BackendError."""
        self._role = roles.decode_role(await self._sealed.get(roles.ROLE_KEY))
        await self._upkeep.load()

    async def run(self) -> None:
        """Act as the role says until cancelled, through every change of it. What ends the tenure comes out as an
        exception group: the errors of this cluster's own store, and bugs."""
        self._running = True
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._upkeep.run(), name="index upkeep")
                while True:
                    self._turned.clear()
                    await self._act()
        finally:
            self._running = False

    def is_primary_writable(self) -> bool:
        """Whether this cluster may write class ``r``."""
        return not isinstance(self._role, SecondaryRole)

    async def forward_to_primary(self, request: RequestLike, auth: AuthLike) -> ForwardAnswer:
        """See :meth:`SecondaryService.forward`. Raises Unavailable, PluginError."""
        if self._secondary is None:
            raise Unavailable("this cluster is not following a replication primary right now")
        return await self._secondary.forward(request, auth)

    async def status(self, mode: str | None) -> dict[str, Any]:
        """The status of one mode, or of both for None (contract 1.2)."""
        if mode is None:
            return {"dr": dict(statuses.DISABLED), "performance": self._status()}
        if mode not in roles.MODES:
            raise InvalidRequest(f'unknown replication mode "{mode}"')
        return self._status() if mode == "performance" else dict(statuses.DISABLED)

    async def primary_enable(self, mode: str, primary_cluster_addr: str) -> Response:
        """Become the primary of a new set (contract 1.3)."""
        roles.require_performance(mode)
        roles.check_cluster_addr(primary_cluster_addr)
        self._refuse_while_activating()
        set_id, epoch_id = str(uuid.uuid4()), str(uuid.uuid4())
        authority = await asyncio.to_thread(certificates.make_authority, f"outrider performance replication {set_id}")
        await self._change(
            lambda role: roles.enable_primary(
                role,
                set_id=set_id,
                epoch_id=epoch_id,
                cluster_addr=primary_cluster_addr,
                authority=authority,
            )
        )
        await self._turn()
        return Response(warnings=[ENABLING_PRIMARY])

    async def primary_disable(self, mode: str) -> Response:
        """Forget the set; every secondary is cut (contract 1.5)."""
        roles.require_performance(mode)
        await self._change(roles.disable_primary)
        await self._turn()
        return Response(warnings=[DISABLING])

    async def secondary_disable(self, mode: str) -> Response:
        """Become a cluster of its own with the data there is (contract 1.11)."""
        roles.require_performance(mode)
        await self._change(roles.disable_secondary)
        await self._turn()
        self._callbacks.set_gate(None)
        return Response(warnings=[DISABLING])

    async def secondary_token(
        self,
        mode: str,
        id: str,  # noqa: A002 - the API's own name
        ttl_s: int,
        public_key: str,
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """(payload to wrap, extra JWT claims) for a new secondary, which is known from now on (contract 1.6)."""
        roles.require_performance(mode)
        if public_key:
            raise InvalidRequest("secondary_public_key is not supported by this version; omit it for a wrapped token")
        if ttl_s <= 0:
            raise InvalidRequest('"ttl" must be positive')
        role = roles.require_primary(self._role)
        roles.check_new(role, roles.check_id(id))
        payload, claims, fingerprint = await asyncio.to_thread(
            build_bundle,
            role.authority,
            secondary_id=id,
            set_id=role.set_id,
            epoch=role.epoch,
            primary_cluster_addr=role.primary_cluster_addr or self._node.cluster_addr,
        )
        replaced: list[str] = []

        def add(newest: Role) -> PrimaryRole:
            if roles.require_primary(newest).set_id != role.set_id:
                raise InvalidRequest("replication was set up anew meanwhile; try again")
            after, before = roles.add_secondary(
                newest,
                id,
                fingerprint,
                now_ms=self._clock.time_ms(),
                ttl_ms=ttl_s * 1000,
            )
            replaced.extend([before] if before else [])
            return after

        await self._change(add)
        if self._primary is not None:
            self._primary.shipper.expect(id)
        for old in replaced:
            self._listener.cut(old)
        return payload, claims

    async def merkle_check(self) -> Response:
        """Compare the index with everything stored; read-only (contract 1.14)."""
        return Response(data=await self._upkeep.check())

    async def reindex(self, diff: bool, force: bool, skip_flush: bool) -> Response:
        """Start to repair index and data keys in the background (contract 1.13)."""
        self._upkeep.start(ReindexOptions(diff=diff, force=force, skip_flush=skip_flush))
        return Response(warnings=[REINDEXING])

    async def recover(self) -> Response:
        """Try to leave an adverse state: a running reindex is cancelled, a secondary begins anew (contract 1.13)."""
        cancelled = self._upkeep.cancel()
        if isinstance(self._role, SecondaryRole):
            await self._turn()
        return Response(warnings=[REINDEX_CANCELLED if cancelled else RECOVERING])

    async def revoke_secondary(self, mode: str, id: str) -> None:  # noqa: A002 - the API's own name
        """Commit that it is unknown, then cut it off (contract 1.7)."""
        roles.require_performance(mode)
        doomed: list[str] = []

        def remove(newest: Role) -> PrimaryRole:
            after, fingerprint = roles.revoke(newest, id)
            doomed.append(fingerprint)
            return after

        await self._change(remove)
        for fingerprint in doomed:
            if self._primary is not None:
                await self._primary.dismiss(id, fingerprint)
            else:
                self._listener.cut(fingerprint)
        logger.warning("replication: secondary %s was revoked", id)

    async def secondary_enable(
        self,
        mode: str,
        token: str,
        primary_api_addr: str,
        ca_file: str,
        ca_path: str,
    ) -> Response:
        """Become a secondary of the token's issuer; replaces everything this cluster holds (contract 1.9).

        Any failure before the flip leaves this cluster as it was.
        """
        roles.require_performance(mode)
        if not token:
            raise InvalidRequest('missing "token"')
        self._refuse_while_activating()
        async with self._activating:
            roles.require_disabled(self._role)
            result = await activate(
                token,
                primary_api_addr=primary_api_addr,
                ca_file=ca_file,
                ca_path=ca_path,
                store_id=str(uuid.uuid4()),
                now_s=self._clock.time_ms() / 1000,
                timeout_s=self._options.activation_timeout_s,
            )
            failpoint("activation:after-bootstrap")
            await self._callbacks.flip(result)
            self._flipped = True
        warnings = [ENABLING_SECONDARY] if result.protected else [ENABLING_SECONDARY, PLAIN_HTTP]
        return Response(warnings=warnings)

    def _bootstrapping(self) -> bool:
        """From the start of an activation to the end of the tenure that did it; a failed one ends at once."""
        return self._activating.locked() or self._flipped

    def _refuse_while_activating(self) -> None:
        if self._bootstrapping():
            raise InvalidRequest("an activation of this cluster as a secondary is running already")

    async def _change(self, change: Callable[[Role], _R]) -> _R:
        """Apply ``change`` to the newest role and commit the result, one change at a time.

        The role in memory moves only after the commit: nobody is let in, or acts, by a role that a crash would undo.
        """
        async with self._changing:
            after = change(self._role)
            if after is not self._role:
                failpoint("role:before-commit")
                await self._sealed.put(roles.ROLE_KEY, roles.encode_role(after))
                failpoint("role:after-commit")
                self._role = after
            return after

    async def _turn(self) -> None:
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

    async def _act(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            acting = tasks.create_task(self._act_as(self._role), name=f"replication {self.mode}")
            await self._turned.wait()
            acting.cancel()

    async def _act_as(self, role: Role) -> None:
        try:
            if isinstance(role, PrimaryRole):
                self._primary = PrimaryService(
                    self._store,
                    self._listener,
                    self._node,
                    self._callbacks,
                    self._clock,
                    self._options,
                    role,
                    newest=self._primary_of(role.set_id),
                    change=self._change_primary,
                    serving=self._serving,
                )
                await self._primary.run()
            elif isinstance(role, SecondaryRole):
                self._secondary = SecondaryService(
                    self._store,
                    self._node,
                    self._callbacks,
                    self._clock,
                    self._options,
                    role,
                    learned=self._learned,
                )
                await self._secondary.run()
        finally:
            self._primary = self._secondary = None

    def _primary_of(self, set_id: str) -> Callable[[], PrimaryRole | None]:
        def newest() -> PrimaryRole | None:
            role = self._role
            return role if isinstance(role, PrimaryRole) and role.set_id == set_id else None

        return newest

    async def _change_primary(self, change: Callable[[Role], PrimaryRole]) -> PrimaryRole:
        return await self._change(change)

    async def _learned(self, addresses: Sequence[str]) -> SecondaryRole | None:
        def learn(newest: Role) -> Role:
            return roles.learn_addresses(newest, addresses) if isinstance(newest, SecondaryRole) else newest

        after = await self._change(learn)
        return after if isinstance(after, SecondaryRole) else None

    def _status(self) -> dict[str, Any]:
        if self._bootstrapping():
            return statuses.bootstrapping_status()
        role = self._role
        if isinstance(role, PrimaryRole):
            return self._primary_status(role)
        if isinstance(role, SecondaryRole):
            return self._secondary_status(role)
        return dict(statuses.DISABLED)

    def _primary_status(self, role: PrimaryRole) -> dict[str, Any]:
        peers = self._primary.shipper.peers if self._primary is not None else {}
        return statuses.primary_status(
            statuses.PrimaryFacts(
                set_id=role.set_id,
                epoch_number=role.epoch.number,
                epoch_id=role.epoch.id,
                primary_cluster_addr=role.primary_cluster_addr,
                known_secondaries=sorted(role.secondaries),
                secondaries=[
                    self._peer_facts(id_, peers[id_])
                    for id_ in sorted(role.secondaries)
                    if id_ in peers and peers[id_].heard_at_s is not None
                ],
                head_index=self._store.head.index,
                merkle_root=self._root_hex(),
                running=self._primary is not None and self._primary.serving.is_set(),
                index=self._upkeep.facts(),
            )
        )

    def _peer_facts(self, id_: str, peer: Peer) -> statuses.SecondaryFacts:
        lag_s = peer.lag_s(self._clock.monotonic())
        return statuses.SecondaryFacts(
            id_,
            acked_index=peer.applied,
            heartbeats=statuses.Heartbeats(
                connected=peer.connected,
                api_addr=peer.advertised.api_addr,
                cluster_addr=next(iter(peer.advertised.cluster_addrs), ""),
                last_ms=self._heard_ms(peer.heard_at_s),
                canary_age_ms=None if lag_s is None else int(lag_s * 1000),
            ),
        )

    def _secondary_status(self, role: SecondaryRole) -> dict[str, Any]:
        service = self._secondary
        position = stored_position(self._store)
        facts = statuses.SecondaryStatusFacts(
            set_id=role.set_id,
            epoch_number=role.epoch.number,
            epoch_id=role.epoch.id,
            secondary_id=role.secondary_id,
            primary_cluster_addr=role.primary_cluster_addr,
            known_addresses=role.dial_order,
            state="idle",
            connection_state="idle",
            last_remote_wal=position.index if position else 0,
            last_wal=self._store.head.index,
            merkle_root=self._root_hex(),
            started_ms=self._clock.time_ms(),
            index=self._upkeep.facts(),
        )
        if service is None:
            return statuses.secondary_status(facts)
        applied, upstream = service.applier.position, service.applier.upstream
        lag_s = service.applier.lag_s()
        beats = statuses.Heartbeats(
            connected=upstream.connected,
            api_addr=upstream.advertised.api_addr or role.primary_api_addr,
            cluster_addr=service.connected_to or role.primary_cluster_addr,
            last_ms=self._heard_ms(upstream.heard_at_s),
            canary_age_ms=None if lag_s is None else int(lag_s * 1000),
        )
        return statuses.secondary_status(
            replace(
                facts,
                state=service.state,
                connection_state=service.connection_state,
                started_ms=service.started_ms,
                last_remote_wal=applied.index if applied else 0,
                reason=service.machine.reason,
                alarm=service.machine.alarm,
                lag_s=lag_s,
                last_sync=service.last_sync,
                sync_progress=service.sync_progress,
                primary=beats if upstream.heard_at_s is not None else None,
            )
        )

    def _root_hex(self) -> str:
        try:
            return self._store.forest.root(REPLICATED).hex()
        except NotLoaded:
            return ""

    def _heard_ms(self, heard_at_s: float | None) -> int:
        if heard_at_s is None:
            return 0
        return self._clock.time_ms() - int((self._clock.monotonic() - heard_at_s) * 1000)
