"""What goes into group commit and what comes out of it, as values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from consul_backend.batching import Prepared
from consul_backend.position import Position
from consul_backend.txn import Op
from consul_backend.wal import Groups, Head, Kind, Large, Record


@dataclass(frozen=True, slots=True)
class Tip:
    """The newest record as the next transaction's chain check needs it."""

    record: Record
    key: str
    modify_index: int

    @property
    def head(self) -> Head:
        """The same, for readers."""
        header = self.record.header
        return Head(header.index, self.record.chain_hash, header.time_ms)


@dataclass(frozen=True, slots=True)
class Committed:
    """What one acknowledged transaction did. ``size_bytes`` is the stored record's size."""

    record: Record
    head: Head
    entries: Mapping[str, Prepared]
    size_bytes: int


@dataclass(frozen=True, slots=True)
class CommitOptions:
    """Bounds of the queue, and how long a lost answer is pursued."""

    queue_batches_max: int
    queue_bytes_max: int
    resolve_timeout_s: float
    segment_records: int


@dataclass(frozen=True, slots=True)
class Special:
    """A record that is no client's batch: its entries, its operations besides guards and record, and positions that
    become newest with it."""

    kind: Kind
    large: Large
    groups: Groups = field(default_factory=dict)
    ops: Sequence[Op] = ()
    positions: Mapping[str, Position] | None = None


MakeSpecial = Callable[[], Special]
"""Called when the record's turn has come and everything before it is worked off."""


@dataclass(slots=True)
class CommitCounts:
    """Since the tenure began. ``queue_peak`` is in batches; ``relimited`` counts limits learnt from a refusal,
    ``superseded`` the records that took the place of one whose outcome was unknown, ``overloaded`` batches refused
    because the queue was full, ``overdue`` those whose deadline passed while they waited."""

    transactions: int = 0
    batches: int = 0
    resent: int = 0
    narrowed: int = 0
    specials: int = 0
    relimited: int = 0
    superseded: int = 0
    overloaded: int = 0
    overdue: int = 0
    queue_peak: int = 0
