"""The life of an unsealed node: elect → lead or stand by → recover → again. A role is the scope of one function.

Leading and standing by never overlap; recovery ends before a role starts; the lock is the last thing given back.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

from consul_backend.clock import Clock
from consul_backend.complaints import Complaint
from consul_backend.election import Election, ElectionOptions, Held, LeaderInfo
from consul_backend.errors import (
    BackendError,
    Conflict,
    Corrupt,
    FenceLost,
    NotApplied,
    OutcomeUnknown,
    PermissionDenied,
    SentinelMissing,
    StoreWentBack,
    Unavailable,
)
from consul_backend.failpoint import failpoint
from consul_backend.physical import GENERATION_KEY, PhysicalStore
from consul_backend.replicated import StoreOptions
from sidecar.core.barrier import BarrierMissing, DecryptionFailed
from sidecar.core.keyring import BadKeyring
from sidecar.core.metrics import METRICS
from sidecar.core.seal_record import WrongKey
from sidecar.forwarding import KeySource, StandbyForwarder, TenureCredentials, read_leader_record
from sidecar.leading import ActiveScope, ScopeParts
from sidecar.mesh.registration import Registrar
from sidecar.node import ActiveRole, Node, StandbyRole
from sidecar.sealing import Opened
from sidecar.transport.forwarding import Echo, ForwardNotSent
from sidecar.transport.listener import ClusterListener

log = logging.getLogger("core")

# The store or the keys are not what they must be: retrying cannot help, and serving could do harm.
KEYS = (DecryptionFailed, BarrierMissing, BadKeyring, WrongKey)
HALTING = (SentinelMissing, StoreWentBack, Corrupt, *KEYS)
# This tenure is over, another may begin.
ENDING = (FenceLost, OutcomeUnknown, Unavailable, NotApplied, Conflict, PermissionDenied)


@dataclass(frozen=True, slots=True)
class RoleOptions:
    """Times in seconds. ``keys_wait_s``: how long a standby asks for the root key of a store that replaced its own;
    less than ``linger_s``, for which it is told."""

    drain_s: float = 5.0
    retry_s: float = 0.2
    echo_s: float = 1.0
    linger_s: float = 10.0
    farewell_s: float = 1.0
    keys_wait_s: float = 5.0
    forward_timeout_s: float = 90.0


@dataclass(frozen=True, slots=True)
class _Left:
    """Why a tenure ended on purpose: a step-down was ``asked`` for, or the store is ``stale`` for this node's keys."""

    asked: bool = False
    stale: str = ""


