"""Status fields, against the contract's tables (1.2)."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, timedelta, timezone
from types import SimpleNamespace
from typing import cast

import pytest

from sidecar.replication.brake import Shrink
from sidecar.replication.filling import SyncProgress
from sidecar.replication.mode_manager import ModeManager
from sidecar.replication.mode_status import _heard_lately
from sidecar.replication.status import (
    Heartbeats,
    PrimaryFacts,
    SecondaryFacts,
    SecondaryStatusFacts,
    SyncFacts,
    bootstrapping_status,
    primary_status,
    rfc3339,
    secondary_status,
)
from tests.support.replication import FakeClock

BEATS = Heartbeats(
    connected=True,
    api_addr="https://10.0.0.7:8200",
    cluster_addr="https://10.0.0.7:8201",
    last_ms=1_709_564_756_789,
    duration_ms=3,
    clock_skew_ms=-2,
    canary_age_ms=660,
)

PRIMARY = PrimaryFacts(
    mode="performance",
    set_id="set",
    epoch_number=1,
    epoch_id="epoch",
    primary_cluster_addr="",
    known_secondaries=["eu-1", "eu-2"],
    secondaries=[SecondaryFacts("eu-1", BEATS, acked_index=220)],
    head_index=223,
    merkle_root="ab" * 20,
)
SECONDARY = SecondaryStatusFacts(
    set_id="set",
    epoch_number=1,
    epoch_id="epoch",
    secondary_id="eu-1",
    primary_cluster_addr="https://us:8201",
    known_addresses=["https://us:8201"],
    state="stream-wals",
    connection_state="ready",
    last_remote_wal=223,
    last_wal=99,
    merkle_root="ab" * 20,
    started_ms=1_709_564_756_789,
    primary=BEATS,
    lag_s=0.66049,
    last_sync=SyncFacts("merkle", 2, 4096, 12, 0.12345),
)


def test_a_primary_shows_every_field_of_the_contract_with_its_type() -> None:
    data = primary_status(PRIMARY, timezone(timedelta(hours=-5)))
    entry = data.pop("secondaries")[0]
    assert data == {
        "cluster_id": "set",
        "corrupted_merkle_tree": False,
        "epoch": {"id": "epoch", "number": 1},
        "forks": [],
        "known_secondaries": ["eu-1", "eu-2"],
        "last_corruption_check_epoch": "-62135596800",
        "last_performance_wal": 223,
        "last_reindex_epoch": "0",
        "last_wal": 223,
        "merkle_root": "ab" * 20,
        "mode": "primary",
        "primary_cluster_addr": "",
        "ssct_generation_counter": 0,
        "state": "running",
    }
    assert entry == {
        "api_address": "https://10.0.0.7:8200",
        "clock_skew_ms": "-2",
        "cluster_address": "https://10.0.0.7:8201",
        "connection_status": "connected",
        "last_heartbeat": "2024-03-04T10:05:56-05:00",
        "last_heartbeat_duration_ms": "3",
        "node_id": "eu-1",
        "replication_primary_canary_age_ms": "660",
        "acknowledged_wal": 220,
        "behind_records": 3,
    }


def test_an_empty_primary_has_empty_lists_not_nulls() -> None:
    data = primary_status(replace(PRIMARY, known_secondaries=[], secondaries=[]))
    assert data["known_secondaries"] == []
    assert data["secondaries"] == []


def test_a_primary_that_does_not_serve_yet_is_idle() -> None:
    assert primary_status(replace(PRIMARY, running=False))["state"] == "idle"


def test_a_secondary_shows_every_field_of_the_contract_with_its_type() -> None:
    data = secondary_status(SECONDARY, UTC)
    entry = data.pop("primaries")[0]
    assert "node_id" not in entry
    assert entry["connection_status"] == "connected"
    assert data == {
        "alarm": False,
        "cluster_id": "set",
        "connection_state": "ready",
        "corrupted_merkle_tree": False,
        "epoch": {"id": "epoch", "number": 1},
        "known_primary_cluster_addrs": ["https://us:8201"],
        "lag_s": 0.66,
        "last_corruption_check_epoch": "-62135596800",
        "last_reindex_epoch": "0",
        "last_remote_wal": 223,
        "last_start": "2024-03-04T15:05:56Z",
        "last_sync": {"by": "merkle", "round_trips": 2, "bytes": 4096, "keys": 12, "seconds": 0.123},
        "last_wal": 99,
        "merkle_root": "ab" * 20,
        "mode": "secondary",
        "primary_cluster_addr": "https://us:8201",
        "secondary_id": "eu-1",
        "ssct_generation_counter": 0,
        "state": "stream-wals",
        "state_reason": "",
    }


def test_sync_progress_shows_only_while_syncing() -> None:
    progress = SyncProgress(total=10, done=4, kept=3, bytes=900, seconds=2.0)
    syncing = secondary_status(replace(SECONDARY, state="merkle-sync", sync_progress=progress))
    assert syncing["merkle_sync_progress"] == {
        "sync_total_keys": 10,
        "sync_progress": 4,
        "kept_keys": 3,
        "bytes": 900,
        "seconds": 2.0,
        "keys_per_s": 2.0,
        "eta_s": 3.0,
    }
    assert "merkle_sync_progress" not in secondary_status(replace(SECONDARY, sync_progress=progress))


def test_what_the_brake_stopped_is_told() -> None:
    braked = secondary_status(replace(SECONDARY, state="idle", alarm=True, shrink=Shrink(900, 1000, 200)))
    assert braked["brake"] == {"deletions": 900, "entries_here": 1000, "allowed": 200}
    assert "brake" not in secondary_status(SECONDARY)


def test_a_secondary_that_heard_nothing_yet() -> None:
    data = secondary_status(replace(SECONDARY, primary=None, lag_s=None, last_sync=None, state="idle"))
    assert data["primaries"] == []
    assert data["lag_s"] is None
    assert data["last_sync"] is None


def test_times_have_whole_seconds_and_an_offset() -> None:
    assert rfc3339(0, UTC) == "1970-01-01T00:00:00Z"
    assert rfc3339(999, timezone(timedelta(hours=5, minutes=30))) == "1970-01-01T05:30:00+05:30"


def test_bootstrapping_is_a_mode_of_its_own() -> None:
    assert bootstrapping_status() == {"mode": "bootstrapping"}


@pytest.mark.parametrize(("beat_s", "silence_s"), [(5.0, 10.0), (1.0, 2.0), (0.1, 1.0)])
def test_a_peer_is_shown_as_gone_after_two_silent_beats(beat_s: float, silence_s: float) -> None:
    """And after a second at least: how both ends tell "connected", which nothing but the last heartbeat decides."""
    clock = FakeClock()
    manager = cast(ModeManager, SimpleNamespace(options=SimpleNamespace(beat_s=beat_s), clock=clock))
    heard_at_s = clock.monotonic()
    clock.now_s += silence_s
    assert _heard_lately(manager, heard_at_s)
    clock.now_s += 0.001
    assert not _heard_lately(manager, heard_at_s)
    assert not _heard_lately(manager, None), "never heard of"
