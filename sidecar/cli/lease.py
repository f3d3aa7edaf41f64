"""``outrider lease``: look up, renew and revoke leases of secrets."""

from __future__ import annotations

from typing import Any

from sidecar.cli.command import EXIT_OK, Call, Command, doing
from sidecar.cli.flags import Flag, UsageError


def _lease_id(call: Call, what: str = "LEASE_ID") -> str:
    call.at_most(1)
    lease_id = call.arguments[0].strip().strip("/") if call.arguments else ""
    if not lease_id:
        raise UsageError(f"not enough arguments: {what} is missing")
    return lease_id


def lookup(call: Call) -> int:
    lease_id = _lease_id(call)
    client = call.client()
    with doing("looking up lease"):
        return call.show_secret(client.put("sys/leases/lookup", {"lease_id": lease_id}))


def renew(call: Call) -> int:
    request: dict[str, Any] = {"lease_id": _lease_id(call), "increment": call.values.text("increment", "0")}
    client = call.client()
    with doing("renewing lease"):
        return call.show_secret(client.put("sys/leases/renew", request))


def revoke(call: Call) -> int:
    force, prefix, sync = call.values.flag("force"), call.values.flag("prefix"), call.values.flag("sync")
    if force and not prefix:
        raise UsageError("-force can only be given with -prefix")
    lease_id = _lease_id(call, "PREFIX" if prefix else "LEASE_ID")
    client = call.client()
    with doing("revoking lease"):
        if force:
            call.say("Warning! Force-removing leases can cause Vault to become out of sync with\nsecret engines!")
            client.put(f"sys/leases/revoke-force/{lease_id}")
            call.say(f"Success! Force revoked any leases with prefix: {lease_id}")
        elif prefix:
            client.put(f"sys/leases/revoke-prefix/{lease_id}", {"sync": sync})
            call.say(_done(sync, f"any leases with prefix: {lease_id}"))
        else:
            client.put("sys/leases/revoke", {"lease_id": lease_id, "sync": sync})
            call.say(_done(sync, f"lease: {lease_id}"))
    return EXIT_OK


def _done(sync: bool, what: str) -> str:
    return f"Success! Revoked {what}" if sync else "All revocation operations queued successfully!"


LOOKUP = Command("lease lookup [flags] LEASE_ID", "Show when a lease began and ends.", lookup, field=True)
RENEW = Command(
    "lease renew [flags] LEASE_ID",
    "Let a secret live longer.",
    renew,
    (Flag("increment", "How much longer from now on; the server may give less.", aliases=("i",)),),
    field=True,
)
REVOKE = Command(
    "lease revoke [flags] LEASE_ID",
    "Have the secret of a lease taken back, or those of all leases below a prefix.",
    revoke,
    (
        Flag("prefix", "The argument is the beginning of lease ids, by whole segments.", "bool"),
        Flag("force", "With -prefix: forget leases whose secrets cannot be taken back.", "bool", aliases=("f",)),
        Flag("sync", "Wait until it is done.", "bool"),
    ),
    formats=False,
)
