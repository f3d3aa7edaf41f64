"""The status of one mode of replication, from its manager's parts at one moment."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from consul_backend.clock import Clock
from consul_backend.errors import NotLoaded
from sidecar.replication import status as statuses
from sidecar.replication.authorities import waiting
from sidecar.replication.committer import stored_position
from sidecar.replication.forecast import forecast
from sidecar.replication.history import Promotion
from sidecar.replication.lost_writes import summary
from sidecar.replication.mode_manager import ModeManager
from sidecar.replication.modes import PERFORMANCE
from sidecar.replication.protocol import PROTOCOL_VERSIONS
from sidecar.replication.renewal import renewal_due_s
from sidecar.replication.roles import PrimaryRole, SecondaryRole
from sidecar.replication.roles import hidden as hides
from sidecar.replication.selection import EVERYTHING
from sidecar.replication.shipped import Shipped
from sidecar.replication.shipper import Peer
from sidecar.replication.states import Phase
from sidecar.transport import certificates

SILENT_BEATS = 2
"""A peer that was silent for so many beats is shown as disconnected, before its stream is given up."""
SILENCE_MIN_S = 1.0


async def status_of(manager: ModeManager, index: statuses.IndexFacts) -> dict[str, Any]:
    """The fields of contract 1.2 for whatever role the cluster has in this mode."""
    role = manager.role
    if isinstance(role, PrimaryRole):
        return (
            _primary(manager, role, index)
            | _common(manager, role.history)
            | _filtered(manager, role)
            | _offered(manager, role)
            | _denied(manager)
        )
    if isinstance(role, SecondaryRole):
        found = (
            _secondary(manager, role, index)
            | _common(manager, role.history)
            | _filtered(manager, role)
            | _certificate(role)
        )
        return found | {"promotion_forecast": forecast(await manager.standing(probe=False), named=False)}
    return dict(statuses.DISABLED) | _lost(manager) | _lacking(manager)


def _filtered(manager: ModeManager, role: PrimaryRole | SecondaryRole) -> dict[str, Any]:
    """Who is filtered, and how many mounts that concerns; anybody may ask, so their paths are told elsewhere."""
    if manager.mode is not PERFORMANCE:
        return {}
    if isinstance(role, PrimaryRole):
        filters = {name: {"mode": one.mode, "paths": len(one.paths)} for name, one in sorted(role.filters.items())}
        return ({"paths_filters": filters} if filters else {}) | _lacking(manager)
    hidden = sum([hides(role, mount.uuid) for mount in manager.mounts()])
    return ({"mounts_withheld": hidden} if hidden else {}) | _lacking(manager)


def _lacking(manager: ModeManager) -> dict[str, Any]:
    lacking = len(manager.lacking())
    return {"mounts_not_held": lacking} if lacking else {}


def gauges_of(manager: ModeManager) -> dict[str, float]:
    """The same as numbers, by the names of the telemetry below ``replication.<mode>``: roles are shown elsewhere."""
    role, service = manager.role, manager.secondary
    found: dict[str, float] = {"lost_writes": float(len(manager.lost_heads))}
    if isinstance(role, PrimaryRole):
        peers = manager.primary.shipper.peers.values() if manager.primary is not None else ()
        lags = [lag_s for peer in peers if (lag_s := peer.lag_s(manager.clock.monotonic())) is not None]
        found |= {
            "epoch": float(role.epoch.number),
            "secondaries": float(len(role.secondaries)),
            "secondaries_connected": float(
                sum([peer.connected and _heard_lately(manager, peer.heard_at_s) for peer in peers])
            ),
            "secondaries_lag_s": max(lags, default=0.0),
            "forks": float(len(_forks(manager))),
            "denials": float(len(manager.denials.of(manager.mode.name))),
            "rotation_waiting": float(len(waiting(role, now_ms=manager.clock.time_ms())) if role.rotating else 0),
        }
    elif isinstance(role, SecondaryRole) and service is not None:
        upstream, position = service.applier.upstream, service.applier.position
        braked = service.machine.phase is Phase.BRAKED
        found |= {f"state.{phase.value}": float(service.state == phase.value) for phase in Phase}
        found |= {
            f"state.{Phase.BRAKED.value}": float(braked),
            f"state.{Phase.IDLE.value}": float(service.state == Phase.IDLE.value and not braked),
        }
        found |= {
            "epoch": float(role.epoch.number),
            "connected": float(upstream.connected and _heard_lately(manager, upstream.heard_at_s)),
            "alarm": float(service.machine.alarm),
            "brake_deletions": float(service.shrink.deletions if service.shrink is not None else 0),
            "missing_records": float(max(upstream.head_index - (position.index if position else 0), 0)),
        }
        if (lag_s := service.applier.lag_s()) is not None:
            found["lag_s"] = lag_s
        if (progress := service.sync_progress) is not None:
            found |= {
                "sync.entries": float(progress.total),
                "sync.entries_done": float(progress.done),
                "sync.bytes": float(progress.bytes),
            }
        if role.attached:
            found["certificate_left_s"] = (
                certificates.period_s(role.certificate_pem)[1] - manager.clock.time_ms() / 1000
            )
    return {f"replication.{manager.mode.name}.{name}": value for name, value in found.items()}


def _common(manager: ModeManager, history: tuple[Promotion, ...]) -> dict[str, Any]:
    shown = [
        {"number": one.number, "id": one.id, "began_ms": one.time_ms, "fork_wal": one.fork.index if one.fork else None}
        for one in history
    ]
    return {"epochs": shown} | _lost(manager)


def _denied(manager: ModeManager) -> dict[str, Any]:
    stopped = manager.denials.stopped
    if stopped is None:
        return {}
    told = [{"node_id": name, "reason": reason} for name, reason in manager.denials.of(manager.mode.name)]
    return {"stopped": stopped, "denials": told}


def _offered(manager: ModeManager, role: PrimaryRole) -> dict[str, Any]:
    """What a cluster that is to become a secondary can compare before it does; all of it is public."""
    limits = manager.options.limits
    authority: dict[str, Any] = {"certificate": role.authority_pem.decode(), **_authority(role.authority_pem)}
    if role.rotating:
        authority["successor"] = _authority(role.next_authority_pem)
        authority["overlap_ends_ms"] = str(role.rotation_deadline_ms)
        authority["waiting_for"] = waiting(role, now_ms=manager.clock.time_ms())
    return {
        "certificate_authority": authority,
        "cluster_addrs": list(manager.cluster_addresses),
        "protocol_versions": list(PROTOCOL_VERSIONS),
        "store_limits": {
            "operations": limits.ops_max,
            "body_bytes": limits.body_bytes_max,
            "prefix_bytes": limits.prefix_bytes,
        },
    }


def _authority(pem: bytes) -> dict[str, Any]:
    return {"sha256": certificates.fingerprint(pem), "expires": statuses.rfc3339(certificates.period_s(pem)[1] * 1000)}


def _certificate(role: SecondaryRole) -> dict[str, Any]:
    if not role.attached:
        return {}
    pem = role.certificate_pem
    return {
        "certificate": {
            **_authority(pem),
            "renewal_due": statuses.rfc3339(int(renewal_due_s(pem)) * 1000),
            "trusted_authorities": [certificates.fingerprint(one) for one in certificates.each(role.authority_pem)],
        }
    }


def _lost(manager: ModeManager) -> dict[str, Any]:
    return {"lost_writes": [summary(head) for head in manager.lost_heads]} if manager.lost_heads else {}


def _primary(manager: ModeManager, role: PrimaryRole, index: statuses.IndexFacts) -> dict[str, Any]:
    service = manager.primary
    peers = service.shipper.peers if service is not None else {}
    return statuses.primary_status(
        statuses.PrimaryFacts(
            mode=manager.mode.name,
            set_id=role.set_id,
            epoch_number=role.epoch.number,
            epoch_id=role.epoch.id,
            primary_cluster_addr=role.primary_cluster_addr,
            known_secondaries=sorted(role.secondaries),
            secondaries=[
                _peer(manager, id_, peers[id_])
                for id_ in sorted(role.secondaries)
                if id_ in peers and peers[id_].heard_at_s is not None
            ],
            head_index=manager.store.head.index,
            merkle_root=_root_hex(manager),
            running=service is not None and service.serving.is_set(),
            forks=_forks(manager),
            index=index,
        )
    )


def _forks(manager: ModeManager) -> list[tuple[str, str]]:
    """Who is on another branch of the set's history, as far as anybody of them was heard of; and why."""
    found = sorted(manager.primary.shipper.forks.items()) if manager.primary is not None else []
    former = manager.former
    return [*found, ("", former.sighted)] if former is not None and former.sighted else found


