"""``outrider replication``: what Vault's users do with raw paths, as verbs. Performance replication."""

from __future__ import annotations

from typing import Any

from sidecar.cli import output
from sidecar.cli.command import EXIT_OK, Call, Command, doing
from sidecar.cli.flags import Flag

BASE = "sys/replication/performance"
PEER_COLUMNS = (
    ("Id", "node_id"),
    ("Connection", "connection_status"),
    ("Last Heartbeat", "last_heartbeat"),
    ("API Address", "api_address"),
    ("Cluster Address", "cluster_address"),
)


def status(call: Call) -> int:
    call.at_most(0)
    client = call.client()
    with doing("reading the replication status"):
        reply = client.get("sys/replication/status")
    if call.format != "table" or call.values.text("field"):
        return call.show_secret(reply)
    body = reply.body or {}
    call.warn_of(body)
    modes = body.get("data") or {}
    if "mode" in modes:  # a server without replication has one flat answer
        modes = {"replication": modes}
    call.say("\n\n".join(_mode_text(name, state) for name, state in sorted(modes.items(), reverse=True)))
    return EXIT_OK


def _mode_text(name: str, state: dict[str, Any]) -> str:
    peers = {key: state[key] for key in ("secondaries", "primaries") if state.get(key)}
    rows: list[tuple[str, Any]] = []
    for key, value in state.items():
        if key in peers:
            continue
        if isinstance(value, dict):
            rows += [(f"{key}.{inner}", inner_value) for inner, inner_value in value.items()]
        else:
            rows.append((key, value))
    rows.sort(key=lambda row: (row[0] not in ("mode", "state"), row[0]))
    text = f"{output.title(name, [key for key, _ in rows])}\n{output.pairs(rows)}"
    for kind, listed in peers.items():
        header = [title for title, key in PEER_COLUMNS if any(key in peer for peer in listed)]
        keys = [key for _, key in PEER_COLUMNS if any(key in peer for peer in listed)]
        text += f"\n\n{kind}:\n{output.table(header, [[peer.get(key, '') for key in keys] for peer in listed])}"
    return text


def _update(call: Call, path: str, what: str, request: dict[str, Any]) -> int:
    client = call.client()
    with doing(what):
        reply = client.put(path, request)
    if reply.body is None:
        call.say(f"Success! Data written to: {path}")
        return EXIT_OK
    return call.show_secret(reply)


def enable_primary(call: Call) -> int:
    call.at_most(0)
    request = {"primary_cluster_addr": call.values.text("primary-cluster-addr")}
    return _update(call, f"{BASE}/primary/enable", "enabling the primary", request)


def secondary_token(call: Call) -> int:
    call.at_most(1)
    name = call.values.text("id") or call.path(0, "ID")
    request = {"id": name}
    request.update({key: call.values.text(key) for key in ("ttl",) if key in call.values})
    if "secondary-public-key" in call.values:
        request["secondary_public_key"] = call.values.text("secondary-public-key")
    return _update(call, f"{BASE}/primary/secondary-token", "issuing the token", request)


def enable_secondary(call: Call) -> int:
    call.at_most(1)
    token = call.arguments[0].removeprefix("token=") if call.arguments else "-"
    if token == "-":  # noqa: S105 - the sign for standard input
        token = call.hidden("Activation token (will be hidden): ").strip()
    elif token.startswith("@"):
        from sidecar.cli.values import parse_data

        token = str(parse_data([f"token={token}"], call.read_stdin)["token"]).strip()
    request = {"token": token}
    for flag in ("primary-api-addr", "ca-file", "ca-path"):
        if flag in call.values:
            request[flag.replace("-", "_")] = call.values.text(flag)
    return _update(call, f"{BASE}/secondary/enable", "enabling the secondary", request)


def revoke(call: Call) -> int:
    call.at_most(1)
    name = call.values.text("id") or call.path(0, "ID")
    return _update(call, f"{BASE}/primary/revoke-secondary", f"revoking {name}", {"id": name})


ID_FLAG = Flag("id", "Id of the secondary; the same as the argument.")
STATUS = Command("replication status [flags]", "Show roles, positions and connections.", status, field=True)
ENABLE_PRIMARY = Command(
    "replication enable-primary [flags]",
    "Make this cluster the primary of a new replication set.",
    enable_primary,
    (Flag("primary-cluster-addr", "Cluster address that secondaries connect to, where it is not the node's own."),),
    field=True,
)
SECONDARY_TOKEN = Command(
    "replication secondary-token [flags] ID",
    "Issue the token that makes another cluster the secondary ID. It works once.",
    secondary_token,
    (
        ID_FLAG,
        Flag("ttl", "How long the token can be used.", default="30m"),
        Flag("secondary-public-key", "Encrypt the token to this key of the secondary instead of wrapping it."),
    ),
    field=True,
)
ENABLE_SECONDARY = Command(
    "replication enable-secondary [flags] [TOKEN]",
    "Make this cluster a secondary. EVERYTHING in it is replaced by the primary's, keys included.\n"
    "  Without TOKEN it is asked for, hidden; @file reads it from a file.",
    enable_secondary,
    (
        Flag("primary-api-addr", "API address of the primary, where the token holds none or another one is needed."),
        Flag("ca-file", "PEM file, on the server, with the CA of the primary's API."),
        Flag("ca-path", "Directory, on the server, with such CAs."),
    ),
    field=True,
)
REVOKE = Command(
    "replication revoke [flags] ID",
    "Cut a secondary off at once; its certificate is never accepted again.",
    revoke,
    (ID_FLAG,),
)
