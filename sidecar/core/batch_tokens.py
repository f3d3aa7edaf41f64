"""Batch tokens: the whole entry, encrypted, is the token. Pure but for the random bytes it is given.

The key comes from the root key, which all clusters of a replication set share, so any node of any of them makes such
tokens and any reads them; nothing is stored and nothing has to be replicated first. Each token has a key of its own,
derived with 192 random bits: clusters that know nothing of each other never use one key twice::

    "hvb." base64url( salt (24 bytes) | ciphertext and tag )
"""

from __future__ import annotations

import base64
import binascii
import hmac
from collections.abc import Callable

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from sidecar.core.token_entry import TokenEntry
from sidecar.core.token_ids import BATCH_PREFIX

KEY_LABEL = b"outrider batch tokens v1"
_SALT_BYTES = 24
_TAG_BYTES = 16
# Safe because no key is used for a second message.
_NONCE = bytes(12)


class BatchTokens:
    """Makes and reads batch tokens under ``key`` (32 bytes)."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    def __repr__(self) -> str:
        return "BatchTokens()"

    def make(self, entry: TokenEntry, random_bytes: Callable[[int], bytes]) -> str:
        """The token that carries ``entry``."""
        salt = random_bytes(_SALT_BYTES)
        sealed = self._cipher(salt).encrypt(_NONCE, msgspec.msgpack.encode(entry), KEY_LABEL)
        return BATCH_PREFIX + base64.urlsafe_b64encode(salt + sealed).decode().rstrip("=")

    def read(self, token: str) -> TokenEntry | None:
        """What ``token`` carries; None for anything that was not made under this key."""
        text = token.removeprefix(BATCH_PREFIX)
        try:
            blob = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
        except (binascii.Error, ValueError):
            return None
        if len(blob) <= _SALT_BYTES + _TAG_BYTES:
            return None
        try:
            plain = self._cipher(blob[:_SALT_BYTES]).decrypt(_NONCE, blob[_SALT_BYTES:], KEY_LABEL)
        except InvalidTag:
            return None
        return msgspec.msgpack.decode(plain, type=TokenEntry)

    def _cipher(self, salt: bytes) -> AESGCM:
        return AESGCM(hmac.digest(self._key, salt, "sha256"))
