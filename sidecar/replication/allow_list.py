"""A primary's allow list: who may connect, and what a secondary may do at which step. Pure.

Functions from the primary's role before to the role after, like those of :mod:`sidecar.replication.roles`.
"""

from __future__ import annotations

import msgspec

from plugin_api.errors import InvalidRequest, PermissionDenied
from sidecar.replication import authorities
from sidecar.replication.history import Epoch
from sidecar.replication.modes import Mode
from sidecar.replication.roles import (
    BOOTSTRAP_GRACE_MS,
    KnownSecondary,
    PrimaryRole,
    Role,
    check_id,
    require_primary,
)
from sidecar.transport import certificates


def add_secondary(
    mode: Mode,
    role: Role,
    secondary_id: str,
    fingerprint: str,
    *,
    now_ms: int,
    ttl_ms: int,
) -> tuple[PrimaryRole, str | None]:
    """The role that knows a new secondary, and the fingerprint that this one replaces, if any.

    An id that never connected may be issued again: the first certificate is void from then on.
    """
    primary = require_primary(mode, role)
    before = primary.secondaries.get(check_id(secondary_id))
    check_new(primary, secondary_id)
    signer = certificates.fingerprint(primary.authority_pem)
    known = KnownSecondary(secondary_id, fingerprint, now_ms, now_ms + ttl_ms, authority=signer)
    after = msgspec.structs.replace(primary, secondaries={**primary.secondaries, secondary_id: known})
    return after, before.fingerprint if before else None


def check_new(primary: PrimaryRole, secondary_id: str) -> None:
    """Raises InvalidRequest for an id that a connected secondary holds."""
    before = primary.secondaries.get(secondary_id)
    if before is not None and before.connected:
        raise InvalidRequest(
            f'a secondary with the id "{secondary_id}" exists already: ids are unique; revoke it to use the id again',
        )


def revoke(mode: Mode, role: Role, secondary_id: str) -> tuple[PrimaryRole, tuple[str, ...]]:
    """The role without that secondary, and the fingerprints to cut: a renewed certificate goes with the one before."""
    primary = require_primary(mode, role)
    known = primary.secondaries.get(check_id(secondary_id))
    if known is None:
        raise InvalidRequest(f'no secondary with the id "{secondary_id}" is known')
    rest = {id_: other for id_, other in primary.secondaries.items() if id_ != secondary_id}
    return msgspec.structs.replace(primary, secondaries=rest), known.fingerprints


def claim_store(
    mode: Mode,
    role: Role,
    fingerprint: str,
    set_id: str,
    epoch: Epoch,
    store_id: str,
    *,
    now_ms: int,
) -> PrimaryRole:
    """At bootstrap: bind the activation to the store that asks. Raises PermissionDenied.

    A second store with the same certificate is refused: a copied bundle is of no use once the real one was used. Nor
    is an old one: an unwrapped bundle is good for :data:`BOOTSTRAP_GRACE_MS` after its token expired.
    """
    primary, known = _check_peer(mode, role, fingerprint, set_id, epoch)
    if now_ms > known.expires_ms + BOOTSTRAP_GRACE_MS:
        raise PermissionDenied("this activation has expired; a new activation token is needed")
    if not store_id:
        raise PermissionDenied("the secondary did not name its store")
    if known.connected or known.store_id not in ("", store_id):
        raise PermissionDenied("this activation was used already; a new activation token is needed")
    if known.store_id == store_id:
        return primary
    return _with(primary, msgspec.structs.replace(known, store_id=store_id))


def connect(mode: Mode, role: Role, fingerprint: str, set_id: str, store_id: str) -> PrimaryRole:
    """At a stream's hello: pin the store; a renewed certificate replaces the one before by its first use. Returns
    ``role`` itself if nothing changes. Raises PermissionDenied."""
    primary = require_primary(mode, role)
    known = primary.by_fingerprint(fingerprint)
    if known is None or primary.set_id != set_id:
        raise PermissionDenied("this secondary is not known here, or was revoked")
    if known.store_id != store_id:
        raise PermissionDenied("this certificate belongs to another store")
    after = authorities.used(known, fingerprint)
    if known.connected and after is known:
        return primary
    return _with(primary, msgspec.structs.replace(after, connected=True))


def _check_peer(
    mode: Mode, role: Role, fingerprint: str, set_id: str, epoch: Epoch
) -> tuple[PrimaryRole, KnownSecondary]:
    primary = require_primary(mode, role)
    known = primary.by_fingerprint(fingerprint)
    if known is None or primary.set_id != set_id:
        raise PermissionDenied("this secondary is not known here, or was revoked")
    if primary.epoch != epoch:
        raise PermissionDenied("this activation token is of an earlier replication epoch; a new one is needed")
    return primary, known


def _with(primary: PrimaryRole, known: KnownSecondary) -> PrimaryRole:
    return msgspec.structs.replace(primary, secondaries={**primary.secondaries, known.id: known})
