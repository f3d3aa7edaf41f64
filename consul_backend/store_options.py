"""Bounds and paces of one node's store."""

from __future__ import annotations

from dataclasses import dataclass

from consul_backend.commits import CommitOptions
from consul_backend.recovery import EAGER_KEYS
from consul_backend.wal import SEGMENT_RECORDS

_MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class StoreOptions:
    """Bounds of one node's store. ``segment_records`` must stay what the generation began with (recovery checks).
    ``batch_*`` bound one batch of values, ``staged_*`` one that replication commits together with a position."""

    cache_bytes_max: int = 64 * _MIB
    names_bytes_max: int = 16 * _MIB
    queue_batches_max: int = 4096
    queue_bytes_max: int = 64 * _MIB
    batch_entries_max: int = 100_000
    batch_bytes_max: int = 32 * _MIB
    staged_entries_max: int = 1_000_000
    staged_bytes_max: int = 256 * _MIB
    large_queue_max: int = 16
    large_queue_bytes_max: int = 128 * _MIB
    ring_records_max: int = 4096
    ring_bytes_max: int = 32 * _MIB
    wal_keep_records: int = 16_384
    wal_keep_bytes: int = 256 * _MIB
    segment_records: int = SEGMENT_RECORDS
    flush_interval_s: float = 1.0
    flush_extents_per_s: float = 64.0
    collect_interval_s: float = 5.0
    tip_interval_s: float = 1.0
    resolve_timeout_s: float = 5.0
    index_eager_keys: int = EAGER_KEYS
    index_warm_share: float = 0.25

    def __post_init__(self) -> None:
        if self.segment_records < 2:
            raise ValueError("a segment of the log has at least two records")
        if not 0 < self.index_warm_share <= 1:
            raise ValueError("index_warm_share is a share of the time, above 0 and up to 1")

    def commit(self) -> CommitOptions:
        """Those of group commit."""
        return CommitOptions(self.queue_batches_max, self.queue_bytes_max, self.resolve_timeout_s, self.segment_records)
