"""``sys/replication/*/status``: facts in, the contract's fields out. Pure.

Which numbers are strings is the contract's doing (1.2): the ``*_ms`` and ``*_epoch`` fields are strings, the ``*_wal``
fields are numbers, "never" is ``"0"`` or Go's zero time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, tzinfo
from typing import Any

from sidecar.replication.brake import Shrink
from sidecar.replication.filling import SyncProgress

NEVER_CHECKED = "-62135596800"
DISABLED: dict[str, Any] = {"mode": "disabled"}


@dataclass(frozen=True, slots=True)
class Heartbeats:
    """What heartbeats of one peer say. Times are unix milliseconds; ``canary_age_ms`` None where it is not known."""

    connected: bool
    api_addr: str = ""
    cluster_addr: str = ""
    last_ms: int = 0
    duration_ms: int = 0
    clock_skew_ms: int = 0
    canary_age_ms: int | None = None


@dataclass(frozen=True, slots=True)
class SecondaryFacts:
    """One known secondary as its primary sees it; ``acked_index`` is -1 before the first acknowledgement."""

    id: str
    heartbeats: Heartbeats
    acked_index: int = -1
    round_trip_ms: int = 0


@dataclass(frozen=True, slots=True)
class IndexFacts:
    """The merkle index: what the last check found, and a reindex that runs. ``checked_s`` None: never. ``braked``: how
    many entries the last reindex would have given up, had the brake let it."""

    corrupted: bool = False
    checked_s: int | None = None
    reindexed_s: int = 0
    reindexing: bool = False
    stage: str = ""
    done: int = 0
    total: int = 0
    braked: int = 0


@dataclass(frozen=True, slots=True)
class PrimaryFacts:
    """A primary at one moment. ``forks``: secondaries that were refused because of another history, and why."""

    mode: str
    set_id: str
    epoch_number: int
    epoch_id: str
    primary_cluster_addr: str
    known_secondaries: Sequence[str]
    secondaries: Sequence[SecondaryFacts]
    head_index: int
    merkle_root: str
    running: bool = True
    forks: Sequence[tuple[str, str]] = ()
    index: IndexFacts = IndexFacts()


@dataclass(frozen=True, slots=True)
class SyncFacts:
    """How the last reconciliation went; ``by`` is ``wal`` or ``merkle``."""

    by: str
    round_trips: int
    bytes: int
    keys: int
    seconds: float


@dataclass(frozen=True, slots=True)
class SecondaryStatusFacts:
    """A secondary at one moment. ``state`` and ``connection_state`` are the contract's words (section 2.1)."""

    set_id: str
    epoch_number: int
    epoch_id: str
    secondary_id: str
    primary_cluster_addr: str
    known_addresses: Sequence[str]
    state: str
    connection_state: str
    last_remote_wal: int
    last_wal: int
    merkle_root: str
    started_ms: int
    primary: Heartbeats | None = None
    reason: str = ""
    alarm: bool = False
    lag_s: float | None = None
    last_sync: SyncFacts | None = None
    sync_progress: SyncProgress | None = None
    shrink: Shrink | None = None
    index: IndexFacts = IndexFacts()


def primary_status(facts: PrimaryFacts, zone: tzinfo | None = None) -> dict[str, Any]:
    """The fields of a primary; ``zone`` is for tests, None the machine's own."""
    return {
        "cluster_id": facts.set_id,
        "epoch": {"id": facts.epoch_id, "number": facts.epoch_number},
        "forks": [{"node_id": name, "reason": reason} for name, reason in facts.forks],
        "known_secondaries": list(facts.known_secondaries),
        f"last_{facts.mode}_wal": facts.head_index,
        "last_wal": facts.head_index,
        "merkle_root": facts.merkle_root,
        "mode": "primary",
        "primary_cluster_addr": facts.primary_cluster_addr,
        "secondaries": [_secondary_entry(one, facts.head_index, zone) for one in facts.secondaries],
        "ssct_generation_counter": 0,
        "state": "running" if facts.running else "idle",
        **index_fields(facts.index),
    }


