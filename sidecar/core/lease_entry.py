"""Leases as values: what is stored of one, under which keys, and how long it may live. Pure."""

from __future__ import annotations

import re
from typing import Any

import msgspec

from consul_backend.wal import Write
from plugin_api.engine import MountInfo
from plugin_api.request import IssuedLease, Lease
from sidecar.core.keys import LEASES, LEASES_BY_TOKEN, LEASES_IRREVOCABLE
from sidecar.core.schedule import due_name, due_write
from sidecar.core.token_entry import capped

ID_LENGTH = 24
_TOKEN_LEASE = re.compile(r"(?:.*/)?h([0-9a-f]{40})", re.DOTALL)


class LeaseEntry(msgspec.Struct, frozen=True, omit_defaults=True):
    """One lease of a secret as stored. Times are unix seconds, durations seconds.

    ``mount`` is the uuid of the mount whose engine takes the secret back. ``token`` is the ``id_hash`` of the token
    whose end takes the lease along, empty where none does (any more); ``token_expires_s`` is when a token that cannot
    be revoked ends, 0 for others. ``due_s`` is when the next attempt to revoke is due: the expiry, or later after
    ``attempts`` that failed, the last one with ``error``. No attempt is due for an ``irrevocable`` one.
    """

    id: str
    mount: str
    issued_s: int
    expires_s: int
    due_s: int
    ttl_s: int
    max_ttl_s: int
    renewable: bool = True
    internal: dict[str, Any] = {}
    token: str = ""
    token_expires_s: int = 0
    last_renewal_s: int = 0
    attempts: int = 0
    error: str = ""
    irrevocable: bool = False

    def __repr__(self) -> str:
        # Not what the engine keeps of the secret.
        return f"LeaseEntry(id={self.id!r}, expires_s={self.expires_s}, attempts={self.attempts})"

    @property
    def name(self) -> str:
        """What is unique in the id: its last segment."""
        return self.id.rpartition("/")[2]

    @property
    def due_name(self) -> str:
        """The name in the schedule."""
        return due_name(self.mount, self.name)

    def remaining_s(self, now_s: float) -> int:
        """Seconds until it expires, 0 afterwards."""
        return max(0, self.expires_s - int(now_s))

    def issued(self, mount_point: str) -> IssuedLease:
        """What the engine is told."""
        return IssuedLease(self.id, self.internal, self.issued_s, self.expires_s, self.max_ttl_s, mount_point)


def lease_key(lease_id: str) -> str:
    """Where a lease, of a secret or of a token, is stored."""
    return LEASES + lease_id


def token_lease_id(path: str, id_hash: str) -> str:
    """The lease id of a token that was made at ``path``."""
    return f"{path.rstrip('/')}/h{id_hash}"


def token_of(lease_id: str) -> str:
    """The ``id_hash`` in the lease id of a token, empty for any other."""
    found = _TOKEN_LEASE.fullmatch(lease_id)
    return found[1] if found is not None else ""


def is_lease_id(text: str) -> bool:
    """Whether ``text`` can name a lease at all: what cannot is never looked for."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return not any(segment in ("", ".", "..") for segment in text.split("/"))


def store(entry: LeaseEntry) -> Write:
    """``entry`` as it is stored."""
    return Write(lease_key(entry.id), msgspec.msgpack.encode(entry))


def creation(entry: LeaseEntry) -> list[Write]:
    """Everything that makes a lease exist, for one commit."""
    return [store(entry), *_indexed(entry)]


def removal(entry: LeaseEntry) -> list[Write]:
    """Everything that takes it away again."""
    return [Write(lease_key(entry.id), None), *_unindexed(entry)]


def change(old: LeaseEntry, new: LeaseEntry) -> list[Write]:
    """Everything that turns ``old`` into ``new``, which has the same id."""
    before = {write.key for write in _indexed(old)}
    after = {write.key: write for write in _indexed(new)}
    gone = [Write(key, None) for key in sorted(before - after.keys())]
    return [store(new), *gone, *(write for key, write in after.items() if key not in before)]


def _indexed(entry: LeaseEntry) -> list[Write]:
    writes: list[Write] = []
    if entry.irrevocable:
        writes.append(Write(LEASES_IRREVOCABLE + entry.due_name, entry.id.encode()))
    else:
        writes.append(due_write(entry.due_s, entry.due_name, entry.id.encode()))
    if entry.token:
        writes.append(Write(_by_token(entry), entry.id.encode()))
    return writes


def _unindexed(entry: LeaseEntry) -> list[Write]:
    return [Write(write.key, None) for write in _indexed(entry)]


def _by_token(entry: LeaseEntry) -> str:
    return f"{LEASES_BY_TOKEN}{entry.token}/{entry.name}"


def first_expiry(lease: Lease, mount: MountInfo, now_s: int, token_expires_s: int) -> tuple[int, int, list[str]]:
    """(TTL, maximal TTL, warnings) of a new lease: never beyond the mount's maximum, nor beyond the end of a token
    that cannot be revoked (0: none). A TTL of 0 or less means that it could not live at all."""
    warnings: list[str] = []
    max_ttl_s = min(lease.max_ttl_s or mount.max_lease_ttl_s, mount.max_lease_ttl_s)
    ttl_s = capped("TTL", lease.ttl_s or min(mount.default_lease_ttl_s, max_ttl_s), max_ttl_s, warnings)
    if token_expires_s:
        ttl_s = min(ttl_s, token_expires_s - now_s)
    return ttl_s, max_ttl_s, warnings


def renewed_expiry(entry: LeaseEntry, wanted_s: int, mount_max_s: int, now_s: int) -> tuple[int, list[str]]:
    """When ``entry`` expires after a renewal now for ``wanted_s``: within its own and the mount's maximum and the life
    of a token that cannot be revoked; not sooner than without the renewal where one of them has been reached."""
    warnings: list[str] = []
    limits = [entry.issued_s + min(entry.max_ttl_s, mount_max_s)]
    if entry.token_expires_s:
        limits.append(entry.token_expires_s)
    ttl_s = capped("TTL", wanted_s if wanted_s > 0 else entry.ttl_s, max(min(limits) - now_s, 0), warnings)
    if ttl_s <= 0:
        return entry.expires_s, warnings
    return now_s + ttl_s, warnings
