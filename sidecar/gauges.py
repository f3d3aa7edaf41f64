"""Which gauges a node shows, by the names of the API's telemetry. Pure."""

from __future__ import annotations

from collections.abc import Mapping

# What the replicated store counts, and the telemetry's name for it.
_OF_STORE = {
    "cache_bytes": "cache.bytes",
    "names_bytes": "cache.names.bytes",
    "commit_queue": "wal.flushReady.queue_len",
    "commit_queue_bytes": "wal.flushReady.queue_bytes",
    "index_dirty_extents": "merkle.flushDirty.outstanding_pages",
    "index_stored_extents": "merkle.pages",
    "large_queue": "wal.large.queue_len",
    "ring_bytes": "logshipper.buffer.size",
    "ring_records": "logshipper.buffer.length",
    "wal_bytes": "wal.bytes",
}
_TOTALS_OF_STORE = {
    "cache_hits": "cache.hit",
    "names_hits": "cache.names.hit",
    "names_misses": "cache.names.miss",
    "cache_misses": "cache.miss",
    "collect_failures": "wal.gc.failures",
    "commit_batches": "wal.batches",
    "commit_overdue": "wal.overdue",
    "commit_overloaded": "wal.overloaded",
    "commit_relimited": "wal.limits_learnt",
    "commit_resent": "wal.resent",
    "commit_superseded": "wal.superseded",
    "commit_transactions": "wal.transactions",
    "foreign_writes": "store.foreign_writes",
    "index_extents_written": "merkle.flushDirty.num_pages",
    "index_flush_failures": "merkle.flushDirty.failures",
    "large_overdue": "wal.large.overdue",
    "large_overloaded": "wal.large.overloaded",
    "wal_segments_collected": "wal.gc.segments_deleted",
}


def role_gauges(*, unsealed: bool, active: bool, performance_mode: str, dr_mode: str) -> dict[str, float]:
    """What a node is."""
    return {
        "core.active": float(active),
        "core.performance_standby": 0.0,
        "core.replication.dr.primary": float(dr_mode == "primary"),
        "core.replication.dr.secondary": float(dr_mode == "secondary"),
        "core.replication.performance.primary": float(performance_mode == "primary"),
        "core.replication.performance.secondary": float(performance_mode == "secondary"),
        "core.unsealed": float(unsealed),
    }


def store_gauges(statistics: Mapping[str, float], modes: tuple[str, str], remote_index: int | None) -> dict[str, float]:
    """The store of an active node. ``modes``: performance and DR mode; ``remote_index``: the primary's WAL index that a
    secondary has applied."""
    found = {name: float(statistics[key]) for key, name in _OF_STORE.items() if key in statistics}
    head, oldest = statistics.get("wal_head_index", 0), statistics.get("wal_oldest_index", 0)
    found["replication.wal.last_wal"] = found["replication.merkle.commit_index"] = float(head)
    found["wal.gc.total"] = float(max(head - oldest + 1, 0))
    performance_mode, dr_mode = modes
    if performance_mode == "primary" and dr_mode != "secondary":
        found["replication.wal.last_performance_wal"] = float(head)
    if dr_mode == "primary":
        found["replication.wal.last_dr_wal"] = float(head)
    if "secondary" in modes and remote_index is not None:
        found["replication.fsm.last_remote_wal"] = float(remote_index)
    return found


def store_totals(statistics: Mapping[str, float]) -> dict[str, float]:
    """What only grows during a tenure."""
    return {name: float(statistics[key]) for key, name in _TOTALS_OF_STORE.items() if key in statistics}
