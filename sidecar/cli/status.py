"""``outrider status``: exit code 0 unsealed, 2 sealed or not initialised, 1 error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sidecar.cli import output
from sidecar.cli.client import ApiError
from sidecar.cli.command import EXIT_LOCAL, EXIT_OK, EXIT_SERVER, Call, Command, doing

Rows = list[tuple[str, Any]]


def run(call: Call) -> int:
    call.at_most(0)
    client = call.client(token="")
    with doing("checking seal status", EXIT_LOCAL):
        seal = client.get("sys/seal-status").body or {}
    leader = {} if seal.get("sealed", True) else _leader(client)
    show_seal_status(call, seal, leader)
    return EXIT_SERVER if seal.get("sealed", True) else EXIT_OK


def _leader(client: Any) -> dict[str, Any]:
    with doing("checking leader status", EXIT_LOCAL):
        try:
            return client.get("sys/leader").body or {}
        except ApiError as error:
            if error.status == 503:  # sealed between the two calls
                return {}
            raise


def show_seal_status(call: Call, seal: Mapping[str, Any], leader: Mapping[str, Any]) -> None:
    """Print both answers as one."""
    call.show_value({**seal, **leader}, output.pairs([*_seal_rows(seal), *_leader_rows(seal, leader)]))


def _seal_rows(seal: Mapping[str, Any]) -> Rows:
    sealed = bool(seal.get("sealed", True))
    rows: Rows = [
        *([("Recovery Seal Type", seal["recovery_seal_type"])] if seal.get("recovery_seal_type") else []),
        ("Seal Type", seal.get("type", "")),
        ("Initialized", bool(seal.get("initialized"))),
        ("Sealed", sealed),
        ("Total Recovery Shares" if seal.get("recovery_seal") else "Total Shares", seal.get("n", 0)),
        ("Threshold", seal.get("t", 0)),
    ]
    if sealed:
        rows.append(("Unseal Progress", f"{seal.get('progress', 0)}/{seal.get('t', 0)}"))
        rows.append(("Unseal Nonce", seal.get("nonce", "")))
    if seal.get("migration"):
        rows.append(("Seal Migration in Progress", True))
    rows.extend(("Warning", text) for text in seal.get("warnings") or ())
    rows.append(("Version", seal.get("version", "")))
    for name, key in (
        ("Build Date", "build_date"),
        ("Storage Type", "storage_type"),
        ("Cluster Name", "cluster_name"),
        ("Cluster ID", "cluster_id"),
    ):
        if seal.get(key):
            rows.append((name, seal[key]))
    return rows


def _leader_rows(seal: Mapping[str, Any], leader: Mapping[str, Any]) -> Rows:
    if not leader:
        return []
    rows: Rows = [("HA Enabled", bool(leader.get("ha_enabled")))]
    if not leader.get("ha_enabled"):
        return rows
    rows.append(("HA Cluster", leader.get("leader_cluster_address") or "n/a"))
    rows.append(("HA Mode", "active" if leader.get("is_self") else "standby"))
    if leader.get("is_self"):
        rows.append(("Active Since", leader.get("active_time", "")))
    else:
        rows.append(("Active Node Address", leader.get("leader_address") or "<none>"))
    if leader.get("last_wal"):
        rows.append(("Last WAL", leader["last_wal"]))
    return rows


STATUS = Command("status [flags]", "Show whether a node is initialised, sealed and active.", run)
