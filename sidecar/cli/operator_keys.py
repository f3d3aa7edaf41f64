"""``outrider operator``: what the holders of key shares do, the data keys, and the members of the cluster."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from typing import Any

from sidecar.cli import output
from sidecar.cli.client import Client
from sidecar.cli.command import EXIT_OK, EXIT_SERVER, Call, Command, Failed, doing
from sidecar.cli.flags import Flag, UsageError
from sidecar.cli.pgp_files import read_key, read_keys

Body = Mapping[str, Any]
_BASE62 = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"

DR_TOKEN_PATH = "sys/replication/dr/secondary/generate-operation-token"  # noqa: S105 - a path

REKEYED = """
The unseal key was replaced: the {shares} key shares above, of which {threshold} are needed, replace all
shares of before. Give each to another person; lost shares cannot be brought back."""
UNVERIFIED = """
The key shares above are NOT in force yet. Give {threshold} of them back, one a call, with
"outrider operator rekey -verify -nonce={nonce}"; until then the old shares count."""


# ---- rekey


def rekey(call: Call) -> int:
    call.at_most(1)
    verifying = call.values.flag("verify")
    client = call.client(token="")
    what = _only_one(call, "init", "status", "cancel", "backup-retrieve", "backup-delete")
    prefix = _rekey_prefix(call)
    if what.startswith("backup"):
        return _rekey_backup(call, what, recovery=prefix != "sys/rekey")
    path = f"{prefix}/verify" if verifying else f"{prefix}/init"
    if what == "init":
        return _show_rekey(call, _start_rekey(call, client, path))
    if call.values.flag("cancel"):
        nonce = call.values.text("nonce")
        with doing("canceling rekey"):
            _canceller(call, nonce).call("DELETE", path, body={"nonce": nonce} if nonce else None, has_body=bool(nonce))
        call.say("Success! Canceled rekeying (if it was started)")
        return EXIT_OK
    with doing("getting rekey status"):
        state = client.get(path).body or {}
    if call.values.flag("status"):
        return _show_rekey(call, state)
    if not state.get("started"):
        raise Failed("No rekey is in progress; start one with -init", EXIT_SERVER)
    request = {"key": _share(call), "nonce": call.values.text("nonce") or state.get("nonce", "")}
    with doing("posting unseal key"):
        body = client.put(f"{prefix}/verify" if verifying else f"{prefix}/update", request).body or {}
    call.warn_of(body)
    if not body.get("complete"):
        return _show_rekey(call, body)
    if verifying:
        return call.show_value(body, "Success! Rekey verified: the new key shares are in force.")
    return call.show_value(body, _new_keys(body, state))


def _rekey_prefix(call: Call) -> str:
    target = call.values.text("target", "barrier")
    prefixes = {"barrier": "sys/rekey", "recovery": "sys/rekey-recovery-key"}
    if target not in prefixes:
        raise UsageError("-target must be barrier or recovery")
    return prefixes[target]


def _start_rekey(call: Call, client: Client, path: str) -> Body:
    request: dict[str, Any] = {
        "secret_shares": call.values.integer("key-shares", 5),
        "secret_threshold": call.values.integer("key-threshold", 3),
        "require_verification": call.values.flag("require-verification"),
    }
    if files := call.values.text("pgp-keys"):
        request |= {"pgp_keys": read_keys(files), "backup": call.values.flag("backup")}
    with doing("initializing rekey"):
        return client.put(path, request).body or {}


def _rekey_backup(call: Call, what: str, *, recovery: bool) -> int:
    client = call.client()
    path = "sys/rekey/recovery-key-backup" if recovery else "sys/rekey/backup"
    if what == "backup-delete":
        with doing("deleting backed-up keys"):
            client.delete(path)
        call.say("Success! Delete backed-up keys (if they existed)")
        return EXIT_OK
    with doing("reading backed-up keys"):
        data = (client.get(path).body or {}).get("data") or {}
    rows = [(name, key) for name, found in (data.get("keys_base64") or {}).items() for key in found]
    return call.show_value(data, output.pairs([("Nonce", data.get("nonce", "")), *rows]))


def _show_rekey(call: Call, body: Body) -> int:
    started = bool(body.get("started"))
    rows = [("Nonce", body.get("nonce", "")), ("Started", started)]
    if started:
        needed = body.get("required", body.get("t", 0))
        rows += [
            ("Rekey Progress", f"{body.get('progress', 0)}/{needed}"),
            ("New Shares", body.get("n", 0)),
            ("New Threshold", body.get("t", 0)),
        ]
    if started and "verification_required" in body:
        rows.append(("Verification Required", bool(body["verification_required"])))
    if body.get("verification_nonce"):
        rows.append(("Verification Nonce", body["verification_nonce"]))
    return call.show_value(body, output.pairs(rows))


def _new_keys(body: Body, state: Body) -> str:
    keys = body.get("keys_base64") or []
    lines = [f"Key {number}: {key}" for number, key in enumerate(keys, start=1)]
    lines += ["", f"Operation nonce: {body.get('nonce', '')}"]
    if body.get("verification_required"):
        lines.append(UNVERIFIED.format(threshold=state.get("t", 0), nonce=body.get("verification_nonce", "")))
    else:
        lines.append(REKEYED.format(shares=len(keys), threshold=state.get("t", 0)))
    return "\n".join(lines)


# ---- generate-root


def _canceller(call: Call, nonce: str) -> Client:
    """With the user's token, if there is one, where no nonce shows whose ceremony it is."""
    return call.client(token="" if nonce else None)


