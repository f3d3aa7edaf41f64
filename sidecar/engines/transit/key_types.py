"""The types of keys and what each can do. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric import ec

from plugin_api.errors import InvalidRequest

AEAD, ED25519, ECDSA, RSA, HMAC = "aead", "ed25519", "ecdsa", "rsa", "hmac"


@dataclass(frozen=True, slots=True)
class KeyType:
    """``size`` is the bytes of a symmetric key or the bits of an RSA key; ``label`` names an asymmetric key in answers.
    ``slow`` says that one operation may take milliseconds, so that it never runs in the event loop."""

    name: str
    family: str
    size: int = 0
    label: str = ""
    curve: ec.EllipticCurve | None = None

    @property
    def encrypts(self) -> bool:
        return self.family in (AEAD, RSA)

    @property
    def signs(self) -> bool:
        return self.family in (ED25519, ECDSA, RSA)

    @property
    def derives(self) -> bool:
        return self.family in (AEAD, ED25519)

    @property
    def converges(self) -> bool:
        return self.family == AEAD

    @property
    def asymmetric(self) -> bool:
        return self.signs

    @property
    def slow(self) -> bool:
        return self.family in (RSA, ECDSA)


DEFAULT_TYPE = "aes256-gcm96"
HMAC_BYTES_MIN, HMAC_BYTES_MAX = 32, 512

KEY_TYPES: Mapping[str, KeyType] = {
    kind.name: kind
    for kind in (
        KeyType("aes128-gcm96", AEAD, 16),
        KeyType("aes256-gcm96", AEAD, 32),
        KeyType("chacha20-poly1305", AEAD, 32),
        KeyType("ed25519", ED25519, label="ed25519"),
        KeyType("ecdsa-p256", ECDSA, label="P-256", curve=ec.SECP256R1()),
        KeyType("ecdsa-p384", ECDSA, label="P-384", curve=ec.SECP384R1()),
        KeyType("ecdsa-p521", ECDSA, label="P-521", curve=ec.SECP521R1()),
        KeyType("rsa-2048", RSA, 2048, label="rsa-2048"),
        KeyType("rsa-3072", RSA, 3072, label="rsa-3072"),
        KeyType("rsa-4096", RSA, 4096, label="rsa-4096"),
        KeyType("hmac", HMAC, 32),
    )
}


def key_type(name: str) -> KeyType:
    """The type of that name. Raises InvalidRequest."""
    found = KEY_TYPES.get(name or DEFAULT_TYPE)
    if found is None:
        raise InvalidRequest("unknown key type")
    return found
