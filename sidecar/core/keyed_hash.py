"""HMAC-SHA-256 of many short texts under one key. Pure.

Every request hashes a token, an audit entry half a dozen texts; setting up the key costs three times as much as such a
hash. RFC 2104 with the two states behind the key kept, in hashlib's own objects; a test compares with ``hmac``.
"""

from __future__ import annotations

import hashlib

_BLOCK_BYTES = 64


class KeyedHash:
    """Hashes under ``key``, which is at most 64 bytes long."""

    __slots__ = ("_inner", "_outer")

    def __init__(self, key: bytes) -> None:
        if len(key) > _BLOCK_BYTES:
            raise ValueError("the key of a hash is at most one block long")
        block = key.ljust(_BLOCK_BYTES, b"\0")
        self._inner = hashlib.sha256(bytes(byte ^ 0x36 for byte in block))
        self._outer = hashlib.sha256(bytes(byte ^ 0x5C for byte in block))

    def digest(self, data: bytes) -> bytes:
        """32 bytes."""
        inner, outer = self._inner.copy(), self._outer.copy()
        inner.update(data)
        outer.update(inner.digest())
        return outer.digest()
