"""The performance role of a cluster: what it is, how it is stored, and which changes are allowed. Pure.

A role is one value, stored as one entry (:data:`ROLE_KEY`, class ``l``, encrypted by the barrier). Every change is a
function from the role before to the role after that raises a plugin error where the change is not allowed; the manager
commits what they return. A primary's list of secondaries is an *allow* list by certificate fingerprint: who is not in
it is refused, so a revocation needs no list of its own and cannot be forgotten.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import msgspec

from consul_backend.errors import Corrupt
from plugin_api.errors import InvalidRequest, PermissionDenied
from sidecar.transport.certificates import Credentials
from sidecar.transport.peer import parse_address

ROLE_KEY = "l/replication/performance"
ALPN = "replication_v1"
MODES = ("performance", "dr")

_ID = re.compile(r"\w(?:[\w.-]*\w)?\Z", re.ASCII)
ID_LENGTH_MAX = 256
ADDRESSES_MAX = 16
BOOTSTRAP_GRACE_MS = 10 * 60 * 1000


class Epoch(msgspec.Struct, frozen=True):
    """A replication epoch: made when a cluster becomes primary. An equal number with another id is a fork."""

    number: int
    id: str


class KnownSecondary(msgspec.Struct, frozen=True):
    """One activation id. ``store_id`` is claimed at bootstrap; ``connected`` says that it proved itself by a stream,
    from then on the id is taken. Times are unix milliseconds."""

    id: str
    fingerprint: str
    issued_ms: int
    expires_ms: int
    store_id: str = ""
    connected: bool = False


class DisabledRole(msgspec.Struct, frozen=True, tag="disabled"):
    """No replication."""


class PrimaryRole(msgspec.Struct, frozen=True, tag="primary"):
    """Primary of the set ``set_id``. Holds the set's authority, whose key never leaves this barrier."""

    set_id: str
    epoch: Epoch
    primary_cluster_addr: str
    authority_pem: bytes
    authority_key_pem: bytes
    secondaries: dict[str, KnownSecondary] = {}

    def __repr__(self) -> str:
        return f"PrimaryRole(set {self.set_id}, epoch {self.epoch.number}, {len(self.secondaries)} secondaries)"

    @property
    def authority(self) -> Credentials:
        """The set's certificate authority."""
        return Credentials(self.authority_pem, self.authority_key_pem)

    def by_fingerprint(self, fingerprint: str) -> KnownSecondary | None:
        """The secondary that holds this client certificate."""
        return next((known for known in self.secondaries.values() if known.fingerprint == fingerprint), None)


class SecondaryRole(msgspec.Struct, frozen=True, tag="secondary"):
    """Secondary ``secondary_id`` of the set ``set_id``. ``addresses`` are the primary's cluster addresses, newest
    known; ``primary_cluster_addr`` is the one the activation token named."""

    set_id: str
    epoch: Epoch
    secondary_id: str
    store_id: str
    primary_cluster_addr: str
    primary_api_addr: str
    authority_pem: bytes
    certificate_pem: bytes
    key_pem: bytes
    addresses: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"SecondaryRole({self.secondary_id!r} of set {self.set_id}, epoch {self.epoch.number})"

    @property
    def credentials(self) -> Credentials:
        """This secondary's client certificate."""
        return Credentials(self.certificate_pem, self.key_pem)

    @property
    def dial_order(self) -> tuple[str, ...]:
        """Where the primary may be, most likely first, each once."""
        return tuple(dict.fromkeys([*self.addresses, self.primary_cluster_addr]))


Role = DisabledRole | PrimaryRole | SecondaryRole

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Role)


def encode_role(role: Role) -> bytes:
    """The plaintext of the role entry."""
    return _encoder.encode(role)


def decode_role(raw: bytes | None) -> Role:
    """The role of an entry; no entry is no replication. Raises Corrupt."""
    if raw is None:
        return DisabledRole()
    try:
        role: Role = _decoder.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise Corrupt(f"the entry {ROLE_KEY!r} does not hold a replication role") from None
    return role


def server_name(set_id: str) -> str:
    """The SNI name of a set's performance replication."""
    return f"{set_id}.performance.outrider"


def require_performance(mode: str) -> None:
    """Raises InvalidRequest for a mode this version does not replicate."""
    if mode != "performance":
        raise InvalidRequest(f'replication mode "{mode}" is not supported by this version; "performance" is')


def enable_primary(role: Role, *, set_id: str, epoch_id: str, cluster_addr: str, authority: Credentials) -> PrimaryRole:
    """A disabled cluster becomes primary of a new set."""
    if isinstance(role, PrimaryRole):
        raise InvalidRequest("this cluster is already a performance replication primary")
    if isinstance(role, SecondaryRole):
        raise InvalidRequest("this cluster is a performance replication secondary; promote or disable it first")
    return PrimaryRole(
        set_id=set_id,
        epoch=Epoch(1, epoch_id),
        primary_cluster_addr=cluster_addr,
        authority_pem=authority.certificate_pem,
        authority_key_pem=authority.key_pem,
    )


def disable_primary(role: Role) -> DisabledRole:
    """A primary forgets its set; its secondaries can no longer connect."""
    require_primary(role)
    return DisabledRole()


def disable_secondary(role: Role) -> DisabledRole:
    """A secondary becomes a cluster of its own with the data it has."""
    require_secondary(role)
    return DisabledRole()


