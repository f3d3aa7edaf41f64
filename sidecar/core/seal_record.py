"""The seal record: how the root key is kept, and what opens it. Pure.

It is the one entry that an unsealed node can be made from; it protects itself, so it is not barrier-encrypted.

The root key stands in it under a *share key* that was split into shares and is kept nowhere. Without an auto seal these
are the unseal shares. With one they are the recovery shares, and the root key stands in the record a second time, under
a key of its own that the auto seal has wrapped: the other server, or the static key, never sees the root key itself.
Both parts are one entry, so that a rekey or a change of seal is one write, before which the old way opens it and after
which the new one does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from sidecar.core.seal import KEY_BYTES, SealConfig

NONCE_BYTES = 12
SHAMIR = "shamir"
# A record without an auto seal is written as version 1, which every node can read.
_SHARES_ONLY, _WITH_AUTO = 1, 2
_AAD = b"outrider root key v1"
_AUTO_AAD = "outrider root key, auto seal v1\n{kind}\n{key_id}"


class WrongKey(Exception):
    """The key does not open what it was tried on. Says nothing about how it differs."""

    def __init__(self, text: str = "cipher: message authentication failed") -> None:
        super().__init__(text)


class BadSealRecord(Exception):
    """The stored seal record cannot be read."""


@dataclass(frozen=True, slots=True)
class AutoPart:
    """The root key as an auto seal opens it: ``encrypted_root_key`` under a key that is in ``wrapped_key``, which the
    key named ``key_id`` of a seal of this ``kind`` has wrapped."""

    kind: str
    key_id: str
    wrapped_key: bytes = field(repr=False)
    encrypted_root_key: bytes = field(repr=False)


class _Stored(msgspec.Struct, omit_defaults=True):
    version: int
    shares: int
    threshold: int
    created_s: int
    encrypted_root_key: bytes
    auto: AutoPart | None = None


@dataclass(frozen=True, slots=True)
class SealRecord:
    """``encrypted_root_key`` is nonce, ciphertext and tag, under the share key. Holds no secret that a share key or an
    auto seal does not guard."""

    shares: int
    threshold: int
    created_s: int
    encrypted_root_key: bytes = field(repr=False)
    auto: AutoPart | None = None

    @property
    def config(self) -> SealConfig:
        """How many shares there are and how many are needed."""
        return SealConfig(self.shares, self.threshold)

    @property
    def kind(self) -> str:
        """Which seal this is: ``shamir``, or the auto seal's kind."""
        return self.auto.kind if self.auto else SHAMIR

    def with_auto(self, auto: AutoPart | None) -> SealRecord:
        """The same shares, beside another auto seal or none: they are recovery shares with one and unseal shares
        without."""
        return replace(self, auto=auto)

    def same_shares(self, other: SealRecord) -> bool:
        """Whether the same shares open both."""
        return self.with_auto(None) == other.with_auto(None)

    def encode(self) -> bytes:
        """As JSON, which an operator can look at."""
        version = _WITH_AUTO if self.auto else _SHARES_ONLY
        return msgspec.json.encode(
            _Stored(version, self.shares, self.threshold, self.created_s, self.encrypted_root_key, self.auto),
        )

    @classmethod
    def decode(cls, raw: bytes) -> SealRecord:
        """Raises BadSealRecord."""
        try:
            stored = msgspec.json.decode(raw, type=_Stored)
        except msgspec.MsgspecError as error:
            raise BadSealRecord("the seal record cannot be read") from error
        if stored.version not in (_SHARES_ONLY, _WITH_AUTO):
            raise BadSealRecord(f"seal record version {stored.version} is not known here")
        if (stored.auto is not None) != (stored.version == _WITH_AUTO):
            raise BadSealRecord(f"a seal record of version {stored.version} does not look like this")
        return cls(stored.shares, stored.threshold, stored.created_s, stored.encrypted_root_key, stored.auto)


def make_seal_record(
    root_key: bytes,
    share_key: bytes,
    config: SealConfig,
    created_s: int,
    random_bytes: Callable[[int], bytes],
) -> SealRecord:
    """Wrap ``root_key`` under ``share_key`` (both 32 bytes)."""
    return SealRecord(config.shares, config.threshold, created_s, _wrap(root_key, share_key, _AAD, random_bytes))


def make_auto_part(
    root_key: bytes, key: bytes, wrapped_key: bytes, kind: str, key_id: str, random_bytes: Callable[[int], bytes]
) -> AutoPart:
    """Wrap ``root_key`` under ``key`` (32 bytes), which an auto seal has turned into ``wrapped_key``."""
    return AutoPart(kind, key_id, wrapped_key, _wrap(root_key, key, _auto_aad(kind, key_id), random_bytes))


def open_root_key(record: SealRecord, share_key: bytes) -> bytes:
    """The root key, by the key that the shares make. Raises WrongKey, also for a key of the wrong length."""
    return _unwrap(record.encrypted_root_key, share_key, _AAD)


def open_auto_part(auto: AutoPart, key: bytes) -> bytes:
    """The root key, by the key that the auto seal has unwrapped. Raises WrongKey."""
    return _unwrap(auto.encrypted_root_key, key, _auto_aad(auto.kind, auto.key_id))


def _auto_aad(kind: str, key_id: str) -> bytes:
    return _AUTO_AAD.format(kind=kind, key_id=key_id).encode()


def _wrap(root_key: bytes, key: bytes, data: bytes, random_bytes: Callable[[int], bytes]) -> bytes:
    nonce = random_bytes(NONCE_BYTES)
    return nonce + AESGCM(key).encrypt(nonce, root_key, data)


def _unwrap(blob: bytes, key: bytes, data: bytes) -> bytes:
    if len(key) != KEY_BYTES:
        raise WrongKey
    try:
        return AESGCM(key).decrypt(blob[:NONCE_BYTES], blob[NONCE_BYTES:], data)
    except (InvalidTag, ValueError):
        raise WrongKey from None


def root_fingerprint(root_key: bytes) -> str:
    """64 hex digits that tell root keys apart and reveal nothing of them."""
    return HKDF(SHA256(), 32, salt=None, info=b"outrider root key fingerprint v1").derive(root_key).hex()