def generate_root(call: Call) -> int:
    call.at_most(1)
    what = _only_one(call, "init", "status", "cancel", "generate-otp", "decode")
    if what == "decode":
        token = decode_token(call.values.text("decode"), call.values.text("otp"))
        return call.show_value({"token": token}, token)
    client = call.client(token="")
    base = DR_TOKEN_PATH if call.values.flag("dr-token") else "sys/generate-root"
    if what == "cancel":
        nonce = call.values.text("nonce")
        with doing("canceling root token generation"):
            _canceller(call, nonce).call(
                "DELETE", f"{base}/attempt", body={"nonce": nonce} if nonce else None, has_body=bool(nonce)
            )
        call.say("Success! Root token generation canceled (if it was started)")
        return EXIT_OK
    if what == "init":
        otp, pgp_file = call.values.text("otp"), call.values.text("pgp-key")
        request = {"otp": otp} if otp else {}
        if pgp_file:
            request["pgp_key"] = read_key(pgp_file)
        with doing("initializing root generation"):
            return _show_generation(call, client.put(f"{base}/attempt", request).body or {})
    with doing("getting root generation status"):
        state = client.get(f"{base}/attempt").body or {}
    if what == "generate-otp":
        otp = _otp(int(state.get("otp_length") or 0))
        return call.show_value({"otp": otp}, otp)
    if what == "status":
        return _show_generation(call, state)
    if not state.get("started"):
        raise Failed("No root generation is in progress; start one with -init", EXIT_SERVER)
    request = {"key": _share(call), "nonce": call.values.text("nonce") or state.get("nonce", "")}
    with doing("posting unseal key"):
        return _show_generation(call, client.put(f"{base}/update", request).body or {})


def _show_generation(call: Call, body: Body) -> int:
    rows = [
        ("Nonce", body.get("nonce", "")),
        ("Started", bool(body.get("started"))),
        ("Progress", f"{body.get('progress', 0)}/{body.get('required', 0)}"),
        ("Complete", bool(body.get("complete"))),
    ]
    for name, key in (
        ("OTP", "otp"),
        ("OTP Length", "otp_length"),
        ("Encoded Token", "encoded_token"),
        ("PGP Fingerprint", "pgp_fingerprint"),
    ):
        if body.get(key):
            rows.append((name, body[key]))
    return call.show_value(body, output.pairs(rows))


def decode_token(encoded: str, otp: str) -> str:
    """The token that ``encoded`` hides under ``otp``. Raises UsageError, which repeats neither."""
    if not otp:
        raise UsageError("-decode needs -otp")
    try:
        raw = base64.b64decode(encoded + "=" * (-len(encoded) % 4), validate=True)
        if len(raw) != len(otp.encode()):
            raise UsageError("the encoded token and the OTP are not of one length")
        return bytes(left ^ right for left, right in zip(raw, otp.encode(), strict=True)).decode()
    except (binascii.Error, ValueError) as error:
        raise UsageError("the encoded token cannot be decoded with this OTP") from error


def _otp(length: int) -> str:
    import secrets  # slow to load

    return "".join(secrets.choice(_BASE62) for _ in range(length))


# ---- data keys and members


def key_status(call: Call) -> int:
    call.at_most(0)
    client = call.client()
    with doing("reading key status"):
        body = client.get("sys/key-status").body or {}
    return _show_key(call, body)


