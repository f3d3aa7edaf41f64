"""The seal record: the root key under the unseal key, with the shape of the shares. Pure.

It is the one entry that an unsealed node can be made from; it protects itself, so it is not barrier-encrypted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from sidecar.core.seal import KEY_BYTES, SealConfig

NONCE_BYTES = 12
_VERSION = 1
_AAD = b"outrider root key v1"


class WrongKey(Exception):
    """The key does not open what it was tried on. Says nothing about how it differs."""

    def __init__(self) -> None:
        super().__init__("cipher: message authentication failed")


class BadSealRecord(Exception):
    """The stored seal record cannot be read."""


class _Stored(msgspec.Struct, forbid_unknown_fields=False):
    version: int
    shares: int
    threshold: int
    created_s: int
    encrypted_root_key: bytes


@dataclass(frozen=True, slots=True)
class SealRecord:
    """``encrypted_root_key`` is nonce, ciphertext and tag. Holds no secret that the unseal key does not guard."""

    shares: int
    threshold: int
    created_s: int
    encrypted_root_key: bytes = field(repr=False)

    @property
    def config(self) -> SealConfig:
        """How many shares there are and how many are needed."""
        return SealConfig(self.shares, self.threshold)

    def encode(self) -> bytes:
        """As JSON, which an operator can look at."""
        return msgspec.json.encode(
            _Stored(_VERSION, self.shares, self.threshold, self.created_s, self.encrypted_root_key),
        )

    @classmethod
    def decode(cls, raw: bytes) -> SealRecord:
        """Raises BadSealRecord."""
        try:
            stored = msgspec.json.decode(raw, type=_Stored)
        except msgspec.MsgspecError as error:
            raise BadSealRecord("the seal record cannot be read") from error
        if stored.version != _VERSION:
            raise BadSealRecord(f"seal record version {stored.version} is not known here")
        return cls(stored.shares, stored.threshold, stored.created_s, stored.encrypted_root_key)


def make_seal_record(
    root_key: bytes,
    unseal_key: bytes,
    config: SealConfig,
    created_s: int,
    random_bytes: Callable[[int], bytes],
) -> SealRecord:
    """Wrap ``root_key`` under ``unseal_key`` (both 32 bytes)."""
    nonce = random_bytes(NONCE_BYTES)
    sealed = nonce + AESGCM(unseal_key).encrypt(nonce, root_key, _AAD)
    return SealRecord(config.shares, config.threshold, created_s, sealed)


def open_root_key(record: SealRecord, unseal_key: bytes) -> bytes:
    """The root key. Raises WrongKey, also for a key of the wrong length."""
    blob = record.encrypted_root_key
    if len(unseal_key) != KEY_BYTES:
        raise WrongKey
    try:
        return AESGCM(unseal_key).decrypt(blob[:NONCE_BYTES], blob[NONCE_BYTES:], _AAD)
    except (InvalidTag, ValueError):
        raise WrongKey from None


def root_fingerprint(root_key: bytes) -> str:
    """64 hex digits that tell root keys apart and reveal nothing of them."""
    return HKDF(SHA256(), 32, salt=None, info=b"outrider root key fingerprint v1").derive(root_key).hex()
