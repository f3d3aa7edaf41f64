"""The role of a cluster in one mode of replication: what it is, how it is stored, and which changes are allowed. Pure.

A role is one value, stored as one entry (``Mode.role_key``, encrypted by the barrier). Every change is a function from
the role before to the role after; :data:`TABLE` says for each operation and role what comes of it, and every function
asks it first. The manager commits what they return. A primary's list of secondaries is an *allow* list by certificate
fingerprint: who is not in it is refused, so a revocation needs no list of its own and cannot be forgotten.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from consul_backend.errors import Corrupt
from plugin_api.errors import InvalidRequest
from sidecar.replication.history import Epoch, History, Promotion, epoch_of, extended, history_of_data
from sidecar.replication.modes import DR, PERFORMANCE, Mode
from sidecar.replication.selection import EVERYTHING, MountIds, Partitions, PathsFilter, filled, narrowed, partitions
from sidecar.transport.certificates import Credentials
from sidecar.transport.peer import parse_address

_ID = re.compile(r"\w(?:[\w.-]*\w)?\Z", re.ASCII)
ID_LENGTH_MAX = 256
ADDRESSES_MAX = 16
FILTERS_MAX = 1024
BOOTSTRAP_GRACE_MS = 10 * 60 * 1000


class KnownSecondary(msgspec.Struct, frozen=True):
    """One activation id. ``store_id`` is claimed at bootstrap; ``connected`` says that it proved itself by a stream,
    from then on the id is taken. ``authority`` signed its certificate, empty for the set's first. One issued to replace
    it is ``next_*`` until it is used: until then both count. Times are unix milliseconds."""

    id: str
    fingerprint: str
    issued_ms: int
    expires_ms: int
    store_id: str = ""
    connected: bool = False
    authority: str = ""
    next_fingerprint: str = ""
    next_authority: str = ""

    @property
    def fingerprints(self) -> tuple[str, ...]:
        """Of the certificates that it may show now."""
        return (self.fingerprint, self.next_fingerprint) if self.next_fingerprint else (self.fingerprint,)


class DisabledRole(msgspec.Struct, frozen=True, tag="disabled"):
    """No replication. ``not_held`` as in a primary."""

    not_held: MountIds = ()

    @property
    def kind(self) -> str:
        """As in ``sys/health``."""
        return "disabled"


class PrimaryRole(msgspec.Struct, frozen=True, tag="primary"):
    """Primary of the set ``set_id``. Holds the set's authority, whose key never leaves this barrier, and its epochs.
    ``former``: what it was before it was promoted, if it followed somebody.

    ``filters`` are by secondary id, known yet or not: revoking an id leaves its filter. ``not_held`` are the uuids of
    mounts whose data this cluster does not have, because it was a filtered secondary when it was promoted.
    While the authority is rotated there is a second, ``next_authority_*``, until ``rotation_deadline_ms`` at most.
    """

    set_id: str
    history: History
    primary_cluster_addr: str
    authority_pem: bytes
    authority_key_pem: bytes
    secondaries: dict[str, KnownSecondary] = {}
    former: SecondaryRole | None = None
    filters: dict[str, PathsFilter] = {}
    not_held: MountIds = ()
    next_authority_pem: bytes = b""
    next_authority_key_pem: bytes = b""
    rotation_deadline_ms: int = 0

    def __repr__(self) -> str:
        return f"PrimaryRole(set {self.set_id}, epoch {self.epoch.number}, {len(self.secondaries)} secondaries)"

    @property
    def kind(self) -> str:
        """As in ``sys/health``."""
        return "primary"

    @property
    def epoch(self) -> Epoch:
        """The epoch of which this is the primary."""
        return epoch_of(self.history)

    @property
    def authority(self) -> Credentials:
        """The set's certificate authority."""
        return Credentials(self.authority_pem, self.authority_key_pem)

    @property
    def rotating(self) -> bool:
        """Whether a second authority is being introduced."""
        return bool(self.next_authority_pem)

    @property
    def renewing(self) -> Credentials:
        """The authority that signs renewed certificates."""
        return Credentials(self.next_authority_pem, self.next_authority_key_pem) if self.rotating else self.authority

    @property
    def trusted_pem(self) -> bytes:
        """Every authority that counts now, on both ends."""
        return self.authority_pem + self.next_authority_pem

    def by_fingerprint(self, fingerprint: str) -> KnownSecondary | None:
        """The secondary that holds this client certificate."""
        return next((known for known in self.secondaries.values() if fingerprint in known.fingerprints), None)


