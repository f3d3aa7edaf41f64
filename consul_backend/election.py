"""Election: one node at a time holds the lock key with its session, and numbers its tenure in the epoch key.

The rules (architecture 3.8):

* Lock and epoch change in one transaction, so an epoch number belongs to exactly one session.
* A session serves one tenure. Whatever ends the tenure, the session is destroyed: nothing sent under it can land later.
* The lock key is never deleted: deleting it would skip the lock-delay, which is the read lease.
* The session lives while this process's event loop passes the beat check; a killed *or stuck* process loses it. It is
  also renewed, for when the agent that judges the beat is lost together with the process.
* A proof for the read lease is a consistent read that finds our session on the lock, not merely a live session: an
  operator may have taken the lock away from a session that lives on.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from typing import NoReturn

import msgspec

from consul_backend.clock import Clock
from consul_backend.complaints import Complaint
from consul_backend.errors import (
    BackendError,
    Conflict,
    Corrupt,
    FenceLost,
    OutcomeUnknown,
    PermissionDenied,
    Unavailable,
)
from consul_backend.failpoint import failpoint
from consul_backend.lease import Action, Event, Phase, step
from consul_backend.physical import EPOCH_KEY, LOCK_KEY, Item, PhysicalStore
from consul_backend.read_lease import ReadLease
from consul_backend.tenure import Tenure
from consul_backend.txn import Cas, CheckSession, Lock, Unlock

log = logging.getLogger("core.election")


@dataclass(frozen=True, slots=True)
class ElectionOptions:
    """Times in seconds. ``lock_delay_s`` is also the read lease; a takeover after a crash needs about ``beat_ttl_s``
    plus it. A leader that could not confirm its lock for ``unconfirmed_max_s`` steps down: by then another may lead."""

    beat_ttl_s: float = 3.0
    beat_interval_s: float = 1.0
    renew_interval_s: float = 3.0
    lock_delay_s: float = 0.5
    retry_s: float = 0.1
    watch_wait_s: float = 10.0
    confirm_timeout_s: float = 3.0
    unconfirmed_max_s: float = 10.0
    step_down_grace_s: float = 10.0


class Epoch(msgspec.Struct, frozen=True):
    """The epoch key's value: who leads, and as the how-manieth."""

    number: int
    node_id: str
    session: str


class LeaderInfo(msgspec.Struct, frozen=True):
    """The lock key's value: how to reach the active node."""

    node_id: str
    api_addr: str
    cluster_addr: str
    sni: str = ""


@dataclass(frozen=True, slots=True)
class Held:
    """A tenure that this node won, and the lease under which it may serve reads."""

    tenure: Tenure
    lease: ReadLease


