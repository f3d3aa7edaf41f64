"""The parameters of the routes about keys, leases and replication, by template, for :func:`declared`.

What a route declares itself stands. A template that no route has is a mistake, which the tests find.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from plugin_api.framework import FieldSpec
from plugin_api.request import Operation
from sidecar.request.route_table import BOOL, DURATION, INT, LIST, STRING, Route, in_query, takes

_NONE: dict[str, FieldSpec] = {}
_LEASE = takes(lease_id=STRING, url_lease_id=STRING, increment=DURATION, sync=BOOL)
_LISTING = takes(type=STRING, include_child_namespaces=STRING, limit=STRING)
_OPERATION = takes(dr_operation_token=STRING)
_PROMOTION = takes(primary_cluster_addr=STRING, force=BOOL, preview=BOOL)
_UPDATE = takes(token=STRING, primary_api_addr=STRING, ca_file=STRING, ca_path=STRING, update_primary_addrs=LIST)
_REINDEX = takes(diff=BOOL, force=BOOL, skip_flush=BOOL, deletions=INT)
_SHARE = takes(key=STRING, nonce=STRING)
_ATTEMPT = takes(otp=STRING, pgp_key=STRING) | {"nonce": in_query(STRING, Operation.DELETE)}
_FILTER = takes(mode=STRING, paths=LIST)
_REKEY = takes(
    secret_shares=INT,
    secret_threshold=INT,
    stored_shares=INT,
    pgp_keys=LIST,
    backup=BOOL,
    require_verification=BOOL,
) | {"nonce": in_query(STRING, Operation.DELETE)}

_REKEY_STEPS = ("init", "update", "verify")

# Their answers have a body of their own.
_RAW = ("generate-root/", *(f"rekey{kind}/{step}" for kind in ("", "-recovery-key") for step in _REKEY_STEPS))
# Template: (help, parameters).
_TABLE: dict[str, tuple[str, dict[str, FieldSpec]]] = {
    "seal": ("Seal this node.", _NONE),
    "step-down": ("Give up leadership.", _NONE),
    "key-status": ("The active encryption key.", _NONE),
    "rotate": ("Use a fresh encryption key from now on.", _NONE),
    "rotate/config": (
        "When a fresh key is used by itself.",
        takes(enabled=BOOL, interval=DURATION, max_operations=INT),
    ),
    "generate-root/attempt": ("A root token from key shares.", _ATTEMPT),
    "generate-root/update": ("One share for a root token.", _SHARE),
    "rekey/init": ("New key shares.", _REKEY),
    "rekey/update": ("One old share for new ones.", _SHARE),
    "rekey/verify": ("One new share, to prove that they arrived.", _SHARE),
    "rekey/backup": ("New shares that were kept encrypted.", _NONE),
    "rekey/recovery-key-backup": ("New recovery shares that were kept encrypted.", _NONE),
    "rekey-recovery-key/init": ("New recovery shares.", _REKEY),
    "rekey-recovery-key/update": ("One old recovery share for new ones.", _SHARE),
    "rekey-recovery-key/verify": ("One new recovery share, to prove that they arrived.", _SHARE),
    "rekey-recovery-key/backup": ("New recovery shares that were kept encrypted.", _NONE),
    "leases": ("Leases that could not be revoked.", _LISTING),
    "leases/count": ("How many leases could not be revoked.", _LISTING),
    "leases/lookup": ("What is known of a lease; all lease ids.", _LEASE),
    "leases/lookup/{prefix*}": ("Lease ids below a prefix.", _NONE),
    "leases/tidy": ("Look for leases whose token is gone.", _NONE),
    "locked-users": ("Users that are locked out.", takes(mount_accessor=STRING)),
    "locked-users/{mount_accessor}/unlock/{alias_identifier*}": ("Let a user log in again.", _NONE),
    "replication/status": ("Status of both modes.", _NONE),
    "replication/{mode}/status": ("Status of one mode.", _NONE),
    "replication/merkle-check": ("Compare the index with the data.", _NONE),
    "replication/reindex": ("Make the index anew.", _REINDEX),
    "replication/recover": ("Try to go on after a fault.", takes(force=BOOL)),
    "replication/{mode}/lost-writes": ("Records of writes that a promotion lost.", _NONE),
    "replication/{mode}/lost-writes/{id}": ("One record of lost writes.", takes(page=STRING)),
    "replication/{mode}/lost-writes/{id}/export": ("What the lost writes held.", takes(page=STRING)),
    "replication/performance/primary/paths-filter/{id}": ("What one secondary is not sent.", _FILTER),
    "replication/performance/primary/mount-filter/{id}": (
        "What one secondary is not sent, by its older name.",
        _FILTER,
    ),
    "replication/performance/{kind}/dynamic-filter/{id}": ("What a filter comes to at this moment.", _NONE),
    "replication/performance/not-held": ("Mounts whose data is not here.", _NONE),
    "replication/performance/not-held/accept-empty": (
        "Take mounts whose data is not here as empty.",
        takes(paths=LIST),
    ),
    "replication/dr/secondary/operation-token/delete": ("Take a DR operation token back.", _OPERATION),
}
for _folder in ("", "leases/"):
    _TABLE |= {
        f"{_folder}renew": ("Let a secret live longer.", _LEASE),
        f"{_folder}renew/{{lease_id*}}": ("Let a secret live longer.", _LEASE),
        f"{_folder}revoke": ("Revoke a lease.", _LEASE),
        f"{_folder}revoke/{{lease_id*}}": ("Revoke a lease.", _LEASE),
        f"{_folder}revoke-prefix/{{prefix*}}": ("Revoke all leases below a prefix.", takes(sync=BOOL)),
        f"{_folder}revoke-force/{{prefix*}}": ("Forget leases that cannot be revoked.", _NONE),
    }
_ACTIONS: dict[str, tuple[str, dict[str, FieldSpec]]] = {
    "primary/enable": ("Become a primary.", takes(primary_cluster_addr=STRING)),
    "primary/demote": ("Become a secondary without a primary.", _NONE),
    "primary/disable": ("Stop being a primary.", _NONE),
    "primary/secondary-token": (
        "A token that activates a secondary.",
        takes(id=STRING, ttl=DURATION, secondary_public_key=STRING),
    ),
    "primary/revoke-secondary": ("Cut a secondary off.", takes(id=STRING)),
    "primary/rotate-ca": ("Replace the certificate authority.", takes(overlap=DURATION, force=BOOL)),
    "secondary/enable": (
        "Become a secondary.",
        takes(token=STRING, primary_api_addr=STRING, ca_file=STRING, ca_path=STRING, preflight=BOOL),
    ),
    "secondary/generate-public-key": ("A key that an activation token can be encrypted to.", _OPERATION),
    "secondary/promote": ("Become the primary.", _PROMOTION),
    "secondary/disable": ("Stop being a secondary.", _NONE),
    "secondary/update-primary": ("Follow another primary.", _UPDATE),
    "secondary/accept-deletions": ("Let a comparison delete what the brake stopped.", takes(deletions=INT)),
}
# On a DR secondary these are run by whoever has a DR operation token; everywhere else they say what the mode is.
_ON_A_DR_SECONDARY: dict[str, dict[str, FieldSpec]] = {
    "promote": _PROMOTION | _OPERATION,
    "disable": _OPERATION,
    "update-primary": _UPDATE | _OPERATION,
    "recover": _OPERATION,
    "reindex": _OPERATION | _REINDEX,
    "merkle-check": _OPERATION,
    "accept-deletions": _OPERATION | takes(deletions=INT),
    "generate-operation-token/attempt": _ATTEMPT,
    "generate-operation-token/update": _SHARE,
}
for _action, _fields in _ON_A_DR_SECONDARY.items():
    _TABLE[f"replication/dr/secondary/{_action}"] = ("For a DR secondary.", _fields)
for _path, _row in _ACTIONS.items():
    _TABLE[f"replication/{_path}"] = _TABLE[f"replication/{{mode}}/{_path}"] = _row

TEMPLATES = frozenset(_TABLE)


def declared(routes: Iterable[Route]) -> list[Route]:
    """``routes``, with what the table knows where they say nothing."""
    return [_declared(route) for route in routes]


def _declared(route: Route) -> Route:
    row = _TABLE.get(route.template)
    if route.fields is not None or row is None:
        return route
    return replace(route, help=route.help or row[0], fields=row[1], raw=route.raw or route.template.startswith(_RAW))
