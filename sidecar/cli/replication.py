"""``outrider replication``: what Vault's users do with raw paths, as verbs; ``-mode`` says for which mode."""

from __future__ import annotations

from typing import Any

from sidecar.cli import output
from sidecar.cli.command import EXIT_OK, EXIT_SERVER, Call, Command, doing
from sidecar.cli.flags import Flag, UsageError

MODES = ("performance", "dr")
DR_TOKEN_VARIABLE = "DR_OPERATION_TOKEN"  # noqa: S105 - a name
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


def _base(call: Call) -> str:
    return f"sys/replication/{_mode(call)}"


def _mode(call: Call) -> str:
    mode = call.values.text("mode", MODES[0])
    if mode not in MODES:
        raise UsageError(f"-mode is {' or '.join(MODES)}")
    return mode


def _secondary(call: Call, action: str, what: str, request: dict[str, Any], *, dr_token: bool = True) -> int:
    """An action on a secondary. A DR secondary knows no token but its own kind, which travels in the body; without
    ``dr_token`` it is sent if it is set, and not asked for."""
    if _mode(call) == "dr" and (dr_token or call.setting(DR_TOKEN_VARIABLE)):
        token = call.setting(DR_TOKEN_VARIABLE) or call.hidden("DR operation token (will be hidden): ").strip()
        request["dr_operation_token"] = token
    return _update(call, f"{_base(call)}/secondary/{action}", what, request)


def _activation_token(call: Call) -> str:
    """From the argument, a file, or typed without echo."""
    token = call.arguments[0].removeprefix("token=") if call.arguments else "-"
    if token == "-":  # noqa: S105 - the sign for standard input
        return call.hidden("Activation token (will be hidden): ").strip()
    if token.startswith("@"):
        from sidecar.cli.values import parse_data

        return str(parse_data([f"token={token}"], call.read_stdin)["token"]).strip()
    return token


def enable_primary(call: Call) -> int:
    call.at_most(0)
    request = {"primary_cluster_addr": call.values.text("primary-cluster-addr")}
    return _update(call, f"{_base(call)}/primary/enable", "enabling the primary", request)


def secondary_token(call: Call) -> int:
    call.at_most(1)
    name = call.values.text("id") or call.path(0, "ID")
    request = {"id": name}
    request.update({key: call.values.text(key) for key in ("ttl",) if key in call.values})
    if "secondary-public-key" in call.values:
        request["secondary_public_key"] = call.values.text("secondary-public-key")
    return _update(call, f"{_base(call)}/primary/secondary-token", "issuing the token", request)


def enable_secondary(call: Call) -> int:
    call.at_most(1)
    request = {"token": _activation_token(call), **_unwrap_options(call)}
    if call.values.flag("preflight"):
        return _preflight(call, request)
    return _update(call, f"{_base(call)}/secondary/enable", "enabling the secondary", request)


def _preflight(call: Call, request: dict[str, Any]) -> int:
    """A table of checks; exit code 2 when one of them failed."""
    client = call.client()
    with doing("checking the activation"):
        reply = client.put(f"{_base(call)}/secondary/enable", {**request, "preflight": True})
    data = (reply.body or {}).get("data") or {}
    rows = [[str(check.get(key, "")) for key in PREFLIGHT_CHECK] for check in data.get("checks") or []]
    call.show_value(data, output.table(PREFLIGHT_CHECK, rows))
    return EXIT_OK if data.get("ready") else EXIT_SERVER


def generate_public_key(call: Call) -> int:
    call.at_most(0)
    return _secondary(call, "generate-public-key", "making a key", {}, dr_token=False)


def rotate_ca(call: Call) -> int:
    call.at_most(0)
    request: dict[str, Any] = {"force": True} if call.values.flag("force") else {}
    if "overlap" in call.values:
        request["overlap"] = call.values.text("overlap")
    return _update(call, f"{_base(call)}/primary/rotate-ca", "rotating the certificate authority", request)


