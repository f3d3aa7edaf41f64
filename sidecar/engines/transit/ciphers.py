"""Encryption and decryption with one version of a key. Pure but for the random nonce.

A ciphertext of an AEAD key is nonce (12 bytes), encrypted bytes, tag (16 bytes). With convergent encryption the nonce
is an HMAC of associated data and plaintext, keyed for the context: equal inputs give equal ciphertexts, and a nonce
comes back with no other message.
"""

from __future__ import annotations

import hmac
import secrets

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.asymmetric.padding import AsymmetricPadding
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

from plugin_api.errors import InvalidRequest
from sidecar.engines.transit.key_types import RSA
from sidecar.engines.transit.material import Material, aead, derive

NONCE_BYTES = 12
TAG_BYTES = 16

_CONVERGENT_NONCE = b"outrider transit convergent nonce\0"
_CANNOT_DECRYPT = "cipher: message authentication failed"
_PADDINGS: dict[str, AsymmetricPadding] = {
    "oaep": padding.OAEP(padding.MGF1(hashes.SHA256()), hashes.SHA256(), None),
    "pkcs1v15": padding.PKCS1v15(),
}


def check_padding(scheme: str) -> str:
    """The name of an RSA padding, ``""`` for the default. Raises InvalidRequest."""
    if scheme and scheme not in _PADDINGS:
        raise InvalidRequest("unsupported padding scheme; must be 'oaep' or 'pkcs1v15'")
    return scheme or "oaep"


def encrypt(
    material: Material, plaintext: bytes, *, context: bytes | None, associated: bytes, convergent: bool, scheme: str
) -> bytes:
    """``context`` is None unless the key is derived. Raises InvalidRequest."""
    if material.kind.family == RSA:
        return _rsa_encrypt(material, plaintext, associated, scheme)
    cipher = _cipher(material, context)
    if convergent:
        nonce = _convergent_nonce(material, context or b"", associated, plaintext)
    else:
        nonce = secrets.token_bytes(NONCE_BYTES)
    return nonce + cipher.encrypt(nonce, plaintext, associated)


def decrypt(material: Material, data: bytes, *, context: bytes | None, associated: bytes, scheme: str) -> bytes:
    """What :func:`encrypt` was given. Raises InvalidRequest."""
    if material.kind.family == RSA:
        return _rsa_decrypt(material, data, associated, scheme)
    if len(data) < NONCE_BYTES + TAG_BYTES:
        raise InvalidRequest("invalid ciphertext: too short")
    try:
        return _cipher(material, context).decrypt(data[:NONCE_BYTES], data[NONCE_BYTES:], associated)
    except InvalidTag:
        raise InvalidRequest(_CANNOT_DECRYPT) from None


def _cipher(material: Material, context: bytes | None) -> AESGCM | ChaCha20Poly1305:
    return material.cipher if context is None else aead(material.kind, material.derived(context))


def _convergent_nonce(material: Material, context: bytes, associated: bytes, plaintext: bytes) -> bytes:
    key = derive(material.record.secret, _CONVERGENT_NONCE + context, 32)
    mac = hmac.new(key, len(associated).to_bytes(8, "big"), "sha256")
    mac.update(associated)
    mac.update(plaintext)
    return mac.digest()[:NONCE_BYTES]


def _rsa_encrypt(material: Material, plaintext: bytes, associated: bytes, scheme: str) -> bytes:
    _refuse_associated(associated)
    key = material.public
    assert isinstance(key, rsa.RSAPublicKey)  # noqa: S101 - the family says so
    try:
        return key.encrypt(plaintext, _PADDINGS[scheme])
    except ValueError:
        raise InvalidRequest("message too long for RSA key size") from None


def _rsa_decrypt(material: Material, data: bytes, associated: bytes, scheme: str) -> bytes:
    _refuse_associated(associated)
    key = material.private
    assert isinstance(key, rsa.RSAPrivateKey)  # noqa: S101 - the family says so
    try:
        return key.decrypt(data, _PADDINGS[scheme])
    except ValueError:
        raise InvalidRequest("failed to RSA decrypt the ciphertext") from None


def _refuse_associated(associated: bytes) -> None:
    if associated:
        raise InvalidRequest("associated_data is not supported for keys of this type")
