"""What an active node runs, in order: recovered store, barrier, cluster port, replication, service. One a tenure.

``start`` builds upwards and leaves the tasks in the caller's group; ``stop`` ends them; ``close`` takes away what other
nodes could still reach. Nothing here outlives the tenure.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
import uuid
from collections.abc import Callable, Collection, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from multidict import CIMultiDict

from consul_backend.allowance import DeleteAllowance
from consul_backend.clock import Clock, SteadyTime
from consul_backend.deadline import deadline
from consul_backend.election import Held
from consul_backend.errors import OutcomeUnknown
from consul_backend.failpoint import failpoint
from consul_backend.physical import PhysicalStore
from consul_backend.replicated import ReplicatedStore, StoreOptions, genesis
from consul_backend.wal import Write
from plugin_api.errors import Unavailable
from sidecar.api.mirror_service import MirrorService
from sidecar.api.node_view import NotForwarded
from sidecar.api.service import Service, ServiceOptions
from sidecar.config import ServerConfig
from sidecar.core.audit.options import LocalRules
from sidecar.core.barrier import Barrier, DecryptionFailed, load_barrier
from sidecar.core.cluster import ClusterInfo
from sidecar.core.init import build_mirror_genesis, build_secondary_genesis
from sidecar.core.keys import CLUSTER, LEASES, PRIVATE_CLUSTER, REPLICATED_KEYRING, SEAL, partition_of
from sidecar.core.lockout_rules import LockoutSettings, LockoutTuning
from sidecar.core.mounts import MountEntry
from sidecar.core.rotation import keep_keys
from sidecar.core.seal_record import SealRecord, root_fingerprint
from sidecar.core.store_view import SealedStore
from sidecar.core.usage import UsageSettings
from sidecar.core.write_gate import GatedStore, WriteGate
from sidecar.forwarding import LEADER_KEY, ForwardingServer, TenureCredentials, Told, from_message
from sidecar.gauges import store_gauges, store_totals
from sidecar.generation import Generation, drop_others, flip_generation, read_generation
from sidecar.healing import heal_needed
from sidecar.node import ActiveRole, Node
from sidecar.replication.activation import ActivationResult
from sidecar.replication.manager import Replication
from sidecar.replication.modes import DR, PERFORMANCE
from sidecar.replication.roles import SecondaryRole, decode_role
from sidecar.replication.selection import Mount
from sidecar.replication.staging import Staging
from sidecar.replication.wiring import Callbacks, Executed, NodeInfo, ReplicationOptions, SecretMaterial, Wiring
from sidecar.request.types import ForwardedAuth
from sidecar.sanitized_config import sanitized
from sidecar.sealing import Opened
from sidecar.shares_keeping import SharesKeeper
from sidecar.standby_claims import StandbyClaims
from sidecar.telemetry import JSONFormatter, TextFormatter
from sidecar.transport.forwarding import ForwardRequest, header_pairs
from sidecar.transport.listener import ClusterListener
from sidecar.wall_clock import watch_wall_clock

log = logging.getLogger("core")


@dataclass(frozen=True, slots=True)
class ScopeParts:
    """What of the configuration an active node needs."""

    cluster_name: str
    service: ServiceOptions
    replication: ReplicationOptions

    @classmethod
    def of(cls, config: ServerConfig) -> ScopeParts:
        """From the whole configuration."""
        return cls(
            cluster_name=config.cluster_name,
            service=ServiceOptions(
                api_addr=config.api_addr,
                default_lease_ttl_s=config.default_lease_ttl_s,
                max_lease_ttl_s=config.max_lease_ttl_s,
                prometheus=config.telemetry.prometheus_retention_s > 0,
                sanitized_config=sanitized(config),
                audit=LocalRules(
                    prefixing=config.audit.allow_prefixing,
                    directories=config.audit.directories,
                    timeout_s=config.audit.timeout_s,
                ),
                usage=UsageSettings(
                    period_s=config.telemetry.usage_period_s,
                    label_values_max=config.telemetry.label_values_max,
                    bucket_s=config.telemetry.lease_bucket_s,
                    buckets=config.telemetry.lease_buckets,
                    lease_namespace=config.telemetry.lease_namespace_label,
                ),
                log_formatters={"standard": TextFormatter, "json": JSONFormatter},
                lockout=LockoutSettings(
                    disabled=config.disable_user_lockout,
                    by_type={
                        kind: LockoutTuning(each.threshold, each.duration_s, each.counter_reset_s, each.disable)
                        for kind, each in config.user_lockout.items()
                    },
                ),
            ),
            replication=ReplicationOptions(
                beat_s=config.replication.heartbeat_interval_s,
                wal_wait_s=config.replication.best_effort_wal_wait_duration_s,
                promotion_lag_max_s=config.replication.promotion_lag_max_s,
                certificate_ttl_s=config.replication.secondary_certificate_ttl_s,
                certificate_check_s=config.replication.certificate_check_interval_s,
                allowance=DeleteAllowance(
                    config.replication.unasked_deletions,
                    config.replication.unasked_deletions_percent / 100,
                ),
                staging=Staging(config.replication.sync_staging_entries, config.replication.sync_staging_bytes),
            ),
        )


class ActiveScope:
    """One tenure of this node. Implements :class:`sidecar.node.RoleView`."""

    def __init__(
        self,
        parts: ScopeParts,
        node: Node,
        physical: PhysicalStore,
        listener: ClusterListener,
        opened: Opened,
        held: Held,
        credentials: TenureCredentials,
        *,
        clock: Clock,
        store_options: StoreOptions,
        seen_index: int,
    ) -> None:
        self._parts = parts
        self._seen_index = seen_index
        self._node = node
        self._physical = physical
        self._listener = listener
        self._opened = opened
        self._held = held
        self._credentials = credentials
        self._clock = clock
        self._store_options = store_options
        self._tasks: list[asyncio.Task[None]] = []
        self._gate: str | None = None
        self._writes = WriteGate()
        self.recovered: ReplicatedStore | None = None
        self._replaced_by: Opened | None = None
        self._mounts_made: Sequence[Mount] = ()
        self._mounts_made_of: Sequence[MountEntry] = ()
        self.restart_asked = asyncio.Event()
        self._claims = StandbyClaims(opened.generation.id)

    async def start(self, tasks: asyncio.TaskGroup) -> ActiveRole:
        """Recover, then serve. Raises BackendError and what the barrier raises."""
        generation = self._opened.generation.id
        store = await ReplicatedStore.recover(
            self._physical,
            generation,
            self._held.tenure,
            self._store_options,
            clock=self._clock,
            lease=self._held.lease,
            seen_index=self._seen_index,
        )
        self._store = self.recovered = store
        self._spawn(tasks, store.run(), "replicated store")
        await heal_needed(store)
        barrier = await load_barrier(store.get, self._opened.root_key)
        sealed = SealedStore(store, barrier)
        self._sealed = sealed
        await self._node.sealing.settle(sealed)
        mirror = isinstance(decode_role(await sealed.get(DR.role_key)), SecondaryRole)
        cluster = await ClusterInfo.load(sealed, mirror=mirror)
        await sealed.put(LEADER_KEY, msgspec.msgpack.encode(self._credentials.record(cluster)))
        self._replication = self._make_replication(
            store, sealed, barrier, cluster, lambda: forwarding.cluster_addresses()
        )
        await self._replication.load()
        self._time = SteadyTime(self._clock, store.head.time_ms)
        gated = GatedStore(store, self._writes)
        self._service = self._make_service(gated, barrier, cluster)
        lock = self._service.seal_lock if isinstance(self._service, Service) else asyncio.Lock()
        self._shares = SharesKeeper(
            SealedStore(gated, barrier), self.modes, self._replication.is_primary_writable, lock
        )
        await self._service.start()
        role = ActiveRole(self._service, self, cluster, time.time(), standbys=lambda: forwarding.standbys())
        self._role = role
        forwarding = ForwardingServer(
            self._credentials,
            cluster_id=cluster.cluster_id,
            own_cluster_addr=self._node.identity.cluster_addr,
            handle=role.run,
            told=self._told,
            root_key_of=self._root_key_of,
            first_heard=self._claims.heard,
        )
        self._listener.add(forwarding.purpose())
        self._spawn(tasks, self._service.run(), "service")
        self._spawn(tasks, self._replication.run(), "replication")
        self._spawn(tasks, self._shares.run(), "key shares")
        self._spawn(tasks, watch_wall_clock(self._time), "wall clock")
        self._spawn(tasks, drop_others(self._physical, generation, store.tenure), "drop old generations")
        self._spawn(tasks, self._claims.run(store), "claims of standbys")
        return role

    def _make_replication(
        self,
        store: ReplicatedStore,
        sealed: SealedStore,
        barrier: Barrier,
        cluster: ClusterInfo,
        cluster_addresses: Callable[[], Sequence[str]],
    ) -> Replication:
        identity = self._node.identity
        return Replication(
            Wiring(
                store=store,
                sealed=sealed,
                listener=self._listener,
                node=NodeInfo(
                    node_id=identity.node_id,
                    local_cluster_id=cluster.cluster_id,
                    api_addr=identity.api_addr,
                    cluster_addr=identity.cluster_addr,
                    cluster_addresses=cluster_addresses,
                ),
                callbacks=Callbacks(
                    on_applied=self._on_applied,
                    set_gate=self._set_gate,
                    secret_material=self._secret_material,
                    flip=self._flip,
                    execute=self._execute,
                    restart=self._begin_anew,
                    keep_keys=self._keep_keys,
                    root_key=barrier.root_key,
                    derived_key=barrier.derived_key,
                    open_entry=self._open_entry,
                    standalone=self._standalone,
                    gate=self._writes,
                    mounts=self._mounts,
                    reselected=self._reselected,
                ),
                clock=self._clock,
                options=self._parts.replication,
            )
        )

    def _make_service(self, store: GatedStore, barrier: Barrier, cluster: ClusterInfo) -> Service | MirrorService:
        now = self._time.now_s
        if self._replication.mirrors:
            return MirrorService(store, barrier, cluster, node=self._node, replication=self._replication, now=now)
        return Service(
            store,
            barrier,
            cluster,
            self._parts.service,
            node=self._node,
            replication=self._replication,
            now=now,
            wall=lambda: self._clock.time_ms() / 1000,
            gate=lambda: self._gate,
        )

    def _spawn(self, tasks: asyncio.TaskGroup, work: Coroutine[Any, Any, None], name: str) -> None:
        self._tasks.append(tasks.create_task(work, name=name))

    async def stop(self) -> None:
        """End what start began, the last first."""
        for task in reversed(self._tasks):
            task.cancel()

    async def close(self, *, linger_s: float = 0.0) -> None:
        """No other node reaches this tenure any more; with ``linger_s`` only after the standbys have hung up, but not
        later than that. Until then they are told that their requests were not run; and, where this tenure replaced the
        store, which root key it has now: each has to learn of it first, so that lasts until the end."""
        at_least_s = linger_s if self._replaced_by is not None else 0.0
        await self._listener.retire(self._credentials.sni, linger_s, at_least_s=at_least_s)

    def _root_key_of(self, generation: str) -> bytes | None:
        opened = self._replaced_by
        # Sealed since, or moved on: then this node has nothing to give away.
        if opened is None or opened.generation.id != generation or self._node.sealing.opened is not opened:
            return None
        return opened.root_key

    def head_index(self) -> int:
        return self._store.head.index

    def modes(self) -> tuple[str, str]:
        return self._replication.modes()

    def canary_age_ms(self) -> int:
        return int(self._replication.lag_s() * 1000)

    def _told(self) -> Told:
        head, cors = self._store.head, self._service.cors
        return Told(self.modes(), head.index, self.canary_age_ms(), cors, head.chain_hash)

    def gauges(self) -> dict[str, float]:
        mode = DR if self._replication.mirrors else PERFORMANCE
        position = self._store.positions.get(mode.name)
        remote_index = None if position is None else position.index
        gauges = store_gauges(self._store.statistics(), self.modes(), remote_index)
        gauges |= self._service.gauges() | self._replication.gauges()
        leases = self._store.forest.count(*LEASES.rstrip("/").split("/"))
        return gauges | {"expire.num_leases": leases - gauges.get("expire.num_irrevocable_leases", 0)}

    def totals(self) -> dict[str, float]:
        return store_totals(self._store.statistics())

    def audit_blocked(self) -> bool:
        return self._service.audit_blocked()

    def stopped_reason(self) -> str:
        return self._replication.denials.stopped or ""

    def reopen_audit(self) -> None:
        self._service.reopen_audit()

    # ---- what replication asks of the node

    async def _on_applied(self, keys: Sequence[str]) -> None:
        await self._service.invalidate(keys)
        self._shares.heard(keys)

    def _set_gate(self, reason: str | None) -> None:
        self._gate = reason

    async def _secret_material(self, keyrings: Collection[str]) -> SecretMaterial:
        seal = await self._store.get(SEAL)
        found = {key: raw for key in keyrings if (raw := await self._store.get(key)) is not None}
        if len(found) != len(keyrings) or seal is None:
            raise Unavailable("a keyring or the seal record of this cluster is missing")
        # Its auto seal is of no use to another cluster, which has its own or none.
        return SecretMaterial(self._opened.root_key, found, SealRecord.decode(seal).with_auto(None).encode())

    def _begin_anew(self) -> None:
        """A role was committed that only a new tenure can play; until then nobody is served by the old one."""
        self._gate = "the role of this cluster is being changed; try again shortly"
        self.restart_asked.set()

    async def _keep_keys(self) -> None:
        await keep_keys(self._sealed, self._clock.time_ms() / 1000)

    async def _open_entry(self, key: str, raw: bytes) -> bytes | None:
        """For an operator who looks at lost writes: data, but nothing that this cluster's keys and trust hang on."""
        if partition_of(key).endswith(("/core", "/replication")):
            return None
        try:
            return await self._sealed.barrier.open_value(key, raw)
        except DecryptionFailed as error:
            log.error("a lost write cannot be shown: %s", error)
            return None

    def _mounts(self) -> Sequence[Mount]:
        """The same object until a table changes: a stream asks before each frame."""
        if not isinstance(self._service, Service):
            return ()
        mounted = self._service.mounts.table.replicated()
        if mounted is not self._mounts_made_of:
            self._mounts_made = [Mount(entry.full_path, entry.uuid, entry.type) for entry in mounted]
            self._mounts_made_of = mounted
        return self._mounts_made

    async def _reselected(self) -> None:
        if isinstance(self._service, Service):
            await self._service.reselected()

    async def _standalone(self) -> Sequence[Write]:
        """The identity that a mirror has had of its own becomes the cluster's; a demoted primary gets a new one."""
        own = await self._sealed.get(PRIVATE_CLUSTER)
        return [Write(CLUSTER, own or ClusterInfo.generate(self._parts.cluster_name or None, os.urandom).encode())]

    async def _execute(self, message: ForwardRequest) -> Executed:
        """Run a secondary's request here: its identity is what the message says, whatever its headers hold."""
        request = from_message(message)
        auth = message.auth
        request.headers = CIMultiDict(
            (name, value)
            for name, value in request.headers.items()
            if name.lower() not in ("x-vault-token", "authorization")
        )
        if auth is not None:
            request.forwarded_auth = ForwardedAuth(
                policies=auth.policies,
                display_name=auth.display_name,
                accessor=auth.accessor,
                entity_id=auth.entity_id,
                metadata=auth.metadata,
                cluster_id=auth.cluster_id,
            )
        try:
            with deadline(message.time_left_s):
                answer = await self._role.run(request)
        except NotForwarded as error:
            raise Unavailable(str(error)) from error
        return Executed(answer.status, header_pairs(answer.headers.items()), answer.body, answer.position)

    async def _flip(self, result: ActivationResult) -> None:
        """Build the new store from an activation and point the cluster at it; this tenure then ends by itself."""
        found = await read_generation(self._physical)
        if found is None or found[0] != self._opened.generation:
            raise Unavailable("the store's generation changed during the activation; nothing was changed here")
        target = Generation(os.urandom(4).hex(), str(uuid.uuid4()), root_fingerprint(result.root_key))
        writes = self._genesis_of(result, await self._node.sealing.own_record(result.seal, result.root_key))
        await genesis(
            self._physical,
            target.id,
            writes,
            node_id=self._node.identity.node_id,
            time_ms=self._clock.time_ms(),
            random_bytes=os.urandom,
            tenure=self._held.tenure,
            segment_records=self._store_options.segment_records,
        )
        failpoint("activation:after-genesis")
        await self._point_at(target, found[1])
        failpoint("activation:after-flip")
        log.warning("this cluster is now a %s secondary; its previous store is being deleted", result.mode.name)
        # What is still admitted would be written to the store that was just given up.
        self._gate = "this cluster is becoming a replication secondary; try again shortly"
        self._replaced_by = Opened(target, result.root_key)
        self._node.sealing.install(self._replaced_by)

    def _genesis_of(self, result: ActivationResult, seal_raw: bytes) -> list[Write]:
        now_s, cluster_name = self._clock.time_ms() / 1000, self._parts.cluster_name or None
        if result.mode is DR:
            return build_mirror_genesis(
                root_key=result.root_key,
                keyrings=result.keyrings,
                seal_raw=seal_raw,
                now_s=now_s,
                random_bytes=os.urandom,
                extra=result.entries,
                cluster_name=cluster_name,
            )
        return build_secondary_genesis(
            root_key=result.root_key,
            replicated_keyring_raw=result.keyrings[REPLICATED_KEYRING],
            seal_raw=seal_raw,
            now_s=now_s,
            random_bytes=os.urandom,
            extra=result.entries,
            cluster_name=cluster_name,
        )

    async def _point_at(self, target: Generation, expected_index: int) -> None:
        try:
            await flip_generation(self._physical, self._store.tenure, expected_index, target)
        except OutcomeUnknown as error:
            found = await read_generation(self._physical)
            if found is not None and found[0] == target:
                return
            # Ending the tenure destroys its session, so that the flip cannot land later under a serving node.
            self.restart_asked.set()
            raise Unavailable(
                "the store did not confirm the activation: this node gives up leadership; look at "
                "sys/replication/status before you try again with a new token"
            ) from error
