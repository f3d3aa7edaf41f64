"""A keyring: the data keys of one storage class, under the root key. Immutable; a rotation makes a new ring."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from sidecar.core.seal_record import NONCE_BYTES, WrongKey

KEY_ID_BYTES = 8
KEY_BYTES = 32
_VERSION = 1


class BadKeyring(Exception):
    """The keyring opened but makes no sense, or its version is not known here."""


@dataclass(frozen=True, slots=True)
class KeyEntry:
    """``encryptions`` is an upper bound of the uses so far: it is raised *before* the uses happen, so that a crash
    cannot make it too low."""

    key_id: bytes
    key: bytes = field(repr=False)
    term: int
    install_time_s: int
    encryptions: int = 0


class _StoredKey(msgspec.Struct, array_like=True):
    key_id: bytes
    key: bytes
    term: int
    install_time_s: int
    encryptions: int


class _Stored(msgspec.Struct):
    version: int
    active: bytes
    keys: list[_StoredKey]


@dataclass(frozen=True, slots=True)
class Keyring:
    """Keys by random id, so that rings made apart never give one id to two keys."""

    keys: Mapping[bytes, KeyEntry] = field(repr=False)
    active_id: bytes

    @property
    def active(self) -> KeyEntry:
        """The key that seals; all others only open."""
        return self.keys[self.active_id]

    @classmethod
    def generate(cls, now_s: float, random_bytes: Callable[[int], bytes]) -> Keyring:
        """A ring of one fresh key, term 1."""
        key_id = random_bytes(KEY_ID_BYTES)
        return cls({key_id: KeyEntry(key_id, random_bytes(KEY_BYTES), 1, int(now_s))}, key_id)

    def rotated(self, now_s: float, random_bytes: Callable[[int], bytes]) -> Keyring:
        """This ring with a fresh active key."""
        key_id = random_bytes(KEY_ID_BYTES)
        entry = KeyEntry(key_id, random_bytes(KEY_BYTES), self.active.term + 1, int(now_s))
        return Keyring({**self.keys, key_id: entry}, key_id)

    def with_encryptions(self, encryptions: int) -> Keyring:
        """This ring with the active key's upper bound of uses set."""
        return Keyring({**self.keys, self.active_id: replace(self.active, encryptions=encryptions)}, self.active_id)

    def encode(self, root_key: bytes, storage_key: str, random_bytes: Callable[[int], bytes]) -> bytes:
        """The ring under ``root_key``, bound to the logical key it is stored at."""
        keys = [_StoredKey(k.key_id, k.key, k.term, k.install_time_s, k.encryptions) for k in self.keys.values()]
        nonce = random_bytes(NONCE_BYTES)
        plain = msgspec.msgpack.encode(_Stored(_VERSION, self.active_id, keys))
        return nonce + AESGCM(root_key).encrypt(nonce, plain, storage_key.encode())

    @classmethod
    def decode(cls, raw: bytes, root_key: bytes, storage_key: str) -> Keyring:
        """Raises WrongKey where ``root_key`` does not open it, BadKeyring where its content makes no sense."""
        try:
            plain = AESGCM(root_key).decrypt(raw[:NONCE_BYTES], raw[NONCE_BYTES:], storage_key.encode())
        except (InvalidTag, ValueError):
            raise WrongKey from None
        try:
            stored = msgspec.msgpack.decode(plain, type=_Stored)
        except msgspec.MsgspecError:
            # The cause would carry bytes of the keys it failed on.
            raise BadKeyring("the keyring cannot be read") from None
        keys = {k.key_id: KeyEntry(k.key_id, k.key, k.term, k.install_time_s, k.encryptions) for k in stored.keys}
        sound = all(len(k.key_id) == KEY_ID_BYTES and len(k.key) == KEY_BYTES for k in keys.values())
        if stored.version != _VERSION or stored.active not in keys or not sound:
            raise BadKeyring("the keyring makes no sense here")
        return cls(keys, stored.active)