class SecondaryRole(msgspec.Struct, frozen=True, tag="secondary"):
    """Secondary ``secondary_id`` of the set ``set_id``, with data of the epochs in ``history``. ``addresses`` are the
    primary's cluster addresses, newest known; ``primary_cluster_addr`` is the one the activation token named.
    ``authority_pem`` holds every authority that the primary may show, two while it rotates them.

    Without a certificate there is no primary: it was demoted, or told to forget its primary. ``accepts`` is the epoch
    of the primary that an operator pointed it at, until it has met that primary: a fork is accepted by that, and by
    nothing else. ``selection`` is what the primary sends, as it last said; ``held`` what of it is here. ``before`` are
    the epochs of the data that was here when ``history`` was taken over (:func:`history_of_data`).
    """

    set_id: str
    history: History
    secondary_id: str = ""
    store_id: str = ""
    primary_cluster_addr: str = ""
    primary_api_addr: str = ""
    authority_pem: bytes = b""
    certificate_pem: bytes = b""
    key_pem: bytes = b""
    addresses: tuple[str, ...] = ()
    accepts: Epoch | None = None
    selection: Partitions = EVERYTHING
    held: Partitions = EVERYTHING
    before: History = ()

    def __repr__(self) -> str:
        return f"SecondaryRole({self.secondary_id!r} of set {self.set_id}, epoch {self.epoch.number})"

    @property
    def kind(self) -> str:
        """As in ``sys/health``."""
        return "secondary"

    @property
    def epoch(self) -> Epoch:
        """The epoch this cluster's data is of."""
        return epoch_of(self.history)

    @property
    def attached(self) -> bool:
        """Whether it has a primary to follow."""
        return bool(self.certificate_pem)

    @property
    def credentials(self) -> Credentials:
        """This secondary's client certificate."""
        return Credentials(self.certificate_pem, self.key_pem)

    @property
    def dial_order(self) -> tuple[str, ...]:
        """Where the primary may be, most likely first, each once."""
        return tuple(address for address in dict.fromkeys([*self.addresses, self.primary_cluster_addr]) if address)


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
        raise Corrupt("an entry that should hold a replication role holds none") from None
    if not isinstance(role, DisabledRole) and not role.history:
        raise Corrupt("a replication role has no epoch")
    return role


# ---- which operation in which role


@dataclass(frozen=True, slots=True)
class To:
    """Allowed; the role afterwards."""

    kind: str


@dataclass(frozen=True, slots=True)
class Refused:
    """Not allowed; the text, with ``{label}`` for the mode."""

    text: str


_NOT_PRIMARY = Refused("this cluster is not a {label} primary")
_NOT_SECONDARY = Refused("this cluster is not a {label} secondary")
NOT_A_DR_SECONDARY = "Not a DR secondary."
_FIRST = "; disable replication first"

TABLE: Mapping[str, Mapping[str, To | Refused]] = {
    "primary/enable": {
        "disabled": To("primary"),
        "primary": Refused("this cluster is already a {label} primary"),
        "secondary": Refused("this cluster is a {label} secondary; promote or disable it first"),
    },
    "primary/demote": {"disabled": _NOT_PRIMARY, "primary": To("secondary"), "secondary": _NOT_PRIMARY},
    "primary/disable": {"disabled": _NOT_PRIMARY, "primary": To("disabled"), "secondary": _NOT_PRIMARY},
    "primary/secondary-token": {"disabled": _NOT_PRIMARY, "primary": To("primary"), "secondary": _NOT_PRIMARY},
    "primary/revoke-secondary": {"disabled": _NOT_PRIMARY, "primary": To("primary"), "secondary": _NOT_PRIMARY},
    "primary/rotate-ca": {"disabled": _NOT_PRIMARY, "primary": To("primary"), "secondary": _NOT_PRIMARY},
    "secondary/enable": {
        "disabled": To("secondary"),
        "primary": Refused("this cluster is a {label} primary" + _FIRST),
        "secondary": Refused("this cluster is already a {label} secondary" + _FIRST),
    },
    "secondary/generate-public-key": {
        "disabled": To("disabled"),
        "primary": Refused("this cluster is a {label} primary" + _FIRST),
        "secondary": To("secondary"),
    },
    "secondary/promote": {"disabled": _NOT_SECONDARY, "primary": _NOT_SECONDARY, "secondary": To("primary")},
    "secondary/disable": {"disabled": _NOT_SECONDARY, "primary": _NOT_SECONDARY, "secondary": To("disabled")},
    "secondary/update-primary": {"disabled": _NOT_SECONDARY, "primary": _NOT_SECONDARY, "secondary": To("secondary")},
}
"""Every operation on a role, in every role."""


