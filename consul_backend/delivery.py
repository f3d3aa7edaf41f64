"""One transaction's fate: sent until it is certain whether its record was written.

A lost answer is followed by the identical transaction; chain and ``cas 0`` let at most one land. If the record exists,
its bytes decide. Where the identical one cannot be sent any more, because the store by now refuses its size, a *filler*
(a record without entries) is sent in its place: both want the same place in the log, so when the filler is
acknowledged, the first one can never land. Only then may its contents be sent again, smaller.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from consul_backend.batching import Packing
from consul_backend.clock import Clock
from consul_backend.commits import CommitCounts
from consul_backend.errors import (
    BackendError,
    Conflict,
    FenceLost,
    OutcomeUnknown,
    PermissionDenied,
    StoreWentBack,
    TooLarge,
    Unavailable,
)
from consul_backend.failpoint import failpoint
from consul_backend.physical import PhysicalStore
from consul_backend.read_lease import ReadLease
from consul_backend.txn import Op
from consul_backend.wal import Record

FENCE_OP = 0
CHAIN_OP = 1
_RESEND_PAUSE_S = 0.01
_RESEND_PAUSE_MAX_S = 0.5
_FENCED = "the store refused a commit: this node's session no longer holds the lock"


@dataclass(slots=True, eq=False)
class Sent:
    """One transaction from its building until its effects are worked off. ``unknown``: an attempt's answer is lost."""

    packing: Packing
    record: Record
    raw: bytes
    key: str
    ops: list[Op]
    unknown: bool = False
    settled: asyncio.Event = field(default_factory=asyncio.Event)


class Superseded(TooLarge):
    """The transaction was never applied and cannot be any more: ``filler`` has its place in the log."""

    def __init__(self, refusal: TooLarge, filler: Sent, modify_index: int) -> None:
        super().__init__(str(refusal))
        self.filler = filler
        self.modify_index = modify_index


class Delivery:
    """Of one tenure's commits."""

    def __init__(
        self,
        physical: PhysicalStore,
        *,
        clock: Clock,
        lease: ReadLease,
        resolve_timeout_s: float,
        counts: CommitCounts,
        filler: Callable[[], Sent],
    ) -> None:
        self._physical = physical
        self._clock = clock
        self._lease = lease
        self._resolve_timeout_s = resolve_timeout_s
        self._counts = counts
        self._filler = filler

    async def deliver(self, sent: Sent) -> int:
        """The ModifyIndex of the record, once it is certain that it was written. Raises FenceLost, StoreWentBack,
        OutcomeUnknown; or, when it certainly was not, Unavailable, PermissionDenied, TooLarge, Superseded, Conflict."""
        try:
            return await self._deliver(sent)
        except TooLarge as refusal:
            if not sent.unknown:
                raise
            return await self._supersede(sent, refusal)

    async def _deliver(self, sent: Sent) -> int:
        deadline = self._clock.monotonic() + self._resolve_timeout_s
        pause_s = _RESEND_PAUSE_S
        while True:
            failpoint("commit:before-send")
            sent_at = self._lease.now()
            try:
                result = await self._physical.txn(sent.ops)
            except Conflict as refusal:
                return await self._judge(sent, refusal)
            except PermissionDenied:
                if not sent.unknown:
                    raise
            except OutcomeUnknown:
                sent.unknown = True
            except Unavailable:
                pass
            else:
                failpoint("commit:after-reply")
                self._lease.proved(sent_at)
                return result.modify_index
            if self._clock.monotonic() + pause_s >= deadline:
                break
            self._counts.resent += 1
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _RESEND_PAUSE_MAX_S)
        if not sent.unknown:
            raise Unavailable("the store could not be reached: nothing was written")
        found = await self._find_own(sent)
        if found is None:
            # Not there *yet*: a request that was given up on may still land.
            raise OutcomeUnknown(f"record {sent.record.index} may have been written: the store did not answer in time")
        return found

    async def _judge(self, sent: Sent, refusal: Conflict) -> int:
        failed = {failure.op_index for failure in refusal.failures}
        fence = FENCE_OP in failed
        if fence:
            self._lease.lost()
        elif failed and not sent.unknown and not failed & {CHAIN_OP, len(sent.ops) - 1}:
            raise refusal
        if fence and not sent.unknown:
            raise FenceLost(_FENCED)
        found = await self._find_own(sent)
        if found is not None:
            return found
        if fence and CHAIN_OP in failed:
            # The record before it is gone too: put back with the whole store, or collected. Ours may have stood there.
            raise OutcomeUnknown(f"record {sent.record.index} may have been written: the one before it is gone since")
        if fence:
            raise FenceLost(_FENCED)
        raise StoreWentBack(
            f"the store refused record {sent.record.index} although this node holds the lock: the record before it was"
            " changed, or another one is there. The store was restored or changed underneath"
        )

    async def _supersede(self, sent: Sent, refusal: TooLarge) -> int:
        """The ModifyIndex of ``sent`` if it had landed after all; else Superseded, or what is still unknown."""
        self._counts.superseded += 1
        filler = self._filler()
        try:
            index = await self._deliver(filler)
        except (StoreWentBack, FenceLost):
            # Its place is taken, or the tenure is over: either way nothing more can land, and the log decides.
            found = await self._find_own(sent)
            if found is None:
                raise
            return found
        except (Unavailable, PermissionDenied, TooLarge, Conflict) as error:
            raise OutcomeUnknown(f"record {sent.record.index} may have been written: {error}") from error
        raise Superseded(refusal, filler, index) from refusal

    async def _find_own(self, sent: Sent) -> int | None:
        """The ModifyIndex of our record if it is stored. Raises OutcomeUnknown when that cannot be read."""
        try:
            async with asyncio.timeout(self._resolve_timeout_s):  # a read may wait longer than callers should
                item = await self._physical.get(sent.key, consistent=True)
        except (BackendError, TimeoutError) as error:
            reason = str(error) or "no answer in time"
            raise OutcomeUnknown(f"record {sent.record.index} may have been written: {reason}") from error
        return item.modify_index if item is not None and item.value == sent.raw else None