def _unwrap_options(call: Call) -> dict[str, Any]:
    names = ("primary-api-addr", "ca-file", "ca-path")
    return {name.replace("-", "_"): call.values.text(name) for name in names if name in call.values}


def demote(call: Call) -> int:
    call.at_most(0)
    return _update(call, f"{_base(call)}/primary/demote", "demoting the primary", {})


def promote(call: Call) -> int:
    call.at_most(0)
    request: dict[str, Any] = {"force": call.values.flag("force"), "preview": call.values.flag("preview")}
    if "primary-cluster-addr" in call.values:
        request["primary_cluster_addr"] = call.values.text("primary-cluster-addr")
    return _secondary(call, "promote", "promoting the secondary", request)


def update_primary(call: Call) -> int:
    call.at_most(1)
    request: dict[str, Any]
    if call.values.flag("forget"):
        request = {"token": ""}
    elif "addr" in call.values:
        request = {"update_primary_addrs": call.values.texts("addr")}
    else:
        request = {"token": _activation_token(call), **_unwrap_options(call)}
    return _secondary(call, "update-primary", "pointing the secondary at its primary", request)


def accept_deletions(call: Call) -> int:
    call.at_most(1)
    number = call.argument(0, "how many deletions the status says under brake")
    if not number.isdigit() or int(number) < 1:
        raise UsageError("say how many deletions are accepted, as a number")
    return _secondary(call, "accept-deletions", "accepting the deletions", {"deletions": int(number)})


def disable(call: Call) -> int:
    call.at_most(1)
    role = call.argument(0, "primary or secondary")
    if role not in ("primary", "secondary"):
        raise UsageError("say which role to give up: primary or secondary")
    if role == "secondary":
        return _secondary(call, "disable", "disabling the secondary", {})
    return _update(call, f"{_base(call)}/primary/disable", "disabling the primary", {})


def lost_writes(call: Call) -> int:
    call.at_most(1)
    token = call.setting(DR_TOKEN_VARIABLE) if _mode(call) == "dr" else ""
    client = call.client(token=token or None)
    path = f"{_base(call)}/lost-writes"
    if call.arguments:
        path += f"/{call.path(0, 'ID')}" + ("/export" if call.values.flag("export") else "")
    query = {"page": call.values.text("page")} if "page" in call.values else None
    with doing("reading lost writes"):
        reply = client.get(path, query)
    data = (reply.body or {}).get("data") or {}
    rows = data.get("lost_entries") if call.arguments else data.get("lost_writes")
    names = LOST_ENTRY if call.arguments else LOST_RECORD
    shown = [name for name in names if any(name in row for row in rows or [])] or list(names)
    as_table = output.table(shown, [[row.get(name, "") for name in shown] for row in rows or []])
    return call.show_value(data, as_table if rows else "No lost writes.")


def revoke(call: Call) -> int:
    call.at_most(1)
    name = call.values.text("id") or call.path(0, "ID")
    return _update(call, f"{_base(call)}/primary/revoke-secondary", f"revoking {name}", {"id": name})


PREFLIGHT_CHECK = ("check", "result", "seen", "action")
LOST_RECORD = ("id", "first_wal", "last_wal", "records", "entries", "exact", "complete", "pages")
LOST_ENTRY = ("key", "wal", "deleted", "value", "value_withheld", "value_not_kept")