class Roles:
    """Plays roles for ``node`` until cancelled."""

    def __init__(
        self,
        node: Node,
        physical: PhysicalStore,
        listener: ClusterListener,
        registration: Registrar,
        parts: ScopeParts,
        *,
        clock: Clock,
        election_options: ElectionOptions,
        store_options: StoreOptions,
        options: RoleOptions,
    ) -> None:
        self._node = node
        self._physical = physical
        self._listener = listener
        self._registration = registration
        self._parts = parts
        self._clock = clock
        self._store_options = store_options
        self._options = options
        self._credentials = TenureCredentials.make()
        self._seen: tuple[str, int, bytes] = ("", 0, b"")
        self._key_source: KeySource | None = None
        self._stale = False
        self._retiring: set[asyncio.Task[object]] = set()
        self._election = Election(
            physical, node_id=node.identity.node_id, advertise=self._advertise, clock=clock, options=election_options
        )

    def _advertise(self) -> LeaderInfo:
        identity = self._node.identity
        return LeaderInfo(identity.node_id, identity.api_addr, identity.cluster_addr, self._credentials.sni)

    async def run(self) -> None:
        """Until cancelled; a cancellation while leading steps down cleanly first."""
        try:
            await self._run()
        finally:
            if self._retiring:
                await asyncio.wait(self._retiring, timeout=self._options.farewell_s)
            await _end(*self._retiring)

    def _later(self, work: Coroutine[Any, Any, None]) -> None:
        """Let what another node may still wait for come to its end, beside the next role."""
        task: asyncio.Task[object] = asyncio.create_task(work, name="leaving")
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)

    async def _run(self) -> None:
        while True:
            opened = await self._node.sealing.wait_unsealed()
            await self._registration.update(sealed=False, initialized=True)
            try:
                held = await self._stand_by(opened)
                if held is not None:
                    await self._lead(opened, held)
            except HALTING as error:
                self._halt(error)
            except PermissionDenied as error:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._node.rights.refused(error)):
                        await self._node.sealing.wait_left(opened)
            if self._node.sealing.opened is None:
                await self._registration.update(sealed=True, active=False)

    def _see(self, opened: Opened, index: int, chain_hash: bytes) -> None:
        """Remember that a record was committed: a store that later ends before it was put back underneath."""
        if index > self._seen_in(opened)[0]:
            self._seen = (opened.generation.id, index, chain_hash)

    def _seen_in(self, opened: Opened) -> tuple[int, bytes]:
        generation, index, chain_hash = self._seen
        return (index, chain_hash) if generation == opened.generation.id else (0, b"")

    def _halt(self, error: BaseException) -> None:
        self._seen = ("", 0, b"")  # whoever unseals this node again has decided to go on with the store as it is
        self._node.sealing.seal(
            f"{error} (this node serves nothing until it is unsealed again, or restarted where it unseals itself)"
        )

    # ---- standing by

    async def _stand_by(self, opened: Opened) -> Held | None:
        """Forward to whoever leads, until this node is elected (the lock) or no longer unsealed as it was (None)."""
        role = StandbyRole()
        self._node.take_role(role)
        self._key_source, self._stale = None, False
        self._credentials = await asyncio.to_thread(TenureCredentials.make)
        campaign = asyncio.create_task(self._election.campaign(), name="campaign")
        left = asyncio.create_task(self._node.sealing.wait_left(opened), name="wait for seal")
        duties = [
            asyncio.create_task(self._follow_leader(opened, role), name="follow the leader"),
            asyncio.create_task(self._watch_generation(opened), name="watch the generation"),
        ]
        try:
            await asyncio.wait([campaign, left, *duties], return_when=asyncio.FIRST_COMPLETED)
            for duty in duties:
                if duty.done() and (error := duty.exception()) is not None:
                    raise error
        except BaseException:
            await self._leave_standby(role, campaign, left, *duties)
            if _won(campaign):
                await self._election.release(campaign.result(), stay_away_s=0.0)
            raise
        await self._leave_standby(role, campaign, left, *duties)
        # It may also have won while it was being stopped: whoever won leads, were it only to give the lock back.
        return None if campaign.cancelled() else campaign.result()

    async def _leave_standby(self, role: StandbyRole, *tasks: asyncio.Task[Any]) -> None:
        self._node.take_role(None)
        await _end(*tasks)
        if role.forwarder is not None:
            self._later(role.forwarder.retire(self._options.linger_s))

    async def _watch_generation(self, opened: Opened) -> None:
        """Notice when the store under this node becomes another one: its keys may open it no longer."""
        index = 0
        complaint = Complaint()
        while True:
            try:
                if reason := await self._node.sealing.stale_reason(opened):
                    self._stale = True
                    await self._refit(opened, reason)
                    return
                _, index = await self._physical.watch(GENERATION_KEY, index, 10.0)
            except Unavailable as error:
                if complaint.due(error):
                    log.warning("the generation pointer cannot be watched: %s", error)
                index = 0
                await asyncio.sleep(1.0)

    async def _refit(self, opened: Opened, reason: str) -> None:
        """The store was replaced: go on with its keys if whoever did that tells them, else be sealed for ``reason``."""
        source = self._key_source

        async def ask(generation: str) -> bytes | None:
            return await source.root_key_of(generation, timeout_s=self._options.keys_wait_s) if source else None

        if await self._node.sealing.reopen(opened, ask):
            log.warning("the cluster's store was replaced: this node goes on with the keys that the active node has")
        elif self._node.sealing.opened is opened:
            self._node.sealing.seal(reason, reopen=True)

    async def _follow_leader(self, opened: Opened, role: StandbyRole) -> None:
        """Keep ``role`` pointing at the active node, and tell that node of this one."""
        complaint = Complaint()
        while True:
            try:
                if not self._stale:  # what would be read is being deleted
                    await self._follow_once(opened, role)
            except (Unavailable, ForwardNotSent) as error:
                log.debug("the active node is not reached: %s", error)
            except KEYS as error:
                # Read past the index, by which the one that leads judges it and puts it right; this node can wait.
                if complaint.due(error):
                    log.error("requests cannot be forwarded, the keys of the active node do not open: %s", error)
            await asyncio.sleep(self._options.retry_s if role.forwarder is None else self._options.echo_s)

    async def _follow_once(self, opened: Opened, role: StandbyRole) -> None:
        leader = await self._election.leader()
        if leader is not None and leader.node_id == self._node.identity.node_id:
            leader = None  # this node's own earlier tenure, or the one it is just winning
        if leader != role.leader:
            forwarder, role.forwarder, role.leader = role.forwarder, None, leader
            self._node.take_role(role)
            if forwarder is not None:
                self._later(forwarder.retire(self._options.linger_s))
        if leader is None:
            return
        if role.forwarder is None:
            record = await read_leader_record(self._physical, opened, leader.sni)
            if record is None:
                return
            role.forwarder = StandbyForwarder(leader, record, timeout_s=self._options.forward_timeout_s)
            self._key_source = KeySource(leader, record)
            role.cluster = role.forwarder.cluster
        identity = self._node.identity
        seen_index, seen_hash = self._seen_in(opened)
        sent_s = time.monotonic()
        reply = await role.forwarder.echo(
            Echo(
                identity.node_id,
                identity.api_addr,
                identity.cluster_addr,
                opened.generation.id,
                identity.hostname,
                self._node.version,
                clock_ms=int(time.time() * 1000),
                echo_ms=int(role.echo_s * 1000),
                seen_index=seen_index,
                seen_hash=seen_hash,
            )
        )
        role.heard(reply, time.monotonic() - sent_s)
        self._see(opened, reply.head_index, reply.head_hash)
        modes = (reply.performance_mode, reply.dr_mode)
        if not role.ready:
            log.info("vault is in standby mode: leader=%s", leader.api_addr)
        if not role.ready or modes != role.modes:
            role.ready, role.modes = True, modes
            self._node.rights.accepted()
            await self._registration.update(active=False, performance_mode=modes[0], dr_mode=modes[1])
        self._node.take_role(role)

    # ---- leading

    async def _lead(self, opened: Opened, held: Held) -> None:
        """Everything only an active node does happens in here; leaving is stepping down."""
        self._node.step_down_asked.clear()
        scope = ActiveScope(
            self._parts,
            self._node,
            self._physical,
            self._listener,
            opened,
            held,
            self._credentials,
            clock=self._clock,
            store_options=self._store_options,
            seen_index=self._seen_in(opened)[0],
        )
        lost: BaseException | None = None
        left = _Left()
        try:
            async with asyncio.TaskGroup() as tasks:
                keeping = tasks.create_task(self._election.keep(held), name="keep the lock")
                left = await self._active(opened, scope, tasks)
                keeping.cancel()
        except* ENDING as group:
            lost = group
        except* HALTING as group:
            lost = group
        finally:
            self._node.take_role(None)
            if scope.recovered is not None:
                self._see(opened, scope.recovered.head.index, scope.recovered.head.chain_hash)
            if lost is None:
                # The standbys' connections stay until they have found the next active node.
                self._later(scope.close(linger_s=self._options.linger_s))
                failpoint("lead:before-release")
                await self._election.release(held, stay_away_s=None if left.asked else 0.0)
            else:
                await scope.close()
                await self._election.lost(held)
        if left.stale:
            try:
                await self._refit(opened, left.stale)
            except Unavailable as unavailable:
                log.warning("the generation pointer cannot be read: %s", unavailable)
                self._node.sealing.seal(left.stale, reopen=True)
        error = _first(lost)
        if isinstance(error, HALTING):
            raise error
        if error is not None:
            log.error("leadership lost: %s", error)

    async def _active(self, opened: Opened, scope: ActiveScope, tasks: asyncio.TaskGroup) -> _Left:
        """From the won lock to the moment when this node is asked, or has reason, to give it back."""
        if reason := await self._node.sealing.stale_reason(opened):
            return _Left(stale=reason)
        if self._node.sealing.opened is not opened:
            return _Left()  # sealed while it was being elected
        started = time.monotonic()
        try:
            role = await scope.start(tasks)
        except BaseException:
            METRICS.sample("core.leadership_setup_failed", (time.monotonic() - started) * 1000)
            raise
        failpoint("lead:before-serving")
        self._node.take_role(role)
        self._node.rights.accepted()
        took_s = time.monotonic() - started
        METRICS.sample("core.post_unseal", took_s * 1000)
        log.info("active operation, %.2f s after the lock", took_s)
        try:
            performance, disaster = scope.modes()
            await self._registration.update(active=True, performance_mode=performance, dr_mode=disaster)
            return await self._until_asked_to_leave(opened, scope)
        finally:
            with METRICS.timer("core.pre_seal"):
                await self._wind_down(role)
                await scope.stop()
            METRICS.sample("core.leadership_lost", (time.monotonic() - started) * 1000)

    async def _until_asked_to_leave(self, opened: Opened, scope: ActiveScope) -> _Left:
        """A step-down by the operator, a seal, or a change of generation."""
        asked = asyncio.create_task(self._node.step_down_asked.wait())
        left = asyncio.create_task(self._node.sealing.wait_left(opened))
        again = asyncio.create_task(scope.restart_asked.wait())
        try:
            await asyncio.wait([asked, left, again], return_when=asyncio.FIRST_COMPLETED)
            return _Left(asked=asked.done())
        finally:
            await _end(asked, left, again)

    async def _wind_down(self, role: ActiveRole) -> None:
        """Clients are sent elsewhere first, then what runs may finish, and only then is the lock given back."""
        await self._registration.leaving()
        await role.drain(self._options.drain_s)
        self._node.take_role(None)


def _won(campaign: asyncio.Task[Held]) -> bool:
    return campaign.done() and not campaign.cancelled() and campaign.exception() is None


def _first(error: BaseException | None) -> BaseException | None:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


async def _end(*tasks: asyncio.Task[object]) -> None:
    """Cancel and wait; a failure on the way out is logged, since the reason for leaving is already known."""
    for task in tasks:
        task.cancel()
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(result, BackendError):
            log.debug("while leaving the role: %s", result)
