"""The types of keys and what each can do. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric import ec

from plugin_api.errors import InvalidRequest

AEAD, ED25519, ECDSA, RSA, HMAC, CMAC, MLDSA = "aead", "ed25519", "ecdsa", "rsa", "hmac", "cmac", "mldsa"
SYMMETRIC = frozenset({AEAD, HMAC, CMAC})


@dataclass(frozen=True, slots=True)
class KeyType:
    """``size`` is the bytes of a symmetric key, the bits of an RSA key or the parameter set of an ML-DSA key; ``label``
    names an asymmetric key in answers. ``slow`` says that one operation may take milliseconds, so that it never runs in
    the event loop."""

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
        return self.family in (ED25519, ECDSA, RSA, MLDSA)

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
        return self.family in (RSA, ECDSA, MLDSA)

    @property
    def shown(self) -> dict[str, str]:
        """The type as the API names it: for ML-DSA the parameter set is a field of its own."""
        if self.family == MLDSA:
            return {"type": MLDSA_TYPE, "parameter_set": str(self.size)}
        return {"type": self.name}


DEFAULT_TYPE = "aes256-gcm96"
MLDSA_TYPE = "ml-dsa"
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
        KeyType("aes128-cmac", CMAC, 16),
        KeyType("aes192-cmac", CMAC, 24),
        KeyType("aes256-cmac", CMAC, 32),
        KeyType("ml-dsa-44", MLDSA, 44, label="ml-dsa-44"),
        KeyType("ml-dsa-65", MLDSA, 65, label="ml-dsa-65"),
        KeyType("ml-dsa-87", MLDSA, 87, label="ml-dsa-87"),
    )
}


def key_type(name: str, parameter_set: str = "") -> KeyType:
    """The type of that name, as the API gives it. Raises InvalidRequest."""
    if name == MLDSA_TYPE:
        found = KEY_TYPES.get(f"{MLDSA_TYPE}-{parameter_set}")
        if found is None:
            raise InvalidRequest("invalid parameter_set: an ML-DSA key has 44, 65 or 87")
        return found
    found = KEY_TYPES.get(name or DEFAULT_TYPE)
    if found is None or found.family == MLDSA:
        raise InvalidRequest("unknown key type")
    if parameter_set:
        raise InvalidRequest(f"parameter_set does not apply to keys of type {found.name}")
    return found