def require(mode: Mode, role: Role, operation: str) -> None:
    """Raises InvalidRequest unless :data:`TABLE` allows ``operation`` in ``role``."""
    outcome = TABLE[operation][role.kind]
    if isinstance(outcome, Refused):
        if mode is DR and outcome is _NOT_SECONDARY:
            raise InvalidRequest(NOT_A_DR_SECONDARY)
        raise InvalidRequest(outcome.text.format(label=mode.label))


def _primary(mode: Mode, role: Role, operation: str) -> PrimaryRole:
    require(mode, role, operation)
    if not isinstance(role, PrimaryRole):
        raise AssertionError(f"{operation} is allowed to a primary only")
    return role


def _secondary(mode: Mode, role: Role, operation: str) -> SecondaryRole:
    require(mode, role, operation)
    if not isinstance(role, SecondaryRole):
        raise AssertionError(f"{operation} is allowed to a secondary only")
    return role


def require_primary(mode: Mode, role: Role) -> PrimaryRole:
    """Raises InvalidRequest unless the role is primary."""
    return _primary(mode, role, "primary/secondary-token")


def require_secondary(mode: Mode, role: Role) -> SecondaryRole:
    """Raises InvalidRequest unless the role is secondary."""
    return _secondary(mode, role, "secondary/promote")


# ---- changes of the role


def enable_primary(
    mode: Mode, role: Role, *, set_id: str, began: Promotion, cluster_addr: str, authority: Credentials
) -> PrimaryRole:
    """A disabled cluster becomes primary of a new set, whose first epoch is ``began``."""
    require(mode, role, "primary/enable")
    lacking = role.not_held if isinstance(role, DisabledRole) else ()
    keys = (authority.certificate_pem, authority.key_pem)
    return PrimaryRole(set_id, (began,), cluster_addr, *keys, not_held=lacking)


def disable(mode: Mode, role: Role, operation: str, not_held: Sequence[str] = ()) -> DisabledRole:
    """``primary/disable``: its secondaries can no longer connect. ``secondary/disable``: it becomes a cluster of its
    own with the data it has; ``not_held`` are the mounts it has none of."""
    require(mode, role, operation)
    return DisabledRole(role.not_held if isinstance(role, PrimaryRole) else tuple(not_held))


def demote(mode: Mode, role: Role) -> SecondaryRole:
    """A primary becomes a secondary that follows nobody yet. The set's authority and its secondaries are forgotten."""
    primary = _primary(mode, role, "primary/demote")
    return SecondaryRole(primary.set_id, primary.history, held=partitions(None, primary.not_held))


def promote(
    mode: Mode,
    role: Role,
    *,
    began: Promotion,
    cluster_addr: str,
    authority: Credentials,
    not_held: Sequence[str] = (),
) -> PrimaryRole:
    """A secondary becomes the set's primary, with an authority and an epoch of its own and no secondaries yet.
    ``not_held`` are the mounts whose data it does not have."""
    secondary = _secondary(mode, role, "secondary/promote")
    history = extended(history_of_data(secondary.history, secondary.before, began.fork), began)
    return PrimaryRole(
        secondary.set_id,
        history,
        cluster_addr,
        authority.certificate_pem,
        authority.key_pem,
        former=secondary if secondary.attached else None,
        not_held=tuple(not_held),
    )


def next_number(role: Role) -> int:
    """The number of the epoch that a promotion begins now."""
    return 1 if isinstance(role, DisabledRole) else role.epoch.number + 1


def take_over(role: Role, *, began: Promotion) -> Role:
    """The *performance* role of a cluster whose DR secondary is promoted: a primary goes on under a new epoch, which
    voids activation tokens that are still on their way; a secondary reconnects as the secondary it was."""
    if not isinstance(role, PrimaryRole):
        return role
    if began.fork is not None:
        # The position in the DR set's log is one in the performance set's: it was one primary, with one log.
        fork = msgspec.structs.replace(began.fork, set_id=role.set_id, epoch=role.epoch.number)
        began = msgspec.structs.replace(began, fork=fork)
    return msgspec.structs.replace(role, history=extended(role.history, began))


def point_at(mode: Mode, role: Role, target: SecondaryRole) -> SecondaryRole:
    """``update-primary``: this secondary, with the primary and the credentials of ``target``. Raises InvalidRequest for
    a primary of another set: its data has nothing to do with what is here."""
    secondary = _secondary(mode, role, "secondary/update-primary")
    if target.set_id != secondary.set_id:
        raise InvalidRequest(
            "the token was issued by a primary of another replication set: disable replication here and enable this "
            "cluster as its secondary, which replaces everything it holds",
        )
    return msgspec.structs.replace(
        target,
        history=secondary.history,
        accepts=target.epoch,
        selection=secondary.selection,
        held=secondary.held,
        before=secondary.before,
    )


