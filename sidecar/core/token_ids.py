"""Names of tokens: how they are drawn, how they are hashed into keys, and the keys one token has. Pure."""

from __future__ import annotations

import functools
from collections.abc import Callable

import msgspec

from consul_backend.wal import Write
from sidecar.core.keyed_hash import KeyedHash
from sidecar.core.keys import (
    CUBBYHOLES,
    TOKEN_ACCESSORS,
    TOKEN_IDS,
    TOKEN_PARENTS,
    TOKEN_REVOKING,
)
from sidecar.core.lease_entry import lease_key, token_lease_id
from sidecar.core.schedule import due_name, due_write
from sidecar.core.token_entry import TokenEntry

SERVICE_PREFIX = "hvs."
BATCH_PREFIX = "hvb."
RANDOM_LENGTH = 24
SALT_BYTES = 32
DUE_GROUP = "token"
_BASE62 = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
# 248 is the greatest multiple of 62 that a byte can hold: above it the first letters would come more often.
_UNEVEN = bytes(range(248, 256))
_LETTER_OF_BYTE = bytes(ord(_BASE62[byte % 62]) for byte in range(256))
_HASH_BYTES = 20


class AccessorEntry(msgspec.Struct, frozen=True):
    """What an accessor leads to."""

    accessor: str
    id_hash: str


def base62(length: int, random_bytes: Callable[[int], bytes]) -> str:
    """``length`` uniformly random characters of 0-9, A-Z, a-z."""
    characters = b""
    while len(characters) < length:
        characters += random_bytes(length).translate(_LETTER_OF_BYTE, _UNEVEN)
    return characters[:length].decode()


def keyed_hash(salt: bytes, text: str) -> str:
    """The name under which a token or accessor is stored: 160 bits of HMAC-SHA-256, in hex."""
    return _hash_under(salt).digest(text.encode("utf-8", "surrogatepass"))[:_HASH_BYTES].hex()


_hash_under = functools.lru_cache(maxsize=2)(KeyedHash)


def expiry(entry: TokenEntry) -> Write:
    """The write that has ``entry`` (which expires) removed in time."""
    return due_write(entry.expires_s, due_name(DUE_GROUP, entry.id_hash))


def lease(entry: TokenEntry) -> Write:
    """The write that lists ``entry`` (which expires) among the leases."""
    return Write(lease_key(token_lease_id(entry.path, entry.id_hash)), b"")


def parent_key(entry: TokenEntry) -> str:
    """Where ``entry`` (which has a parent) is indexed below its parent."""
    return f"{TOKEN_PARENTS}{entry.parent}/{entry.id_hash}"


def cubbyhole_folder(id_hash: str) -> str:
    """Everything a token keeps for itself is below this key."""
    return f"{CUBBYHOLES}{id_hash}/"


def creation(entry: TokenEntry, salt: bytes) -> list[Write]:
    """Everything that makes a service token exist, for one commit."""
    accessor = AccessorEntry(entry.accessor, entry.id_hash)
    writes = [
        store(entry),
        Write(TOKEN_ACCESSORS + keyed_hash(salt, entry.accessor), msgspec.msgpack.encode(accessor)),
    ]
    if entry.parent:
        writes.append(Write(parent_key(entry), b""))
    if entry.expires_s:
        writes += [expiry(entry), lease(entry)]
    return writes


def removal(entry: TokenEntry, salt: bytes) -> list[Write]:
    """Everything that takes a service token away again, but its cubbyhole."""
    writes = [
        Write(TOKEN_IDS + entry.id_hash, None),
        Write(TOKEN_ACCESSORS + keyed_hash(salt, entry.accessor), None),
    ]
    if entry.parent:
        writes.append(Write(parent_key(entry), None))
    if entry.expires_s:
        writes += [Write(expiry(entry).key, None), Write(lease(entry).key, None)]
    if entry.spent:
        writes.append(Write(TOKEN_REVOKING + entry.id_hash, None))
    return writes


def store(entry: TokenEntry) -> Write:
    """``entry`` as it is stored."""
    return Write(TOKEN_IDS + entry.id_hash, msgspec.msgpack.encode(entry))
