"""Noticing that the store was put back (a snapshot restored, keys changed) where no commit's chain check does."""

from __future__ import annotations

import asyncio
import contextlib
from typing import NoReturn, Protocol

from consul_backend.election import above
from consul_backend.errors import PermissionDenied, StoreWentBack, Unavailable
from consul_backend.group_commit import GroupCommit, Tip
from consul_backend.physical import LOCK_KEY, PhysicalStore
from consul_backend.tenure import Tenure
from consul_backend.wal import Head, Record
from consul_backend.wal_reader import RecordGone


def require_seen(tip: Tip, seen_index: int) -> None:
    """A recovered log reaches up to a record that is known to have been committed. Raises StoreWentBack."""
    if tip.record.index < seen_index:
        raise StoreWentBack(
            f"the log ends at record {tip.record.index}, but record {seen_index} was there before: the store was"
            " restored or changed underneath"
        )


async def following(physical: PhysicalStore, tenure: Tenure, tip: Tip, seen_index: int) -> Tenure:
    """``tenure`` as it may follow a recovered log: see :func:`require_seen` and
    :func:`~consul_backend.election.above`, and what they raise."""
    require_seen(tip, seen_index)
    return await above(physical, tenure, tip.record.header.epoch)


class Log(Protocol):
    """The log of one tenure (``ReplicatedStore``)."""

    @property
    def head(self) -> Head:
        """The newest record."""

    async def records(self, start: int, limit: int) -> list[Record]:
        """At most ``limit`` from ``start`` on. Raises RecordGone."""

    async def require_tenure(self) -> None:
        """Raises FenceLost unless this tenure still leads."""


async def require_record(log: Log, index: int, chain_hash: bytes) -> None:
    """The log has, or had, the record that another node of the cluster saw in it. Raises StoreWentBack; FenceLost when
    that node may have it from a successor; and what reading raises."""
    head, there = log.head, chain_hash
    if index == head.index:
        there = head.chain_hash
    elif index < head.index:
        with contextlib.suppress(RecordGone):
            there = (await log.records(index + 1, 1))[0].header.prev_hash
    if index <= head.index and there == chain_hash:
        return
    await log.require_tenure()
    raise StoreWentBack(
        f"another node of this cluster saw record {index}, which this log, that ends at {head.index}, does not have:"
        " the store was restored or changed underneath"
    )


async def watch_tip(physical: PhysicalStore, tenure: Tenure, commits: GroupCommit, interval_s: float) -> NoReturn:
    """While nothing is committed, look at the newest record now and then. Raises StoreWentBack."""
    while True:
        seen = commits.tip
        await asyncio.sleep(interval_s)
        if commits.tip is not seen:
            continue
        with contextlib.suppress(Unavailable, PermissionDenied):  # the watch of the lock deals with those
            lock, item = await physical.get_many([LOCK_KEY, seen.key], consistent=True)
            if lock is None or lock.session != tenure.session or commits.tip is not seen:
                continue  # this tenure is over, or went on meanwhile and what it left behind may be collected
            if item is None or item.modify_index != seen.modify_index:
                raise StoreWentBack(
                    f"record {seen.record.index}, the newest, is gone or is not the one this node wrote although it"
                    " holds the lock: the store was restored or changed underneath"
                )
