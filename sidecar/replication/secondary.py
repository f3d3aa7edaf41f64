"""A secondary at work, in either mode: dials the primary, drives the state machine, forwards requests upward.

One task drives :mod:`sidecar.replication.states`; the machine says what is done and this module does it. Addresses are
tried in order (those of the last heartbeat first, the one of the activation token last); between rounds it backs off
with jitter, so that many secondaries do not come back in one instant. Reads stay gated until there is a position.
Without a primary (demoted, or told to forget it) it rests.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import replace

from consul_backend.errors import NotApplied, Overloaded
from consul_backend.errors import Unavailable as StoreUnavailable
from plugin_api.errors import InvalidRequest, PluginError, Unavailable
from sidecar.replication import protocol
from sidecar.replication.activation import secondary_identity
from sidecar.replication.applier import Applier, ApplierOptions
from sidecar.replication.brake import Shrink
from sidecar.replication.catch_up import CatchUp, Counted
from sidecar.replication.certifying import CERTIFICATE_BYTES_MAX, CERTIFICATE_PATH
from sidecar.replication.channel import Channel, ChannelClosed, WebSocketChannel
from sidecar.replication.committer import stored_position
from sidecar.replication.filling import SyncProgress
from sidecar.replication.hello import Identity, Source
from sidecar.replication.intake import Budget
from sidecar.replication.modes import PERFORMANCE, Mode
from sidecar.replication.primary import ALIVE_PATH, STREAM_PATH
from sidecar.replication.protocol import DiffReply, DiffRequest, FetchRequest, is_none
from sidecar.replication.renewal import Keep, Renewal, reason_lost
from sidecar.replication.roles import SecondaryRole
from sidecar.replication.selection import Partitions
from sidecar.replication.shipper import Advertised
from sidecar.replication.states import Action, Event, Machine, Phase, step
from sidecar.replication.status import SyncFacts
from sidecar.replication.sync import Syncer
from sidecar.replication.sync_calls import ask_diff, ask_entries
from sidecar.replication.upstream import answer_of, upward_request
from sidecar.replication.wiring import AuthLike, ForwardAnswer, Wiring
from sidecar.replication.withheld import drop_withheld
from sidecar.transport.forwarding import (
    ForwardNotSent,
    ForwardOutcomeUnknown,
    ForwardRequest,
    ForwardResponse,
    RequestLike,
    send_forward,
)
from sidecar.transport.peer import (
    PeerAnswer,
    PeerClient,
    PeerIdentity,
    PeerOutcomeUnknown,
    PeerRefused,
    PeerUnreachable,
    parse_address,
)
from sidecar.transport.trail import LoopRefused

logger = logging.getLogger(__name__)

NOT_SYNCED = "replication: this secondary has not received its primary's data yet"
NOT_BRAKED = "the mass-delete brake has stopped nothing here; see sys/replication/status"
NO_PRIMARY = "this secondary has no primary: give it one with update-primary"
CLIENTS_MAX = 16

_RANDOM = secrets.SystemRandom()


class SecondaryService:
    """One tenure as secondary. ``learned`` stores the primary's addresses and returns the role with them, None
    when this cluster is no secondary any more. ``adopt`` is asked before anything of a primary is applied: it keeps
    what would be lost, stores the primary's history and what travels, and returns the role with it. ``synced`` stores
    that a selection is here completely, ``renewed`` a certificate."""

    def __init__(
        self,
        mode: Mode,
        wiring: Wiring,
        role: SecondaryRole,
        *,
        learned: Callable[[tuple[str, ...]], Awaitable[SecondaryRole | None]],
        adopt: Callable[[Source, Partitions], Awaitable[SecondaryRole | None]],
        synced: Callable[[Partitions], Awaitable[SecondaryRole | None]],
        renewed: Keep,
    ) -> None:
        self._mode = mode
        self._adopt = adopt
        self._synced = synced
        self._store = wiring.store
        self._node = wiring.node
        self._callbacks = wiring.callbacks
        self._clock = wiring.clock
        self._options = wiring.options
        self._role = role
        self._learned = learned
        self._identity = secondary_identity(mode, role) if role.attached else None
        self._renewal = Renewal(wiring.clock, role=lambda: self._role, post=self._ask_certificate, keep=renewed)
        self._channel: Channel | None = None
        self._clients: dict[str, PeerClient] = {}
        self._failures = 0
        self._preferred = ""
        self._catch_up: CatchUp | None = None
        self._in_step = asyncio.Event()
        self._resumed = asyncio.Event()
        self._accepted_deletions = 0
        self._syncer: Syncer | None = None
        self.machine = Machine()
        self.connected_to = ""
        self.started_ms = wiring.clock.time_ms()
        self.shrink: Shrink | None = None
        self.last_sync: SyncFacts | None = None
        self.applier = self._make_applier()

    async def run(self) -> None:
        """Follow the primary until cancelled. Raises what ends the tenure: errors of this cluster's own store."""
        self._callbacks.set_gate(NOT_SYNCED if is_none(self.applier.position) else None)
        await self._store.rooted()
        if not self._role.attached:
            self.machine = replace(self.machine, reason=NO_PRIMARY)
            await asyncio.get_running_loop().create_future()
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._keep_addresses(), name="keep addresses")
                tasks.create_task(self._keep_certificate(), name="keep certificate")
                action = self._step(Event.START)
                while True:
                    action = await self._do(action)
        finally:
            self.connected_to = ""
            for client in self._clients.values():
                await client.close()
            self._clients.clear()

    @property
    def state(self) -> str:
        """The contract's word for the status: a secondary that cannot connect is idle, and so is a braked one."""
        phase = self.machine.phase
        idle = phase is Phase.BRAKED or (phase is Phase.CONNECTING and self._failures)
        return "idle" if idle else phase.value

    @property
    def connection_state(self) -> str:
        """As gRPC names them: ready, connecting, transient_failure, or idle when nothing is tried."""
        if self.machine.phase in (Phase.IDLE, Phase.BRAKED):
            return "idle"
        if self.connected_to or self.machine.phase in (Phase.MERKLE_DIFF, Phase.MERKLE_SYNC):
            return "ready"
        return "transient_failure" if self._failures else "connecting"

    async def forward(self, request: RequestLike, auth: AuthLike) -> ForwardAnswer:
        """Run ``request`` on the primary and hold the answer until its writes are applied here, bounded.

        Raises Unavailable when it was certainly not handled, PluginError when that is not known.
        """
        try:
            message = upward_request(request, auth, self._node.local_cluster_id)
        except LoopRefused as refusal:
            raise Unavailable(str(refusal)) from refusal
        response = await self._send(message)
        late = False
        if response.position is not None:
            at = response.position
            late = not await self.applier.wait_applied(at.index, self._options.wal_wait_s, generation=at.generation)
        return answer_of(response, late=late)

    @property
    def sync_progress(self) -> SyncProgress | None:
        """How far the running merkle sync has come; None while there is none."""
        return self._syncer.progress() if self._syncer is not None else None

    def accept_deletions(self, deletions: int) -> None:
        """An operator agrees that a comparison with the primary deletes so many entries; what the brake stopped begins
        anew. It counts until a sync is done, or this tenure. Raises InvalidRequest."""
        shrink = self.shrink
        if self.machine.phase is not Phase.BRAKED or shrink is None:
            raise InvalidRequest(NOT_BRAKED)
        if deletions < shrink.deletions:
            raise InvalidRequest(f'"deletions" is less than the {shrink.deletions} that the comparison found')
        logger.warning("replication: an operator accepted %d deletions, %d were found", deletions, shrink.deletions)
        self._accepted_deletions, self.shrink = deletions, None
        self._resumed.set()

    async def primary_lives(self, timeout_s: float) -> str:
        """The address at which the primary was reached just now; empty when no known address answers in time."""
        if self.connected_to and self.applier.upstream.connected:
            return self.connected_to
        asked = {address: asyncio.create_task(self._is_alive(address, timeout_s)) for address in self._addresses()}
        if asked:
            await asyncio.wait(asked.values())
        return next((address for address, task in asked.items() if task.result()), "")

    async def _is_alive(self, address: str, timeout_s: float) -> bool:
        """Whether the primary of this set is there. Whoever completes the handshake holds a certificate of the set: it
        lives, whatever becomes of the request."""
        client = PeerClient(self._known_identity(), address, connect_timeout_s=timeout_s)
        try:
            await client.post(ALIVE_PATH, b"", timeout_s=2 * timeout_s)
        except PeerUnreachable:
            return False
        except PeerOutcomeUnknown:
            return True
        finally:
            await client.close()
        return True

    async def _send(self, message: ForwardRequest) -> ForwardResponse:
        problem = "no cluster address of it is known"
        for address in self._addresses():
            try:
                return await send_forward(self._client(address), message, timeout_s=self._options.forward_timeout_s)
            except ForwardNotSent as error:
                problem = str(error)
                if error.status:  # it was reached and refused: another node of it would say the same
                    break
            except ForwardOutcomeUnknown as error:
                raise PluginError(
                    "the request was sent to the replication primary and its answer was lost: "
                    f"it may have been carried out ({error})",
                ) from error
        raise Unavailable(f"the request was not carried out: the replication primary could not take it: {problem}")

    async def _do(self, action: Action) -> Action:
        if action is Action.REST:
            await self._resumed.wait()
            self._resumed.clear()
            return self._step(Event.START)
        if action is Action.BACK_OFF:
            await asyncio.sleep(self._pause_s())
            return Action.STREAM
        if action is Action.STREAM:
            return await self._stream()
        return await self._sync()

    async def _stream(self) -> Action:
        problems: list[str] = []
        for address in self._addresses():
            try:
                socket = await self._client(address).websocket(
                    STREAM_PATH,
                    message_bytes_max=protocol.FRAME_BYTES_MAX,
                )
            except (PeerUnreachable, PeerRefused) as error:
                problems.append(str(error))
                continue
            return await self._follow(WebSocketChannel(socket), address)
        return self._step(Event.LOST, reason_lost(problems, self._role.certificate_pem, self._clock.time_ms()))

    async def _follow(self, channel: WebSocketChannel, address: str) -> Action:
        self.connected_to = self._preferred = address
        counted = self._channel = Counted(channel)
        if self.machine.phase is Phase.CONNECTING:
            position = self.applier.position
            self._catch_up = CatchUp(counted, self._clock.monotonic(), position.index if position else 0)
        try:
            outcome = await self.applier.run(counted)
        finally:
            self.connected_to = ""
            self._catch_up = self._channel = None
            await channel.close("the secondary ended the stream")
        action = self._step(outcome.end.value, outcome.reason)
        if outcome.alarm:
            self.machine = replace(self.machine, alarm=True)
        return action

    async def _sync(self) -> Action:
        selection = self._role.selection
        syncer = Syncer(
            self._mode,
            self._store,
            self._ask_diff,
            self._ask_entries,
            on_applied=self._callbacks.on_applied,
            gate=self._gate,
            on_event=self._heard,
            clock=self._clock,
            limits=self._options.limits,
            identity=self.applier.identity,
            staging=self._options.staging,
            allowance=self._options.allowance,
            accepted_deletions=self._accepted_deletions,
            selection=selection,
        )
        self._syncer = syncer
        try:
            result = await syncer.run()
        finally:
            self._syncer = None
            self.applier.look()
        self.shrink = result.shrink
        if result.shrink is not None and is_none(result.position):
            self._callbacks.set_gate(f"replication: {result.reason}")
        if result.event in (Event.EQUAL, Event.SYNCED):
            self._accepted_deletions = 0
            if self._mode is PERFORMANCE:
                await self._filled(selection)
            self.last_sync = SyncFacts("merkle", result.round_trips, result.bytes, result.keys, result.seconds)
            logger.info(
                "replication: merkle sync done: %d keys, %d bytes, %d round trips, %.3f s",
                result.keys,
                result.bytes,
                result.round_trips,
                result.seconds,
            )
        return self._step(result.event, result.reason)

    async def _filled(self, selection: Partitions) -> None:
        """A sync has brought all of a selection. Not stored, it is compared once more after the next hello."""
        before = self._role
        await drop_withheld(self._store, selection, Budget.of(self._options.limits))
        try:
            self._role = await self._synced(selection) or self._role
        except (Overloaded, NotApplied, StoreUnavailable, Unavailable) as error:
            logger.info("replication: that the partitions are held was not stored, next time: %s", error)
            return
        self.applier.identity = _identity(self._role)
        if self._role.held != before.held:
            with contextlib.suppress(Unavailable):  # the next hello tries again
                await self._callbacks.reselected()

    async def _ask_diff(self, request: DiffRequest) -> DiffReply:
        return await ask_diff(self._client(self._address()), request)

    def _ask_entries(self, request: FetchRequest) -> AsyncIterator[bytes]:
        return ask_entries(self._client(self._address()), request, self._options.fetch_idle_timeout_s)

    def _step(self, event: Event, reason: str = "") -> Action:
        before = self.machine.phase
        self.machine, action = step(self.machine, event, reason)
        if event is Event.LOST:
            self._failures += 1
        elif event is not Event.START:
            self._failures = 0
        if self.machine.phase is not before:
            log = logger.error if self.machine.alarm else logger.info
            log("replication: %s -> %s %s", before.value, self.machine.phase.value, reason)
        return action

    def _heard(self, event: Event) -> None:
        """What applier and syncer report while they run: the machine follows, the driver goes on."""
        self._step(event)
        if event is not Event.IN_STEP:
            return
        self._in_step.set()
        if self._catch_up is not None and self.applier.position is not None:
            self.last_sync = self._catch_up.done(self.applier.position.index, self._clock.monotonic()) or self.last_sync
            self._catch_up = None

    async def _on_applied(self, keys: Sequence[str]) -> None:
        if self._catch_up is not None:
            self._catch_up.keys += len(keys)
        await self._callbacks.on_applied(keys)

    def _gate(self, progress: SyncProgress | None) -> None:
        if progress is None:
            self._callbacks.set_gate(None)
            return
        self._callbacks.set_gate(f"replication: merkle sync in progress, {progress.done} of {progress.total} entries")

    async def _keep_addresses(self) -> None:
        """Store where the primary's nodes are, so that a restart finds it wherever it went."""
        while True:
            await self._in_step.wait()
            self._in_step.clear()
            addresses = self.applier.upstream.advertised.cluster_addrs
            try:
                if addresses:
                    self._role = await self._learned(addresses) or self._role
            except (Overloaded, NotApplied, StoreUnavailable) as error:
                logger.info("replication: the primary's addresses were not stored, next time: %s", error)
            if len(self._clients) > CLIENTS_MAX:
                for address in set(self._clients) - set(self._addresses()):
                    await self._clients.pop(address).close()

    async def _keep_certificate(self) -> None:
        """Renew in time. What is under way on old connections may end; the stream begins anew, with the new one."""
        while True:
            await asyncio.sleep(self._options.certificate_check_s)
            role = await self._renewal.once() if self.connected_to else None
            if role is None:
                continue
            same, self._role = role.credentials == self._known_identity().credentials, role
            self._identity = secondary_identity(self._mode, role)
            before, self._clients = self._clients, {}
            if self._channel is not None and not same:
                await self._channel.close("the certificate was renewed")
            try:
                await asyncio.sleep(self._options.forward_timeout_s)
            finally:
                for client in before.values():
                    await client.close()

    async def _ask_certificate(self, body: bytes) -> PeerAnswer:
        return await self._client(self._address()).post(
            CERTIFICATE_PATH,
            body,
            timeout_s=self._options.forward_timeout_s,
            answer_bytes_max=CERTIFICATE_BYTES_MAX,
        )

    def _address(self) -> str:
        return self.connected_to or next(iter(self._addresses()), "")

    def _addresses(self) -> tuple[str, ...]:
        """Where to try, in order: where it worked last, what the primary advertises, what is stored."""
        advertised = self.applier.upstream.advertised.cluster_addrs
        order = dict.fromkeys([self._preferred, *advertised, *self._role.dial_order])
        return tuple(address for address in order if _usable(address))

    def _known_identity(self) -> PeerIdentity:
        if self._identity is None:
            raise Unavailable(NO_PRIMARY)
        return self._identity

    def _client(self, address: str) -> PeerClient:
        client = self._clients.get(address)
        if client is None:
            client = PeerClient(self._known_identity(), address, connect_timeout_s=self._options.connect_timeout_s)
            self._clients[address] = client
        return client

    def _pause_s(self) -> float:
        """Doubles with each failure, up to the maximum; half of it is chance."""
        doublings = max(0, min(self._failures - 1, 16))
        longest_s: float = min(self._options.reconnect_max_s, self._options.reconnect_min_s * 2**doublings)
        return longest_s * (0.5 + 0.5 * _RANDOM.random())

    def _make_applier(self) -> Applier:
        role, options = self._role, self._options
        return Applier(
            self._mode,
            self._store,
            stored_position(self._store, self._mode),
            self._on_applied,
            self._clock,
            ApplierOptions(beat_s=options.beat_s, silent_beats_max=options.silent_beats_max, limits=options.limits),
            identity=_identity(role),
            advertise=lambda: Advertised(self._node.api_addr, tuple(self._node.cluster_addresses())),
            on_event=self._heard,
            on_source=self._met,
        )

    async def _met(self, source: Source, selection: Partitions, on_log: bool) -> Identity:
        """A primary answered the hello. What a filter withholds is hidden now, and dropped now if the primary proved to
        be the one we had it from; else when a comparison is done. Raises ChannelClosed: come again."""
        try:
            role = await self._adopt(source, selection)
        except (Overloaded, NotApplied, StoreUnavailable) as error:
            raise ChannelClosed(f"the primary's replication epoch could not be stored here: {error}") from error
        if role is None:
            raise ChannelClosed("this cluster's role changed meanwhile")
        self._role = role
        if self._mode is PERFORMANCE:
            try:
                await self._callbacks.reselected()
            except Unavailable as error:
                raise ChannelClosed(str(error)) from error
            if on_log:
                await drop_withheld(self._store, selection, Budget.of(self._options.limits))
        return _identity(role)


def _identity(role: SecondaryRole) -> Identity:
    """How it introduces itself: an epoch that an operator accepted counts before that of its data."""
    epoch = role.accepts or role.epoch
    return Identity(role.secondary_id, role.store_id, role.set_id, epoch.number, epoch.id, role.held)


def _usable(address: str) -> bool:
    try:
        parse_address(address)
    except ValueError:
        return False
    return True