class Election:
    """One node's side of the election. ``advertise`` gives the value of the lock key at the moment of taking it."""

    def __init__(
        self,
        physical: PhysicalStore,
        *,
        node_id: str,
        advertise: Callable[[], LeaderInfo],
        clock: Clock,
        options: ElectionOptions | None = None,
    ) -> None:
        self._physical = physical
        self._node_id = node_id
        self._advertise = advertise
        self._clock = clock
        self._options = options or ElectionOptions()
        self._phase = Phase.STANDBY
        self._session = ""
        self._value = b""
        self._beat_failed = asyncio.Event()
        self._stay_away_until = float("-inf")
        self._undead: set[str] = set()

    @property
    def phase(self) -> Phase:
        """Where this node stands."""
        return self._phase

    async def campaign(self) -> Held:
        """Wait until this node holds the lock; cancel to give up. Store errors are logged and waited out, except
        PermissionDenied and SentinelMissing, which only an operator can mend."""
        await asyncio.sleep(max(0.0, self._stay_away_until - self._clock.monotonic()))
        async with self._beating():
            try:
                return await self._campaign()
            except BaseException:
                if self._phase is not Phase.STANDBY:
                    self._move(Event.SESSION_GONE)
                await self._abandon()
                raise

    async def _campaign(self) -> Held:
        index = 0
        complaint = Complaint()
        while True:
            try:
                await self._bury()
                item, index = await self._watch_lock(index)
                if item is not None and item.session and item.session == self._session:
                    log.warning("an attempt at the lock landed after it was given up: its session is ended")
                    await self._abandon()
                elif item is not None and item.session:
                    self._move(Event.LOCK_TAKEN)
                    continue
                held = await self._attempt()
            except Unavailable as error:
                if complaint.due(error):
                    log.warning("the store cannot be reached, waiting: %s", error)
                if self._phase is not Phase.STANDBY:
                    self._move(Event.SESSION_GONE)
                await self._abandon()
                index = 0
                await asyncio.sleep(max(self._options.retry_s, 0.5))
                continue
            if held is not None:
                return held
            index = 0
            await asyncio.sleep(self._options.retry_s)

    async def _watch_lock(self, index: int) -> tuple[Item | None, int]:
        if index == 0:
            item = await self._physical.get(LOCK_KEY)
            return item, item.modify_index if item else 0
        return await self._physical.watch(LOCK_KEY, index, self._options.watch_wait_s)

    async def _attempt(self) -> Held | None:
        """One try for the lock; None when another node has it or its delay runs."""
        if not self._session:
            self._session = await self._physical.create_session(
                f"outrider {self._node_id}",
                beat_ttl_s=self._options.beat_ttl_s,
                lock_delay_s=self._options.lock_delay_s,
            )
        found = await self._physical.get(EPOCH_KEY, consistent=True)
        number = decode_epoch(found).number + 1 if found else 1
        mine = Epoch(number=number, node_id=self._node_id, session=self._session)
        self._value = msgspec.json.encode(self._advertise())
        lock = Lock(LOCK_KEY, self._value, self._session)
        epoch = Cas(EPOCH_KEY, msgspec.json.encode(mine), found.modify_index if found else 0)
        self._move(Event.LOCK_FREE)
        sent_at = self._clock.monotonic()
        failpoint("election:before-acquire")
        try:
            result = await self._physical.txn([lock, epoch])
            failpoint("election:after-acquire")
        except Conflict as refusal:
            self._move(Event.REFUSED)
            gone = any(
                "session" in failure.what.lower() and "invalid" in failure.what.lower() for failure in refusal.failures
            )
            return await self._resolve(mine, sent_at, session_gone=gone)
        except OutcomeUnknown:
            self._move(Event.UNKNOWN)
            return await self._resolve(mine, sent_at, session_gone=False)
        self._move(Event.ACQUIRED)
        return self._held(number, result.modify_index, sent_at)

    async def _resolve(self, mine: Epoch, sent_at: float, *, session_gone: bool) -> Held | None:
        lock = await self._physical.get(LOCK_KEY, consistent=True)
        epoch = await self._physical.get(EPOCH_KEY, consistent=True)
        lock_ours = lock is not None and lock.session == mine.session
        epoch_ours = epoch is not None and decode_epoch(epoch) == mine
        if lock_ours and epoch_ours and epoch is not None:
            self._move(Event.FOUND_OURS)
            return self._held(mine.number, epoch.modify_index, sent_at)
        if session_gone:
            action = self._move(Event.SESSION_GONE)
        else:
            action = self._move(Event.FOUND_LOCK_ONLY if lock_ours else Event.FOUND_FOREIGN)
        if action is Action.ABANDON_SESSION:
            await self._abandon()
        return None

    def _held(self, number: int, epoch_index: int, sent_at: float) -> Held:
        lease = ReadLease(self._clock, self._options.lock_delay_s, self._holds_lock)
        lease.proved(sent_at)
        log.info("acquired lock, enabling active operation: epoch=%d", number)
        return Held(Tenure(number, self._node_id, self._session, epoch_index), lease)

    async def _holds_lock(self) -> bool:
        item = await self._physical.get(LOCK_KEY, consistent=True)
        return item is not None and bool(self._session) and item.session == self._session

    async def keep(self, held: Held) -> NoReturn:
        """Beat and watch until the lock is lost; raises FenceLost. Cancel to step down, then call :meth:`release`."""
        async with self._beating():
            while True:
                try:
                    await self._watch_own_lock(held)
                except (Unavailable, TimeoutError) as error:
                    if held.lease.unproved_s() >= self._options.unconfirmed_max_s:
                        held.lease.lost()
                        raise FenceLost("the store could not confirm the lock for too long: stepping down") from error
                    # The lease and the fence already stop reads and writes; leading again needs no new election if the
                    # session survives.
                    log.warning("cannot confirm the lock: %s", str(error) or "no answer in time")
                    await asyncio.sleep(self._options.retry_s)

    async def _watch_own_lock(self, held: Held) -> None:
        while True:
            sent_at = self._clock.monotonic()
            async with asyncio.timeout(self._options.confirm_timeout_s):
                item = await self._physical.get(LOCK_KEY, consistent=True)
            if item is None or item.session != held.tenure.session:
                held.lease.lost()
                raise FenceLost("another session holds the lock, or none: this node is no longer active")
            held.lease.proved(sent_at)
            if item.value != self._value:
                await self._name_again()
                continue
            await self._changed_or_doubtful(item.modify_index)

    async def _name_again(self) -> None:
        """Somebody wrote over the lock's value, which leaves the lock ours but tells the standbys of no leader."""
        log.warning("the lock's value was overwritten by something else than this program: writing it again")
        with contextlib.suppress(Conflict, OutcomeUnknown):  # the lock is read again, and says more than the refusal
            await self._physical.txn([Lock(LOCK_KEY, self._value, self._session)])
        await asyncio.sleep(self._options.retry_s)

    async def _changed_or_doubtful(self, index: int) -> None:
        """Wait until the lock may have changed, or a beat failed: then the store is asked at once, not at the end of a
        blocking query that hides a lost right as silence."""
        self._beat_failed.clear()
        watch = asyncio.create_task(self._physical.watch(LOCK_KEY, index, self._options.watch_wait_s))
        doubt = asyncio.create_task(self._beat_failed.wait())
        try:
            await asyncio.wait([watch, doubt], return_when=asyncio.FIRST_COMPLETED)
            if watch.done():
                watch.result()
        finally:
            for task in (watch, doubt):
                task.cancel()
            await asyncio.gather(watch, doubt, return_exceptions=True)

    @contextlib.asynccontextmanager
    async def _beating(self) -> AsyncIterator[None]:
        tasks = [
            asyncio.create_task(self._beat_forever(), name="beat"),
            asyncio.create_task(self._renew_forever(), name="renew the session"),
        ]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            for task in tasks:
                with contextlib.suppress(asyncio.CancelledError):
                    await task

    async def _beat_forever(self) -> NoReturn:
        complaint = Complaint()
        while True:
            if self._session:
                try:
                    await self._physical.beat()
                    complaint.over()
                except (Unavailable, PermissionDenied) as error:
                    if complaint.due(error):
                        log.warning("the beat did not reach the store: %s", error)
                    self._beat_failed.set()
            await asyncio.sleep(self._options.beat_interval_s)

    async def _renew_forever(self) -> NoReturn:
        """Apart from the beat, which must not wait for a store without a leader."""
        complaint = Complaint()
        while True:
            await asyncio.sleep(self._options.renew_interval_s)
            if self._session:
                try:
                    if not await self._physical.renew_session(self._session):
                        self._beat_failed.set()
                    complaint.over()
                except (Unavailable, PermissionDenied) as error:
                    if complaint.due(error):
                        log.warning("the session could not be renewed: %s", error)
                    self._beat_failed.set()

    async def release(self, held: Held, *, stay_away_s: float | None = None) -> None:
        """End the tenure on purpose: the next node need not wait. This node then stays away for ``stay_away_s``, by
        default the grace period, so that another gets the lock."""
        held.lease.lost()
        self._move(Event.STEP_DOWN)
        value = msgspec.json.encode(LeaderInfo("", "", ""))
        try:
            await self._physical.txn([Unlock(LOCK_KEY, value, held.tenure.session)])
            failpoint("election:after-release")
            self._move(Event.RELEASED)
        except BackendError as error:
            log.warning("the lock could not be released cleanly, its session is destroyed instead: %s", error)
            self._move(Event.SESSION_GONE)
        await self._abandon()
        away_s = self._options.step_down_grace_s if stay_away_s is None else stay_away_s
        self._stay_away_until = self._clock.monotonic() + away_s

    async def lost(self, held: Held) -> None:
        """The tenure ended by force: make sure that nothing sent under its session can land any more."""
        held.lease.lost()
        self._move(Event.SESSION_GONE)
        await self._abandon()

    async def _abandon(self) -> None:
        session, self._session = self._session, ""
        if not session:
            return
        self._undead.add(session)
        for give_up in (self._bury, self._physical.stop_beat):
            try:
                await give_up()
            except BackendError as error:
                # Without beats the session ends by itself; why the tenure ended matters more than this.
                log.warning("the session could not be ended at once: %s", error)

    async def _bury(self) -> None:
        """End sessions that could not be ended before. The beat of the next one has the same check and would keep them
        alive, and with them the lock, until their own slow TTL. Raises Unavailable."""
        for session in tuple(self._undead):
            try:
                await self._physical.destroy_session(session)
            except PermissionDenied as error:
                log.warning("a session may not be ended and runs out by its TTL: %s", error)
            self._undead.discard(session)

    async def leader(self) -> LeaderInfo | None:
        """Who leads now, as a standby sees it; None while nobody does. Raises Unavailable."""
        item = await self._physical.get(LOCK_KEY)
        return decode_leader(item)

    def _move(self, event: Event) -> Action:
        self._phase, action = step(self._phase, event)
        return action


