"""``outrider operator``: init, unseal, seal and step-down."""

from __future__ import annotations

from typing import Any

from sidecar.cli.command import EXIT_LOCAL, EXIT_OK, EXIT_SERVER, Call, Command, doing
from sidecar.cli.flags import Flag, UsageError
from sidecar.cli.status import show_seal_status

DISTRIBUTE = """
Outrider initialized with {shares} key shares and a key threshold of {threshold}. Give each share
to another person. After each start and each seal, {threshold} of them unseal the node again.
Nobody can make the root key from fewer than {threshold}; lost shares cannot be brought back."""


def init(call: Call) -> int:
    call.at_most(0)
    client = call.client(token="")
    if call.values.flag("status"):
        with doing("checking init status", EXIT_LOCAL):
            initialized = bool((client.get("sys/init").body or {}).get("initialized"))
        call.show_value({"initialized": initialized}, f"Outrider is {'' if initialized else 'not '}initialized")
        return EXIT_OK if initialized else EXIT_SERVER
    shares, threshold = call.values.integer("key-shares", 5), call.values.integer("key-threshold", 3)
    with doing("initializing"):
        body = client.put("sys/init", {"secret_shares": shares, "secret_threshold": threshold}).body or {}
    call.show_value(_init_json(body, shares, threshold), _init_text(body, shares, threshold))
    return EXIT_OK


def _init_json(body: dict[str, Any], shares: int, threshold: int) -> dict[str, Any]:
    return {
        "unseal_keys_b64": body.get("keys_base64") or [],
        "unseal_keys_hex": body.get("keys") or [],
        "unseal_shares": shares,
        "unseal_threshold": threshold,
        "recovery_keys_b64": body.get("recovery_keys_base64") or [],
        "recovery_keys_hex": body.get("recovery_keys") or [],
        "recovery_keys_shares": 0,
        "recovery_keys_threshold": 0,
        "root_token": body.get("root_token", ""),
    }


def _init_text(body: dict[str, Any], shares: int, threshold: int) -> str:
    keys = body.get("keys_base64") or []
    lines = [f"Unseal Key {number}: {key}" for number, key in enumerate(keys, start=1)]
    lines += ["", f"Initial Root Token: {body.get('root_token', '')}"]
    lines.append(DISTRIBUTE.format(shares=shares, threshold=threshold))
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
        request = {"key": key}
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
        Flag("status", "Only say whether it is initialised: exit code 0 yes, 2 no, 1 error.", "bool"),
    ),
)
UNSEAL = Command(
    "operator unseal [flags] [KEY]",
    "Give one share of the unseal key. Without KEY it is asked for, hidden; - reads it from standard input.",
    unseal,
    (Flag("reset", "Forget the shares given so far.", "bool"),),
)
SEAL = Command("operator seal [flags]", "Seal a node: it forgets its keys and answers nothing.", seal, formats=False)
STEP_DOWN = Command(
    "operator step-down [flags]", "Make the active node hand over to a standby.", step_down, formats=False
)