def require_primary(role: Role) -> PrimaryRole:
    """Raises InvalidRequest unless the role is primary."""
    if not isinstance(role, PrimaryRole):
        raise InvalidRequest("this cluster is not a performance replication primary")
    return role


def require_secondary(role: Role) -> SecondaryRole:
    """Raises InvalidRequest unless the role is secondary."""
    if not isinstance(role, SecondaryRole):
        raise InvalidRequest("this cluster is not a performance replication secondary")
    return role


def require_disabled(role: Role) -> None:
    """Before ``secondary/enable``: raises InvalidRequest unless replication is disabled."""
    if isinstance(role, PrimaryRole):
        raise InvalidRequest("this cluster is a performance replication primary; disable replication first")
    if isinstance(role, SecondaryRole):
        raise InvalidRequest(
            "this cluster is already a performance replication secondary; disable replication first",
        )


def check_id(secondary_id: str) -> str:
    """An activation id in its allowed form. Raises InvalidRequest."""
    if not secondary_id:
        raise InvalidRequest('missing "id"')
    if len(secondary_id) > ID_LENGTH_MAX or not _ID.match(secondary_id):
        raise InvalidRequest(
            'invalid "id": letters, digits, "_", and inside also "." and "-" are allowed, '
            f"{ID_LENGTH_MAX} characters at most",
        )
    return secondary_id


def check_cluster_addr(address: str) -> None:
    """Raises InvalidRequest for a ``primary_cluster_addr`` that is neither empty nor an address."""
    try:
        if address:
            parse_address(address)
    except ValueError:
        raise InvalidRequest('"primary_cluster_addr" is not an address; it is given as https://host:port') from None


def add_secondary(
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
    primary = require_primary(role)
    before = primary.secondaries.get(check_id(secondary_id))
    check_new(primary, secondary_id)
    known = KnownSecondary(secondary_id, fingerprint, issued_ms=now_ms, expires_ms=now_ms + ttl_ms)
    after = msgspec.structs.replace(primary, secondaries={**primary.secondaries, secondary_id: known})
    return after, before.fingerprint if before else None


def check_new(primary: PrimaryRole, secondary_id: str) -> None:
    """Raises InvalidRequest for an id that a connected secondary holds."""
    before = primary.secondaries.get(secondary_id)
    if before is not None and before.connected:
        raise InvalidRequest(
            f'a secondary with the id "{secondary_id}" exists already: ids are unique; revoke it to use the id again',
        )


def revoke(role: Role, secondary_id: str) -> tuple[PrimaryRole, str]:
    """The role without that secondary, and the fingerprint to cut."""
    primary = require_primary(role)
    known = primary.secondaries.get(check_id(secondary_id))
    if known is None:
        raise InvalidRequest(f'no secondary with the id "{secondary_id}" is known')
    rest = {id_: other for id_, other in primary.secondaries.items() if id_ != secondary_id}
    return msgspec.structs.replace(primary, secondaries=rest), known.fingerprint


def claim_store(
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
    primary, known = _check_peer(role, fingerprint, set_id, epoch)
    if now_ms > known.expires_ms + BOOTSTRAP_GRACE_MS:
        raise PermissionDenied("this activation has expired; a new activation token is needed")
    if not store_id:
        raise PermissionDenied("the secondary did not name its store")
    if known.connected or known.store_id not in ("", store_id):
        raise PermissionDenied("this activation was used already; a new activation token is needed")
    if known.store_id == store_id:
        return primary
    return _with(primary, msgspec.structs.replace(known, store_id=store_id))


def connect(role: Role, fingerprint: str, set_id: str, store_id: str) -> PrimaryRole:
    """At a stream's hello: pin the store. Returns ``role`` itself if it was pinned before. Raises PermissionDenied."""
    primary = require_primary(role)
    known = primary.by_fingerprint(fingerprint)
    if known is None or primary.set_id != set_id:
        raise PermissionDenied("this secondary is not known here, or was revoked")
    if known.store_id != store_id:
        raise PermissionDenied("this certificate belongs to another store")
    if known.connected:
        return primary
    return _with(primary, msgspec.structs.replace(known, connected=True))


def learn_addresses(role: SecondaryRole, addresses: Sequence[str]) -> SecondaryRole:
    """The secondary's role with the primary's newest addresses first; ``role`` itself when that changes nothing.

    Older addresses stay behind the new ones: a node that has just taken over has not heard of its standbys yet, and may
    name itself alone shortly before it dies.
    """
    newest = [address for address in addresses if address]
    kept = tuple(dict.fromkeys([*newest, *role.addresses]))[:ADDRESSES_MAX]
    if not newest or kept == role.addresses:
        return role
    return msgspec.structs.replace(role, addresses=kept)


def _check_peer(role: Role, fingerprint: str, set_id: str, epoch: Epoch) -> tuple[PrimaryRole, KnownSecondary]:
    primary = require_primary(role)
    known = primary.by_fingerprint(fingerprint)
    if known is None or primary.set_id != set_id:
        raise PermissionDenied("this secondary is not known here, or was revoked")
    if primary.epoch != epoch:
        raise PermissionDenied("this activation token is of an earlier replication epoch; a new one is needed")
    return primary, known


def _with(primary: PrimaryRole, known: KnownSecondary) -> PrimaryRole:
    return msgspec.structs.replace(primary, secondaries={**primary.secondaries, known.id: known})