def decode_epoch(item: Item) -> Epoch:
    """The epoch key's value. Raises Corrupt when something else was written there."""
    try:
        return msgspec.json.decode(item.value, type=Epoch)
    except msgspec.DecodeError as error:
        raise Corrupt(
            f"the epoch key {EPOCH_KEY!r} does not hold what this program writes there ({error}): somebody else"
            " wrote it; once it is deleted the next tenure makes it anew from the log"
        ) from None


async def above(physical: PhysicalStore, tenure: Tenure, epoch: int) -> Tenure:
    """``tenure``, if its number is above ``epoch``, the newest record's; else the same tenure with a number that is.

    The epoch key may have been deleted or put back by hand; a record numbered below the one before it would make the
    log unreadable for good. Raises FenceLost, OutcomeUnknown, Unavailable, PermissionDenied.
    """
    if tenure.epoch > epoch:
        return tenure
    log.warning(
        "the epoch key went back to %d although the log has epoch %d: counting on from there", tenure.epoch, epoch
    )
    mine = Epoch(number=epoch + 1, node_id=tenure.node_id, session=tenure.session)
    write = Cas(EPOCH_KEY, msgspec.json.encode(mine), tenure.epoch_index)
    try:
        result = await physical.txn([CheckSession(LOCK_KEY, tenure.session), write])
    except Conflict:
        raise FenceLost("this node's tenure ended before it began") from None
    return replace(tenure, epoch=mine.number, epoch_index=result.modify_index)


def decode_leader(item: Item | None) -> LeaderInfo | None:
    """The leader named by a lock item; None when nobody holds it or it names nobody."""
    if item is None or not item.session:
        return None
    try:
        info = msgspec.json.decode(item.value, type=LeaderInfo)
    except msgspec.DecodeError:
        return None  # anyone with rights on the lock key can write it; a standby then simply knows no leader
    return info if info.node_id else None