def rotate(call: Call) -> int:
    call.at_most(0)
    client = call.client()
    with doing("rotating key"):
        client.put("sys/rotate")
    with doing("reading key status"):
        body = client.get("sys/key-status").body or {}
    if call.format == "table":
        call.say("Success! Rotated key\n")
    return _show_key(call, body)


def _show_key(call: Call, body: Body) -> int:
    data = body.get("data") or body
    rows = [
        ("Key Term", data.get("term", 0)),
        ("Install Time", data.get("install_time", "")),
        ("Encryption Count", data.get("encryptions", 0)),
    ]
    return call.show_value(data, output.pairs(rows))


def members(call: Call) -> int:
    call.at_most(0)
    client = call.client()
    with doing("listing members"):
        body = client.get("sys/ha-status").body or {}
    data = body.get("data") or {}
    nodes = data.get("nodes") or data.get("Nodes") or []
    header = ("Host Name", "API Address", "Cluster Address", "Active Node", "Version", "Last Echo")
    names = ("hostname", "api_address", "cluster_address", "active_node", "version", "last_echo")
    rows = [["" if node.get(name) is None else node[name] for name in names] for node in nodes]
    return call.show_value({"nodes": nodes}, output.table(header, rows))


def _share(call: Call) -> str:
    given = call.arguments[0] if call.arguments else "-"
    key = (call.hidden("Unseal Key (will be hidden): ") if given == "-" else given).strip()
    if not key:
        raise UsageError("the unseal key is empty")
    return key


def _only_one(call: Call, *flags: str) -> str:
    """Which of these flags is given; none is empty. Raises UsageError for two."""
    given = [flag for flag in flags if call.values.text(flag) not in ("", "false")]
    if len(given) > 1:
        raise UsageError(f"-{given[0]} and -{given[1]} cannot be given together")
    return given[0] if given else ""


NONCE_FLAG = Flag("nonce", "Nonce of the operation; the one under way without it.")
REKEY = Command(
    "operator rekey [flags] [KEY]",
    "Replace the unseal key by a new one in new shares: start with -init, then give a threshold of the old\n"
    "  shares, one a call. Without KEY it is asked for, hidden; - reads it from standard input.",
    rekey,
    (
        Flag("init", "Start.", "bool"),
        Flag("cancel", "Forget a rekey, or with -verify what was given back of the new shares.", "bool"),
        Flag("status", "Show how far it is.", "bool"),
        Flag("key-shares", "Number of new shares.", "int", "5", aliases=("n",)),
        Flag("key-threshold", "Number of new shares that unseal.", "int", "3", aliases=("t",)),
        Flag("require-verification", "With -init: the new shares count only once they were given back.", "bool"),
        Flag("verify", "Give back one of the new shares.", "bool"),
        Flag("target", "barrier, or recovery: with an auto seal, the recovery shares.", default="barrier"),
        Flag("pgp-keys", "With -init: files with a PGP key for each new share, with commas."),
        Flag("backup", "With -init and -pgp-keys: the server keeps the encrypted shares.", "bool"),
        Flag("backup-retrieve", "Show what the server has kept.", "bool"),
        Flag("backup-delete", "Delete it.", "bool"),
        NONCE_FLAG,
    ),
)
GENERATE_ROOT = Command(
    "operator generate-root [flags] [KEY]",
    "Make a root token from key shares: start with -init, then give a threshold of the shares, one a call,\n"
    "  and decode the result with -decode and -otp.",
    generate_root,
    (
        Flag("init", "Start. The answer shows the one-time password that hides the token.", "bool"),
        Flag("cancel", "Forget the attempt; within its first ten minutes this needs -nonce, or a token.", "bool"),
        Flag("status", "Show how far it is.", "bool"),
        Flag("generate-otp", "Print a password for -init -otp.", "bool"),
        Flag("decode", "The encoded token to decode; needs -otp."),
        Flag("otp", "The one-time password."),
        Flag("dr-token", "Make a DR operation token, on a DR secondary, instead of a root token.", "bool"),
        Flag("pgp-key", "With -init: file with the PGP key that the token is encrypted for."),
        NONCE_FLAG,
    ),
)
KEY_STATUS = Command("operator key-status [flags]", "Show the data key that encrypts now.", key_status)
ROTATE = Command("operator rotate [flags]", "Use a fresh data key from now on; old ones go on decrypting.", rotate)
MEMBERS = Command("operator members [flags]", "List the nodes of the cluster.", members)