def forget_primary(mode: Mode, role: Role) -> SecondaryRole:
    """``update-primary`` with a blank token: it stays a secondary and follows nobody."""
    secondary = _secondary(mode, role, "secondary/update-primary")
    blank = SecondaryRole(secondary.set_id, secondary.history, selection=secondary.selection, held=secondary.held)
    return msgspec.structs.replace(blank, before=secondary.before)


def redirect(mode: Mode, role: Role, addresses: Sequence[str]) -> SecondaryRole:
    """``update-primary`` with addresses: the same credentials, another way to the primary."""
    secondary = _secondary(mode, role, "secondary/update-primary")
    if not secondary.attached:
        raise InvalidRequest("this secondary has no credentials for any primary: a token is needed")
    if not addresses or len(addresses) > ADDRESSES_MAX:
        raise InvalidRequest(f'"update_primary_addrs" must name 1 to {ADDRESSES_MAX} addresses')
    for address in addresses:
        _check_address(address, "update_primary_addrs")
    return msgspec.structs.replace(secondary, addresses=tuple(addresses), primary_cluster_addr=next(iter(addresses)))


def adopt(role: SecondaryRole, history: History, before: History) -> SecondaryRole:
    """After meeting a primary with that history: its epochs are this cluster's, whose data is of those ``before``."""
    return msgspec.structs.replace(role, history=history, accepts=None, before=before)


def select(role: SecondaryRole, selection: Partitions) -> SecondaryRole:
    """After a primary said what travels. Where that holds nothing new, all of it is here, as far as the log says."""
    held = narrowed(role.held, selection)
    if selection.within(held):
        held = filled(held, selection)
    if (role.selection, role.held) == (selection, held):
        return role
    return msgspec.structs.replace(role, selection=selection, held=held)


def synced(role: SecondaryRole, selection: Partitions) -> SecondaryRole:
    """After a sync by that selection: what the primary holds of it is here. A selection that changed meanwhile counts
    by itself."""
    held = filled(role.held, selection)
    if role.selection != selection or held == role.held:
        return role
    return msgspec.structs.replace(role, held=held)


def not_held(role: Role, mount_uuid: str) -> bool:
    """Whether a replicated mount's data is not here, although the mount may be."""
    if isinstance(role, SecondaryRole):
        return not role.held.has(mount_uuid)
    return mount_uuid in role.not_held


def hidden(role: Role, mount_uuid: str) -> bool:
    """Whether a replicated mount is withheld from this secondary, so that it is none here."""
    return isinstance(role, SecondaryRole) and not role.selection.permits(mount_uuid)


def set_filter(mode: Mode, role: Role, secondary_id: str, paths_filter: PathsFilter | None) -> PrimaryRole:
    """Set or, with None, remove a filter. Raises InvalidRequest."""
    if mode is not PERFORMANCE:
        raise InvalidRequest("paths filters belong to performance replication: a DR secondary mirrors everything")
    primary = require_primary(mode, role)
    if primary.filters.get(secondary_id) == paths_filter:
        return primary
    filters = {name: one for name, one in primary.filters.items() if name != secondary_id}
    if paths_filter is not None:
        filters[secondary_id] = paths_filter
    if len(filters) > FILTERS_MAX:
        raise InvalidRequest(f"there are {FILTERS_MAX} paths filters already; delete those of secondaries long gone")
    return msgspec.structs.replace(primary, filters=filters)


def refilter(role: Role, change: Callable[[str, PathsFilter], PathsFilter]) -> Role:
    """Every filter changed alike; ``role`` itself when that changes nothing. A filter that names nothing any more is
    kept: with mode *allow* it goes on withholding everything."""
    if not isinstance(role, PrimaryRole):
        return role
    filters = {name: change(name, one) for name, one in role.filters.items()}
    return role if filters == role.filters else msgspec.structs.replace(role, filters=filters)


def accept_empty(role: Role, mount_uuids: Collection[str]) -> Role:
    """Mounts whose data is not here are taken as empty from now on. Raises InvalidRequest on a secondary."""
    if isinstance(role, SecondaryRole):
        raise InvalidRequest("this cluster is a secondary: what it does not hold is its primary's to send")
    return msgspec.structs.replace(role, not_held=tuple(one for one in role.not_held if one not in mount_uuids))


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


# ---- what requests name


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
    if address:
        _check_address(address, "primary_cluster_addr")


def _check_address(address: str, name: str) -> None:
    try:
        parse_address(address)
    except ValueError:
        raise InvalidRequest(f'"{name}" is not an address; it is given as https://host:port') from None
