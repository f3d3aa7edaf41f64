"""The operations of one atomic store transaction, as values.

The verbs and their meaning are Consul's (``PUT /v1/txn``); see ``physical.py`` for the rules every store keeps.
Keys are relative to the store's prefix and hold only ``[A-Za-z0-9_-]`` segments joined by ``/`` (``keys.py``).
"""

from __future__ import annotations

import re

import msgspec

_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\Z")


def require_session(session: str) -> str:
    """``session`` if it is a UUID, else :class:`ValueError`.

    Consul passes ``check-session`` with an empty session on a free lock, so such an operation must never be built.
    """
    if not _UUID.match(session):
        raise ValueError("a session id must be a UUID: an unfenced transaction is never built")
    return session


class Get(msgspec.Struct, frozen=True, gc=False):
    """Read; a missing key fails the whole transaction."""

    key: str


class Set(msgspec.Struct, frozen=True, gc=False):
    """Write unconditionally. Writing the stored value again does not move the key's ModifyIndex."""

    key: str
    value: bytes


class Cas(msgspec.Struct, frozen=True, gc=False):
    """Write if the key's ModifyIndex equals ``index``; 0 means the key must not exist."""

    key: str
    value: bytes
    index: int


class Lock(msgspec.Struct, frozen=True, gc=False):
    """Take the lock ``key`` for ``session`` and set its value; fails when another session holds it or in its delay."""

    key: str
    value: bytes
    session: str

    def __post_init__(self) -> None:
        require_session(self.session)


class Unlock(msgspec.Struct, frozen=True, gc=False):
    """Release the lock ``key`` held by ``session`` and set its value. A clean release starts no lock-delay."""

    key: str
    value: bytes
    session: str

    def __post_init__(self) -> None:
        require_session(self.session)


class Delete(msgspec.Struct, frozen=True, gc=False):
    """Delete one key; a missing key is no failure."""

    key: str


class DeleteTree(msgspec.Struct, frozen=True, gc=False):
    """Delete every key that begins with ``prefix``."""

    prefix: str


class CheckIndex(msgspec.Struct, frozen=True, gc=False):
    """Fail unless the key exists with this ModifyIndex."""

    key: str
    index: int


class CheckSession(msgspec.Struct, frozen=True, gc=False):
    """Fail unless ``session`` holds the lock ``key``."""

    key: str
    session: str

    def __post_init__(self) -> None:
        require_session(self.session)


class CheckNotExists(msgspec.Struct, frozen=True, gc=False):
    """Fail if the key exists (or is hidden from the store's token: that answers permission denied)."""

    key: str


Op = Get | Set | Cas | Lock | Unlock | Delete | DeleteTree | CheckIndex | CheckSession | CheckNotExists
