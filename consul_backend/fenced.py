"""Transactions without a WAL record (flush, collection, rebuild, dropping a generation) and their guards.

Such a transaction carries ``check-session`` on the lock *and* ``check-index`` on the epoch key: without a record there
is no chain check, and a session check alone is passed by an empty session on a free lock. What a tenure does beside its
log also checks a record that it has committed: a store put back to a moment of this very tenure passes the other two.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from consul_backend.errors import Conflict, FenceLost, OpFailure, OutcomeUnknown, StoreWentBack
from consul_backend.physical import EPOCH_KEY, LOCK_KEY, PhysicalStore, TxnResult
from consul_backend.tenure import Tenure
from consul_backend.txn import CheckIndex, CheckSession, Op

Newest = Callable[[], CheckIndex]
"""Checks the newest record as this tenure wrote it: as of the moment when it is called."""

GUARD_OPS = 3
"""At most."""

_ATTEMPTS = 5
_PAUSE_S = 0.1


def guards(tenure: Tenure) -> list[Op]:
    """The two that refuse whatever is not this tenure's."""
    return [CheckSession(LOCK_KEY, tenure.session), CheckIndex(EPOCH_KEY, tenure.epoch_index)]


async def fenced_txn(
    physical: PhysicalStore, tenure: Tenure, ops: Sequence[Op], newest: Newest | None = None
) -> TxnResult:
    """Apply ``ops`` if ``tenure`` still leads and the log still has the record that ``newest()`` checks. One that was
    newest when this was sent may be collected when it arrives: if the log went on meanwhile, it is sent anew.

    Raises FenceLost when the tenure has ended, StoreWentBack when only the record is gone or another; Conflict, whose
    positions count from ``ops[0]``, when another check failed; and what :meth:`PhysicalStore.txn` raises."""
    fence = guards(tenure)
    before = fence if newest is None else [*fence, newest()]
    try:
        return await physical.txn([*before, *ops])
    except Conflict as refusal:
        failed = min((failure.op_index for failure in refusal.failures), default=len(before))
        if failed < len(fence):
            raise FenceLost("the store refused a fenced transaction: this node's tenure has ended") from None
        if failed < len(before) and newest is not None and newest() != before[-1]:
            return await fenced_txn(physical, tenure, ops, newest)
        if failed < len(before):
            raise StoreWentBack(
                "the newest record is not in the log as it was written: the store was restored or changed underneath"
            ) from None
        failures = tuple(OpFailure(failure.op_index - len(before), failure.what) for failure in refusal.failures)
        raise Conflict(str(refusal), failures) from None


async def require_tenure(physical: PhysicalStore, tenure: Tenure) -> None:
    """Raises FenceLost unless ``tenure`` still leads.

    For whoever found something wrong by reads that are not one snapshot: a session serves one tenure, so one that holds
    the lock now held it all the while, and what was found is no successor's work.
    """
    lock, epoch = await physical.get_many([LOCK_KEY, EPOCH_KEY], consistent=True)
    if lock is None or lock.session != tenure.session or epoch is None or epoch.modify_index != tenure.epoch_index:
        raise FenceLost("this node's tenure ended while it read the store")


async def fenced_idempotent(
    physical: PhysicalStore, tenure: Tenure, ops: Sequence[Op], newest: Newest | None = None
) -> None:
    """:func:`fenced_txn` for deletions: a lost answer is followed by the same again, a few times.

    A late duplicate is harmless: what it deletes is never written again under this name. Raises OutcomeUnknown.
    """
    for _ in range(_ATTEMPTS - 1):
        try:
            await fenced_txn(physical, tenure, ops, newest)
        except OutcomeUnknown:
            await asyncio.sleep(_PAUSE_S)
        else:
            return
    await fenced_txn(physical, tenure, ops, newest)