MODE_FLAG = Flag("mode", "Mode of replication: performance or dr.", default="performance")
ADDRESS_FLAG = Flag(
    "primary-cluster-addr", "Cluster address that secondaries connect to, where it is not the node's own."
)
UNWRAP_FLAGS = (
    Flag("primary-api-addr", "API address of the primary, where the token holds none or another one is needed."),
    Flag("ca-file", "PEM file, on the server, with the CA of the primary's API."),
    Flag("ca-path", "Directory, on the server, with such CAs."),
)
WHO_MAY = (
    "\n  A DR secondary wants a DR operation token: it is read from OUTRIDER_DR_OPERATION_TOKEN, or asked for, hidden."
)
ID_FLAG = Flag("id", "Id of the secondary; the same as the argument.")
STATUS = Command("replication status [flags]", "Show roles, positions and connections.", status, field=True)
ENABLE_PRIMARY = Command(
    "replication enable-primary [flags]",
    "Make this cluster the primary of a new replication set.",
    enable_primary,
    (MODE_FLAG, ADDRESS_FLAG),
    field=True,
)
SECONDARY_TOKEN = Command(
    "replication secondary-token [flags] ID",
    "Issue the token that makes another cluster the secondary ID. It works once.",
    secondary_token,
    (
        MODE_FLAG,
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
        MODE_FLAG,
        Flag("preflight", "Only check whether it would work; the token stays unused and nothing changes.", "bool"),
        *UNWRAP_FLAGS,
    ),
    field=True,
)
GENERATE_PUBLIC_KEY = Command(
    "replication generate-public-key [flags]",
    "Make a key on the secondary to be. A token that `secondary-token -secondary-public-key` encrypts to it needs no\n"
    "  way from here to the primary's API, and nobody else can use it.",
    generate_public_key,
    (MODE_FLAG,),
    field=True,
)
ROTATE_CA = Command(
    "replication rotate-ca [flags]",
    "Replace the certificate authority of this primary's set. Secondaries renew their certificates by themselves.",
    rotate_ca,
    (
        MODE_FLAG,
        Flag("overlap", "How long the old authority counts at most, while secondaries renew.", default="168h"),
        Flag("force", "End a rotation that is under way now. Who has not renewed needs a new token.", "bool"),
    ),
    field=True,
)
REVOKE = Command(
    "replication revoke [flags] ID",
    "Cut a secondary off at once; its certificate is never accepted again.",
    revoke,
    (MODE_FLAG, ID_FLAG),
)
DEMOTE = Command(
    "replication demote [flags]",
    "Make this primary a secondary that follows nobody yet. A demoted DR primary serves no client from then on.",
    demote,
    (MODE_FLAG,),
    field=True,
)
PROMOTE = Command(
    "replication promote [flags]",
    "Make this secondary the primary. -preview says what may be lost and changes nothing." + WHO_MAY,
    promote,
    (
        MODE_FLAG,
        Flag("preview", "Only say what may be lost, and what would forbid it.", "bool"),
        Flag("force", "Promote although the primary is alive, or something is known to be missing.", "bool"),
        ADDRESS_FLAG,
    ),
    field=True,
)
UPDATE_PRIMARY = Command(
    "replication update-primary [flags] [TOKEN]",
    "Have this secondary follow another primary of its set. Nothing is wiped; what only this cluster had is kept as\n"
    "  lost writes. Without TOKEN it is asked for, hidden; @file reads it from a file." + WHO_MAY,
    update_primary,
    (
        MODE_FLAG,
        Flag("addr", "Instead of a token: another cluster address of the same primary. Repeatable.", "texts"),
        Flag("forget", "Instead of a token: follow nobody.", "bool"),
        *UNWRAP_FLAGS,
    ),
    field=True,
)
DISABLE = Command(
    "replication disable [flags] primary|secondary",
    "Give up a role. The data stays; whoever is attached to a primary can no longer connect." + WHO_MAY,
    disable,
    (MODE_FLAG,),
    field=True,
)
ACCEPT_DELETIONS = Command(
    "replication accept-deletions [flags] DELETIONS",
    "Let a secondary that its mass-delete brake stopped go on, and delete as many entries as the status says under\n"
    "  brake. Look at the primary first: if it lost its data, this loses it here too." + WHO_MAY,
    accept_deletions,
    (MODE_FLAG,),
    field=True,
)
LOST_WRITES = Command(
    "replication lost-writes [flags] [ID]",
    "List what this cluster held that its new primary never had; with ID the keys of one record.",
    lost_writes,
    (
        MODE_FLAG,
        Flag("export", "Show values too, in base64.", "bool"),
        Flag("page", "Which page of a record.", "int", default="1"),
    ),
)
