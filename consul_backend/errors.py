"""What can go wrong below the barrier, in families by how the caller should react.

=====================  =====================================================
retry later            :class:`Unavailable`, :class:`NotApplied`, :class:`Overloaded`
tell the client        :class:`TooLarge`, :class:`OutcomeUnknown`
step down              :class:`FenceLost`, :class:`OutcomeUnknown`
halt, call a human     :class:`StoreWentBack`, :class:`SentinelMissing`, :class:`Corrupt`
=====================  =====================================================

No message carries a value, a token or a session id.
"""

from __future__ import annotations

from dataclasses import dataclass


class BackendError(Exception):
    """Root of everything this package raises on purpose."""


class Unavailable(BackendError):
    """The store could not be reached or refused for load. Nothing was written; try again later."""


class NotApplied(BackendError):
    """A write that was queued and never sent. Nothing was written; try again."""


class DeadlinePassed(NotApplied):
    """The request's time ran out while its write was queued. Nothing was written."""


class Overloaded(BackendError):
    """A bounded queue is full. Nothing was written; try again after a moment."""


class OutcomeUnknown(BackendError):
    """The request may have been applied. Read before you repeat it."""


class TooLarge(BackendError):
    """The write exceeds a limit of the store, even alone. Nothing was written."""


class PermissionDenied(BackendError):
    """The store's token lacks a right. Nothing was written, and nothing may be concluded about what exists."""


@dataclass(frozen=True, slots=True)
class OpFailure:
    """One refused operation of a transaction: its position and the store's reason."""

    op_index: int
    what: str


class Conflict(BackendError):
    """The store refused the transaction: a check failed. Nothing was written."""

    def __init__(self, message: str, failures: tuple[OpFailure, ...] = ()) -> None:
        super().__init__(message)
        self.failures = failures


class FenceLost(BackendError):
    """This tenure's session no longer holds the lock. Step down; another node may lead already."""


class StoreWentBack(BackendError):
    """The newest record is not the one this tenure wrote although the session is valid: the store was restored
    or changed underneath. Stop and serve nothing; an operator must decide."""


class SentinelMissing(BackendError):
    """The sentinel key cannot be read where data was: the store's token lost its rights, or the prefix is wrong.
    An empty answer proves nothing; stop and serve nothing."""


class Corrupt(BackendError):
    """Stored bytes fail their own check. Never retried."""


class NotLoaded(Unavailable):
    """A page of the index is not in memory yet. Nothing was written; try again after a moment."""


class IndexDamaged(Corrupt):
    """A stored page of the index is not what was stored there. What it covers is refused until a reindex; the rest
    goes on."""


class ForeignWrite(Corrupt):
    """A data key holds something that no record of this cluster wrote."""


class AlreadyRunning(BackendError):
    """Another process holds this embedded store."""