def secondary_status(facts: SecondaryStatusFacts, zone: tzinfo | None = None) -> dict[str, Any]:
    """The fields of a secondary, with ours added: ``lag_s``, ``last_sync``, ``state_reason``, ``alarm``, ``brake``."""
    data: dict[str, Any] = {
        "alarm": facts.alarm,
        "cluster_id": facts.set_id,
        "connection_state": facts.connection_state,
        "epoch": {"id": facts.epoch_id, "number": facts.epoch_number},
        "known_primary_cluster_addrs": list(facts.known_addresses),
        "lag_s": None if facts.lag_s is None else round(facts.lag_s, 3),
        "last_remote_wal": facts.last_remote_wal,
        "last_start": rfc3339(facts.started_ms, zone),
        "last_sync": _last_sync(facts.last_sync),
        "last_wal": facts.last_wal,
        "merkle_root": facts.merkle_root,
        "mode": "secondary",
        "primaries": [] if facts.primary is None else [_peer_entry(facts.primary, zone)],
        "primary_cluster_addr": facts.primary_cluster_addr,
        "secondary_id": facts.secondary_id,
        "ssct_generation_counter": 0,
        "state": facts.state,
        "state_reason": facts.reason,
        **index_fields(facts.index),
    }
    if facts.state == "merkle-sync" and facts.sync_progress is not None:
        data["merkle_sync_progress"] = _progress(facts.sync_progress)
    if facts.shrink is not None:
        data["brake"] = {
            "deletions": facts.shrink.deletions,
            "entries_here": facts.shrink.here,
            "allowed": facts.shrink.allowed,
        }
    return data


def _progress(progress: SyncProgress) -> dict[str, Any]:
    """The contract's two fields, and ours: what was here before, what travelled, and how long it will take."""
    return {
        "sync_total_keys": progress.total,
        "sync_progress": progress.done,
        "kept_keys": progress.kept,
        "bytes": progress.bytes,
        "seconds": round(progress.seconds, 3),
        "keys_per_s": round(progress.entries_per_s, 1),
        "eta_s": None if progress.eta_s is None else round(progress.eta_s, 1),
    }


def index_fields(facts: IndexFacts) -> dict[str, Any]:
    """What the status of a mode says about the merkle index; the ``reindex_*`` fields only while one runs."""
    data: dict[str, Any] = {
        "corrupted_merkle_tree": facts.corrupted,
        "last_corruption_check_epoch": NEVER_CHECKED if facts.checked_s is None else str(facts.checked_s),
        "last_reindex_epoch": str(facts.reindexed_s),
    }
    if facts.braked:
        data["reindex_braked_deletions"] = facts.braked
    if facts.reindexing:
        data |= {"reindex_in_progress": True, "reindex_stage": facts.stage}
        if facts.stage == "building":
            data |= {"reindex_building_progress": facts.done, "reindex_building_total": facts.total}
    return data


def bootstrapping_status() -> dict[str, Any]:
    """While ``secondary/enable`` runs."""
    return {"mode": "bootstrapping"}


def rfc3339(time_ms: int, zone: tzinfo | None = None) -> str:
    """RFC 3339 with whole seconds and the zone's offset, as heartbeats are shown; UTC as ``Z``."""
    moment = datetime.fromtimestamp(time_ms // 1000, UTC).astimezone(zone)
    text = moment.isoformat(timespec="seconds")
    return text.removesuffix("+00:00") + "Z" if text.endswith("+00:00") else text


def _last_sync(sync: SyncFacts | None) -> dict[str, Any] | None:
    if sync is None:
        return None
    return {
        "by": sync.by,
        "round_trips": sync.round_trips,
        "bytes": sync.bytes,
        "keys": sync.keys,
        "seconds": round(sync.seconds, 3),
    }


def _peer_entry(beats: Heartbeats, zone: tzinfo | None) -> dict[str, Any]:
    return {
        "api_address": beats.api_addr,
        "clock_skew_ms": str(beats.clock_skew_ms),
        "cluster_address": beats.cluster_addr,
        "connection_status": "connected" if beats.connected else "disconnected",
        "last_heartbeat": rfc3339(beats.last_ms, zone) if beats.last_ms else "",
        "last_heartbeat_duration_ms": str(beats.duration_ms),
        "replication_primary_canary_age_ms": str(beats.canary_age_ms if beats.canary_age_ms is not None else 0),
    }


def _secondary_entry(one: SecondaryFacts, head_index: int, zone: tzinfo | None) -> dict[str, Any]:
    entry = _peer_entry(one.heartbeats, zone)
    entry["node_id"] = one.id
    entry["acknowledged_wal"] = max(one.acked_index, 0)
    entry["behind_records"] = max(head_index - max(one.acked_index, 0), 0)
    return entry