def _heard_lately(manager: ModeManager, heard_at_s: float | None) -> bool:
    """Whether that is recent enough to call the peer connected."""
    silence_s = max(SILENT_BEATS * manager.options.beat_s, SILENCE_MIN_S)
    return heard_at_s is not None and manager.clock.monotonic() - heard_at_s <= silence_s


def _peer(manager: ModeManager, id_: str, peer: Peer) -> statuses.SecondaryFacts:
    clock = manager.clock
    lag_s = peer.lag_s(clock.monotonic())
    return statuses.SecondaryFacts(
        id_,
        acked_index=peer.applied,
        heartbeats=statuses.Heartbeats(
            connected=peer.connected and _heard_lately(manager, peer.heard_at_s),
            api_addr=peer.advertised.api_addr,
            cluster_addr=next(iter(peer.advertised.cluster_addrs), ""),
            last_ms=_heard_ms(clock, peer.heard_at_s),
            duration_ms=peer.round_trip_ms,
            clock_skew_ms=peer.skew_ms,
            canary_age_ms=None if lag_s is None else int(lag_s * 1000),
        ),
    )


def _secondary(manager: ModeManager, role: SecondaryRole, index: statuses.IndexFacts) -> dict[str, Any]:
    service, clock = manager.secondary, manager.clock
    position = stored_position(manager.store, manager.mode)
    facts = statuses.SecondaryStatusFacts(
        set_id=role.set_id,
        epoch_number=role.epoch.number,
        epoch_id=role.epoch.id,
        secondary_id=role.secondary_id,
        primary_cluster_addr=role.primary_cluster_addr,
        known_addresses=role.dial_order,
        state="idle",
        connection_state="idle",
        last_remote_wal=position.index if position else 0,
        last_wal=manager.store.head.index,
        merkle_root=_root_hex(manager),
        started_ms=clock.time_ms(),
        index=index,
    )
    if service is None:
        return statuses.secondary_status(facts)
    applied, upstream = service.applier.position, service.applier.upstream
    lag_s = service.applier.lag_s()
    silent = upstream.connected and not _heard_lately(manager, upstream.heard_at_s)
    beats = statuses.Heartbeats(
        connected=upstream.connected and not silent,
        api_addr=upstream.advertised.api_addr or role.primary_api_addr,
        cluster_addr=service.connected_to or role.primary_cluster_addr,
        last_ms=_heard_ms(clock, upstream.heard_at_s),
        duration_ms=upstream.round_trip_ms,
        clock_skew_ms=upstream.skew_ms,
        canary_age_ms=None if lag_s is None else int(lag_s * 1000),
    )
    return statuses.secondary_status(
        replace(
            facts,
            state=service.state,
            connection_state="transient_failure" if silent else service.connection_state,
            started_ms=service.started_ms,
            last_remote_wal=applied.index if applied else 0,
            reason=service.machine.reason,
            alarm=service.machine.alarm,
            lag_s=lag_s,
            last_sync=service.last_sync,
            sync_progress=service.sync_progress,
            shrink=service.shrink,
            primary=beats if role.attached and upstream.heard_at_s is not None else None,
        )
    )


def _root_hex(manager: ModeManager) -> str:
    try:
        role = manager.role
        selection = role.selection if isinstance(role, SecondaryRole) else EVERYTHING
        return Shipped(manager.store.forest, manager.mode.classes, selection).root().hex()
    except NotLoaded:
        return ""


def _heard_ms(clock: Clock, heard_at_s: float | None) -> int:
    if heard_at_s is None:
        return 0
    return clock.time_ms() - int((clock.monotonic() - heard_at_s) * 1000)
