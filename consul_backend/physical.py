"""The one interface to stored bytes, kept by ConsulStore (``store.py``) and EmbeddedStore (``embedded.py``).

Rules, all held by one contract suite (``tests/contract``):

* A transaction is atomic and isolated; every key it writes gets one and the same new ModifyIndex, above any before.
* Writing the value that is stored already does not move a key's ModifyIndex and wakes no watcher.
* A refused check raises :class:`~consul_backend.errors.Conflict` with every failed operation; nothing is written.
* A transaction whose answer is lost raises :class:`~consul_backend.errors.OutcomeUnknown`; it is never repeated here.
* A transaction over the limits raises :class:`~consul_backend.errors.TooLarge` and changes nothing.
* A missing key is reported missing only with proof; a token without rights raises
  :class:`~consul_backend.errors.PermissionDenied` or :class:`~consul_backend.errors.SentinelMissing`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from consul_backend.limits import Limits
from consul_backend.txn import Cas, Op, Set


@dataclass(frozen=True, slots=True)
class Item:
    """One stored key: relative name, value, ModifyIndex (never 0), and the session that locks it, or ``""``."""

    key: str
    value: bytes
    modify_index: int
    session: str = ""


@dataclass(frozen=True, slots=True)
class TxnResult:
    """An applied transaction: the ModifyIndex of what it wrote (0 if it wrote nothing), and what its gets read."""

    modify_index: int
    items: tuple[Item, ...] = ()


Names = list[str]
"""For signatures in classes that have a method ``list``."""


class PhysicalStore(Protocol):
    """Durable keys with conditional transactions, sessions and locks."""

    @property
    def kind(self) -> str:
        """``"consul"``, ``"embedded"`` or ``"inmem"``: what seal-status reports as storage_type."""

    @property
    def limits(self) -> Limits:
        """What one transaction may hold; known after :meth:`open`."""

    async def open(self) -> None:
        """Connect and probe. Raises Unavailable, PermissionDenied or AlreadyRunning."""

    async def close(self) -> None:
        """Release connections and files. Sessions are not destroyed: that is the election's business."""

    async def get(self, key: str, *, consistent: bool = False) -> Item | None:
        """One key, or None with proof of absence. Raises Unavailable, PermissionDenied."""

    async def get_many(self, keys: Sequence[str], *, consistent: bool = False) -> list[Item | None]:
        """Any number of keys in order, in as few read transactions as the limits allow (not one snapshot)."""

    async def list(self, prefix: str, *, consistent: bool = False) -> list[str]:
        """The names one level below ``prefix`` (which is ``""`` or ends in ``/``), each relative to it, folders with a
        trailing ``/``; sorted by bytes. The sentinel, once set, is checked in the same call: SentinelMissing."""

    async def names_below(self, prefix: str, names_max: int, *, consistent: bool = False) -> Names | None:
        """Every key that begins with ``prefix``, at any depth, else as :meth:`list`; None when there are more than
        ``names_max``, or more than one answer is taken to hold: then go level by level."""

    async def txn(self, ops: Sequence[Op]) -> TxnResult:
        """Apply all operations or none. Raises Conflict, TooLarge, PermissionDenied, OutcomeUnknown, Unavailable
        (certainly not applied)."""

    async def watch(self, key: str, index: int, wait_s: float) -> tuple[Item | None, int]:
        """Wait until ``key`` changes after ``index`` or ``wait_s`` passes; returns what is there and the index to pass
        next (0: start again). A hint only: an unchanged answer is normal."""

    async def create_session(self, name: str, *, beat_ttl_s: float, lock_delay_s: float) -> str:
        """A new session (a UUID) that dies ``beat_ttl_s`` after the last :meth:`beat`; its locks are then released and
        refuse other holders for ``lock_delay_s``. The first beat is made here."""

    async def beat(self) -> None:
        """Tell the store that this process's event loop is alive. Raises Unavailable."""

    async def renew_session(self, session: str) -> bool:
        """A server round trip: True if the session is alive. Raises Unavailable when the answer is not known."""

    async def destroy_session(self, session: str) -> None:
        """End a session at once; unknown sessions are no failure."""

    async def stop_beat(self) -> None:
        """Withdraw the beat check. Called last on the way down."""


SENTINEL_KEY = "sentinel"
LOCK_KEY = "lock"
EPOCH_KEY = "epoch"
GENERATION_KEY = "generation"


def writes_sentinel(ops: Sequence[Op]) -> bool:
    """Whether a transaction sets the sentinel: from then on its absence is an alarm."""
    return any(op.key == SENTINEL_KEY for op in ops if isinstance(op, Set | Cas))
