"""Transactions without a WAL record (flush, collection, rebuild, dropping a generation) and their two guards.

Such a transaction carries ``check-session`` on the lock *and* ``check-index`` on the epoch key: without a record there
is no chain check, and a session check alone is passed by an empty session on a free lock.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from consul_backend.errors import Conflict, FenceLost, OpFailure, OutcomeUnknown
from consul_backend.physical import EPOCH_KEY, LOCK_KEY, PhysicalStore, TxnResult
from consul_backend.tenure import Tenure
from consul_backend.txn import CheckIndex, CheckSession, Op

GUARD_OPS = 2

_ATTEMPTS = 5
_PAUSE_S = 0.1


def guards(tenure: Tenure) -> list[Op]:
    """The two that refuse whatever is not this tenure's."""
    return [CheckSession(LOCK_KEY, tenure.session), CheckIndex(EPOCH_KEY, tenure.epoch_index)]


async def fenced_txn(physical: PhysicalStore, tenure: Tenure, ops: Sequence[Op]) -> TxnResult:
    """Apply ``ops`` if ``tenure`` still leads. Raises FenceLost when it does not; Conflict, whose positions count from
    ``ops[0]``, when another check failed; and what :meth:`PhysicalStore.txn` raises."""
    try:
        return await physical.txn([*guards(tenure), *ops])
    except Conflict as refusal:
        if any(failure.op_index < GUARD_OPS for failure in refusal.failures):
            raise FenceLost("the store refused a fenced transaction: this node's tenure has ended") from None
        failures = tuple(OpFailure(failure.op_index - GUARD_OPS, failure.what) for failure in refusal.failures)
        raise Conflict(str(refusal), failures) from None


async def require_tenure(physical: PhysicalStore, tenure: Tenure) -> None:
    """Raises FenceLost unless ``tenure`` still leads.

    For whoever found something wrong by reads that are not one snapshot: a session serves one tenure, so one that holds
    the lock now held it all the while, and what was found is no successor's work.
    """
    lock, epoch = await physical.get_many([LOCK_KEY, EPOCH_KEY], consistent=True)
    if lock is None or lock.session != tenure.session or epoch is None or epoch.modify_index != tenure.epoch_index:
        raise FenceLost("this node's tenure ended while it read the store")


async def fenced_idempotent(physical: PhysicalStore, tenure: Tenure, ops: Sequence[Op]) -> None:
    """:func:`fenced_txn` for deletions: a lost answer is followed by the same again, a few times.

    A late duplicate is harmless: what it deletes is never written again under this name. Raises OutcomeUnknown.
    """
    for _ in range(_ATTEMPTS - 1):
        try:
            await fenced_txn(physical, tenure, ops)
        except OutcomeUnknown:
            await asyncio.sleep(_PAUSE_S)
        else:
            return
    await fenced_txn(physical, tenure, ops)
