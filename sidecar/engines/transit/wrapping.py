"""Keys from and to elsewhere: AES key wrap with padding (RFC 5649) under an AES-256 key, that key under RSA-OAEP."""

from __future__ import annotations

import secrets

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.keywrap import InvalidUnwrap, aes_key_unwrap_with_padding, aes_key_wrap_with_padding

from plugin_api.errors import InvalidRequest

EPHEMERAL_BYTES = 32

_HASHES: dict[str, hashes.HashAlgorithm] = {
    "SHA1": hashes.SHA1(),  # noqa: S303 - what some hardware modules offer for OAEP
    "SHA224": hashes.SHA224(),
    "SHA256": hashes.SHA256(),
    "SHA384": hashes.SHA384(),
    "SHA512": hashes.SHA512(),
}
_CANNOT_UNWRAP = "failed to unwrap the key: it was not wrapped with this wrapping key and hash function"


def oaep_hash(name: str) -> hashes.HashAlgorithm:
    """The hash of OAEP by its name, also as ``SHA-256``; ``""`` is SHA256. Raises InvalidRequest."""
    found = _HASHES.get(name.upper().replace("-", "") or "SHA256")
    if found is None:
        raise InvalidRequest("unsupported hash function")
    return found


def unwrap(key: rsa.RSAPrivateKey, data: bytes, algorithm: hashes.HashAlgorithm) -> bytes:
    """The key material in ``data``. Raises InvalidRequest."""
    size = key.key_size // 8
    try:
        ephemeral = key.decrypt(data[:size], _oaep(algorithm))
        if len(ephemeral) not in (16, 24, 32):
            raise InvalidRequest(_CANNOT_UNWRAP)
        return aes_key_unwrap_with_padding(ephemeral, data[size:])
    except (ValueError, InvalidUnwrap):
        raise InvalidRequest(_CANNOT_UNWRAP) from None


def wrap(key: rsa.RSAPublicKey, material: bytes, algorithm: hashes.HashAlgorithm) -> bytes:
    """What :func:`unwrap` takes. Raises InvalidRequest where the key is too small for it."""
    ephemeral = secrets.token_bytes(EPHEMERAL_BYTES)
    try:
        return key.encrypt(ephemeral, _oaep(algorithm)) + aes_key_wrap_with_padding(ephemeral, material)
    except ValueError:
        raise InvalidRequest("the destination key is too small for this hash function") from None


def _oaep(algorithm: hashes.HashAlgorithm) -> padding.OAEP:
    return padding.OAEP(padding.MGF1(algorithm), algorithm, None)
