"""``outrider operator``: init, unseal, seal and step-down."""

from __future__ import annotations

from typing import Any

from sidecar.cli.command import EXIT_LOCAL, EXIT_OK, EXIT_SERVER, Call, Command, doing
from sidecar.cli.flags import Flag, UsageError
from sidecar.cli.pgp_files import read_key, read_keys
from sidecar.cli.status import show_seal_status

DISTRIBUTE = """
Outrider initialized with {shares} key shares and a key threshold of {threshold}. Give each share
to another person. After each start and each seal, {threshold} of them unseal the node again.
Nobody can make the root key from fewer than {threshold}; lost shares cannot be brought back."""
DISTRIBUTE_RECOVERY = """
Outrider initialized with {shares} recovery shares and a threshold of {threshold}. Nodes unseal themselves.
Give each share to another person: {threshold} of them make a root token, change the seal, and unseal a
node whose auto seal is lost. Lost shares cannot be brought back."""


def init(call: Call) -> int:
    call.at_most(0)
    client = call.client(token="")
    if call.values.flag("status"):
        with doing("checking init status", EXIT_LOCAL):
            initialized = bool((client.get("sys/init").body or {}).get("initialized"))
        call.show_value({"initialized": initialized}, f"Outrider is {'' if initialized else 'not '}initialized")
        return EXIT_OK if initialized else EXIT_SERVER
    with doing("checking seal status"):
        recovery = bool((client.get("sys/seal-status").body or {}).get("recovery_seal"))
    kind, other = ("recovery", "key") if recovery else ("key", "recovery")
    for flag in (f"{other}-shares", f"{other}-threshold"):
        if flag in call.values:
            call.complain(
                f"WARNING! -{flag} is ignored: this server {'unseals itself' if recovery else 'has no auto seal'}"
            )
    shares, threshold = call.values.integer(f"{kind}-shares", 5), call.values.integer(f"{kind}-threshold", 3)
    with doing("initializing"):
        body = client.put("sys/init", _init_request(call, recovery, shares, threshold)).body or {}
    call.show_value(_init_json(body, recovery, shares, threshold), _init_text(body, recovery, shares, threshold))
    return EXIT_OK


def _init_request(call: Call, recovery: bool, shares: int, threshold: int) -> dict[str, Any]:
    kind, keys = ("recovery", "recovery_pgp_keys") if recovery else ("secret", "pgp_keys")
    request: dict[str, Any] = {f"{kind}_shares": shares, f"{kind}_threshold": threshold}
    if files := call.values.text(keys.replace("_", "-")):
        request[keys] = read_keys(files)
    if file := call.values.text("root-token-pgp-key"):
        request["root_token_pgp_key"] = read_key(file)
    return request


def _init_json(body: dict[str, Any], recovery: bool, shares: int, threshold: int) -> dict[str, Any]:
    return {
        "unseal_keys_b64": body.get("keys_base64") or [],
        "unseal_keys_hex": body.get("keys") or [],
        "unseal_shares": 1 if recovery else shares,
        "unseal_threshold": 1 if recovery else threshold,
        "recovery_keys_b64": body.get("recovery_keys_base64") or [],
        "recovery_keys_hex": body.get("recovery_keys") or [],
        "recovery_keys_shares": shares if recovery else 0,
        "recovery_keys_threshold": threshold if recovery else 0,
        "root_token": body.get("root_token", ""),
    }


def _init_text(body: dict[str, Any], recovery: bool, shares: int, threshold: int) -> str:
    name, keys = ("Recovery", body.get("recovery_keys_base64")) if recovery else ("Unseal", body.get("keys_base64"))
    lines = [f"{name} Key {number}: {key}" for number, key in enumerate(keys or [], start=1)]
    lines += ["", f"Initial Root Token: {body.get('root_token', '')}"]
    lines.append((DISTRIBUTE_RECOVERY if recovery else DISTRIBUTE).format(shares=shares, threshold=threshold))
    return "\n".join(lines)


def unseal(call: Call) -> int:
    call.at_most(1)
    request: dict[str, Any]
    if call.values.flag("reset"):
        request = {"reset": True}
    else:
        given = call.arguments[0] if call.arguments else "-"
        key = (call.hidden("Unseal Key (will be hidden): ") if given == "-" else given).strip()
        if not key:
            raise UsageError("the unseal key is empty")
        request = {"key": key, **({"migrate": True} if call.values.flag("migrate") else {})}
    client = call.client(token="")
    with doing("unsealing"):
        body = client.put("sys/unseal", request).body or {}
    show_seal_status(call, body, {})
    return EXIT_OK


def seal(call: Call) -> int:
    call.at_most(0)
    client = call.client()
    with doing("sealing"):
        client.put("sys/seal")
    call.say("Success! Outrider is sealed.")
    return EXIT_OK


def step_down(call: Call) -> int:
    call.at_most(0)
    client = call.client()
    with doing("stepping down"):
        client.put("sys/step-down")
    call.say(f"Success! Stepped down: {client.address}")
    return EXIT_OK


INIT = Command(
    "operator init [flags]",
    "Make the keys and the root token of a new cluster. They are shown once.",
    init,
    (
        Flag("key-shares", "Number of shares the unseal key is split into.", "int", "5", aliases=("n",)),
        Flag("key-threshold", "Number of shares that unseal.", "int", "3", aliases=("t",)),
        Flag("pgp-keys", "Files with a PGP key for each share, with commas; each share is encrypted for one."),
        Flag("recovery-shares", "With an auto seal: number of recovery shares.", "int", "5"),
        Flag("recovery-threshold", "With an auto seal: how many of them are needed.", "int", "3"),
        Flag("recovery-pgp-keys", "With an auto seal: files with a PGP key for each recovery share."),
        Flag("root-token-pgp-key", "File with the PGP key that the root token is encrypted for."),
        Flag("status", "Only say whether it is initialised: exit code 0 yes, 2 no, 1 error.", "bool"),
    ),
)
UNSEAL = Command(
    "operator unseal [flags] [KEY]",
    "Give one share of the unseal key. Without KEY it is asked for, hidden; - reads it from standard input.",
    unseal,
    (
        Flag("reset", "Forget the shares given so far.", "bool"),
        Flag("migrate", "Give the share so that the configured seal replaces the cluster's.", "bool"),
    ),
)
SEAL = Command("operator seal [flags]", "Seal a node: it forgets its keys and answers nothing.", seal, formats=False)
STEP_DOWN = Command(
    "operator step-down [flags]", "Make the active node hand over to a standby.", step_down, formats=False
)
