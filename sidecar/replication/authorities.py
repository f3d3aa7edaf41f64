"""Renewed certificates of secondaries, and the rotation of a set's authority. Pure.

Functions from the primary's role before to the role after. A certificate is renewed in three steps, each of which may
be the last before a crash: the primary commits that a second certificate counts for this secondary and only then hands
it over; the secondary commits it; its first hello with it makes the primary forget the one before.

An authority is rotated with overlap, in two commits. From the first on both count, on both ends: renewed certificates
are signed by the new one, while the primary still shows a certificate of the old one, the only one that every secondary
knows. When each secondary has used a certificate of the new authority, or at the deadline, the second commit ends the
old one.
"""

from __future__ import annotations

import msgspec

from plugin_api.errors import InvalidRequest, PermissionDenied
from sidecar.replication.modes import Mode
from sidecar.replication.roles import (
    BOOTSTRAP_GRACE_MS,
    KnownSecondary,
    PrimaryRole,
    Role,
    SecondaryRole,
    require_primary,
)
from sidecar.transport.certificates import Credentials, fingerprint


def offer(mode: Mode, role: Role, shown: str, offered: str, authority: str) -> PrimaryRole:
    """Whoever shows certificate ``shown`` may from now on show ``offered`` instead, which ``authority`` signed; it
    replaces an earlier offer. Fingerprints all. Raises PermissionDenied."""
    primary = require_primary(mode, role)
    known = primary.by_fingerprint(shown)
    if known is None or not known.connected:
        raise PermissionDenied("this secondary is not known here, or was revoked")
    if authority != fingerprint(primary.renewing.certificate_pem):
        raise PermissionDenied("the authority of this set was changed meanwhile; try again")
    known = used(known, shown)  # whoever shows a renewed certificate has it: the one before is not needed
    known = msgspec.structs.replace(known, next_fingerprint=offered, next_authority=authority)
    return msgspec.structs.replace(primary, secondaries={**primary.secondaries, known.id: known})


def used(known: KnownSecondary, shown: str) -> KnownSecondary:
    """``known`` after it showed that certificate; itself if that is not a new one."""
    if not known.next_fingerprint or shown != known.next_fingerprint:
        return known
    return msgspec.structs.replace(
        known, fingerprint=shown, authority=known.next_authority, next_fingerprint="", next_authority=""
    )


def begin(mode: Mode, role: Role, successor: Credentials, *, deadline_ms: int) -> PrimaryRole:
    """Both authorities count from now on. Raises InvalidRequest."""
    primary = require_primary(mode, role)
    if primary.rotating:
        raise InvalidRequest(
            "the authority of this set is being rotated already; see certificate_authority in the status for whom it "
            "waits, or end it now with force"
        )
    return msgspec.structs.replace(
        primary,
        next_authority_pem=successor.certificate_pem,
        next_authority_key_pem=successor.key_pem,
        rotation_deadline_ms=deadline_ms,
    )


def waiting(role: PrimaryRole, *, now_ms: int) -> list[str]:
    """The ids that still depend on the old authority: those without a certificate of the new one, and those whose
    activation may still come."""
    successor = fingerprint(role.next_authority_pem)
    return sorted(
        known.id
        for known in role.secondaries.values()
        if known.authority != successor and (known.connected or now_ms <= known.expires_ms + BOOTSTRAP_GRACE_MS)
    )


def due(role: PrimaryRole, *, now_ms: int) -> bool:
    """Whether the old authority may go."""
    return role.rotating and (now_ms >= role.rotation_deadline_ms or not waiting(role, now_ms=now_ms))


def finish(mode: Mode, role: Role) -> tuple[PrimaryRole, tuple[str, ...]]:
    """The new authority is the only one; and the fingerprints of certificates that died with the old one. Who holds
    one of those is still known, and needs a new token. Raises InvalidRequest when nothing is rotated."""
    primary = require_primary(mode, role)
    if not primary.rotating:
        raise InvalidRequest("the authority of this set is not being rotated")
    successor = fingerprint(primary.next_authority_pem)
    dead = tuple(known.fingerprint for known in primary.secondaries.values() if known.authority != successor)
    after = msgspec.structs.replace(
        primary,
        authority_pem=primary.next_authority_pem,
        authority_key_pem=primary.next_authority_key_pem,
        next_authority_pem=b"",
        next_authority_key_pem=b"",
        rotation_deadline_ms=0,
    )
    return after, dead


# ---- on a secondary


def renew(role: SecondaryRole, replaces: bytes, credentials: Credentials, authority_pem: bytes) -> SecondaryRole:
    """The role with a renewed certificate and the authorities to trust from now on. ``role`` itself when the
    certificate that was to be replaced is not its own any more: an operator pointed it elsewhere meanwhile."""
    if role.certificate_pem != replaces:
        return role
    return msgspec.structs.replace(
        role,
        certificate_pem=credentials.certificate_pem,
        key_pem=credentials.key_pem,
        authority_pem=authority_pem,
    )
