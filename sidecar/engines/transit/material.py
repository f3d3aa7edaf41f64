"""One version of a key: its secret, the HMAC key that comes with it, and the library's objects made of them.

Symmetric secrets are raw bytes, Ed25519 ones the 32-byte seed, the others PKCS #8. A version that was imported as a
public key has no secret. Everything here may take milliseconds, and RSA keys seconds to generate: callers use a thread.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import msgspec
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, mldsa, rsa
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from plugin_api.errors import InvalidRequest, PluginError
from sidecar.engines.transit.encoding import encode_base64
from sidecar.engines.transit.key_types import (
    ECDSA,
    ED25519,
    HMAC,
    HMAC_BYTES_MAX,
    HMAC_BYTES_MIN,
    MLDSA,
    RSA,
    SYMMETRIC,
    KeyType,
)

RSA_EXPONENT = 65537
RSA_EXPONENT_MAX = 2**32
HMAC_KEY_BYTES = 32

MlDsaPrivateKey = mldsa.MLDSA44PrivateKey | mldsa.MLDSA65PrivateKey | mldsa.MLDSA87PrivateKey
MlDsaPublicKey = mldsa.MLDSA44PublicKey | mldsa.MLDSA65PublicKey | mldsa.MLDSA87PublicKey
PrivateKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | MlDsaPrivateKey
PublicKey = rsa.RSAPublicKey | ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey | MlDsaPublicKey
_MLDSA_PRIVATE: Mapping[int, type[MlDsaPrivateKey]] = {
    44: mldsa.MLDSA44PrivateKey,
    65: mldsa.MLDSA65PrivateKey,
    87: mldsa.MLDSA87PrivateKey,
}
_MLDSA_PUBLIC: Mapping[int, type[MlDsaPublicKey]] = {
    44: mldsa.MLDSA44PublicKey,
    65: mldsa.MLDSA65PublicKey,
    87: mldsa.MLDSA87PublicKey,
}

_DER, _PEM = serialization.Encoding.DER, serialization.Encoding.PEM
_SPKI = serialization.PublicFormat.SubjectPublicKeyInfo
_PLAIN = serialization.NoEncryption()


@dataclass(slots=True)
class VersionRecord:
    """A version as it is stored. ``public`` is a SubjectPublicKeyInfo, empty for symmetric keys; ``chain`` holds
    certificates in DER, that of the key first."""

    secret: bytes = field(repr=False)
    hmac_key: bytes = field(repr=False)
    public: bytes = b""
    chain: list[bytes] = field(default_factory=list)


def aead(kind: KeyType, secret: bytes) -> AESGCM | ChaCha20Poly1305:
    """The authenticated cipher of a symmetric key type."""
    return ChaCha20Poly1305(secret) if kind.name == "chacha20-poly1305" else AESGCM(secret)


class Material:
    """A version in use."""

    def __init__(self, kind: KeyType, record: VersionRecord) -> None:
        self.kind = kind
        self.record = record

    def __repr__(self) -> str:
        return f"Material({self.kind.name})"

    @property
    def has_secret(self) -> bool:
        """False where only a public key was imported."""
        return bool(self.record.secret)

    @cached_property
    def private(self) -> PrivateKey:
        """The private key. Raises InvalidRequest where there is none."""
        if not self.has_secret:
            raise InvalidRequest("this key version holds no private key")
        if self.kind.family == ED25519:
            return ed25519.Ed25519PrivateKey.from_private_bytes(self.record.secret)
        # It was checked when it was made or imported; checking an RSA key holds the interpreter for 300 ms.
        key = serialization.load_der_private_key(self.record.secret, None, unsafe_skip_rsa_key_validation=True)
        return _of_kind(self.kind, key)

    @cached_property
    def public(self) -> PublicKey:
        """The public key of an asymmetric version."""
        key = serialization.load_der_public_key(self.record.public)
        if isinstance(key, PublicKey):
            return key
        raise PluginError("a stored key version cannot be read")

    @cached_property
    def cipher(self) -> AESGCM | ChaCha20Poly1305:
        """The cipher of a symmetric version that is used as it is: to make one takes as long as to use it."""
        return aead(self.kind, self.record.secret)

    def check(self) -> bytes:
        """Whether it is a key of its type, for one that comes from outside; returns its public half in DER. Raises
        InvalidRequest, ValueError or UnsupportedAlgorithm."""
        if not self.kind.asymmetric:
            made = import_secret(self.kind, self.record.secret)
        elif not self.has_secret:
            made = import_public(self.kind, self.public.public_bytes(_PEM, _SPKI).decode())
        else:
            made = import_secret(self.kind, self.import_form())
        return made.public

    def derived(self, context: bytes) -> bytes:
        """The secret for one context: HKDF-SHA256 without salt."""
        return derive(self.record.secret, context, len(self.record.secret))

    def derived_signer(self, context: bytes) -> ed25519.Ed25519PrivateKey:
        """The Ed25519 key for one context."""
        if not self.has_secret:
            raise InvalidRequest("this key version holds no private key")
        return ed25519.Ed25519PrivateKey.from_private_bytes(self.derived(context))

    def public_text(self, context: bytes | None = None) -> str:
        """The public key as answers show it: PEM, or base64 of the raw bytes for Ed25519. ``context`` for derived
        keys."""
        key = self.derived_signer(context).public_key() if context is not None else self.public
        if isinstance(key, ed25519.Ed25519PublicKey):
            return encode_base64(key.public_bytes_raw())
        return key.public_bytes(_PEM, _SPKI).decode()

    def private_text(self) -> str:
        """The secret as an export shows it: base64 of raw bytes, or PEM in the key's traditional form."""
        if self.kind.family in SYMMETRIC:
            return encode_base64(self.record.secret)
        key = self.private
        if isinstance(key, ed25519.Ed25519PrivateKey):
            return encode_base64(self.record.secret + key.public_key().public_bytes_raw())
        if isinstance(key, MlDsaPrivateKey):  # has no other form
            return key.private_bytes(_PEM, serialization.PrivateFormat.PKCS8, _PLAIN).decode()
        return key.private_bytes(_PEM, serialization.PrivateFormat.TraditionalOpenSSL, _PLAIN).decode()

    def import_form(self) -> bytes:
        """The secret as an import takes it: raw bytes or PKCS #8."""
        if self.kind.family in SYMMETRIC:
            return self.record.secret
        return self.private.private_bytes(_DER, serialization.PrivateFormat.PKCS8, _PLAIN)


def derive(secret: bytes, info: bytes, length: int) -> bytes:
    """HKDF-SHA256 (RFC 5869) with no salt."""
    return HKDF(hashes.SHA256(), length, None, info).derive(secret)


def generate(kind: KeyType, size: int = 0) -> VersionRecord:
    """A new random version; ``size`` in bytes for HMAC keys."""
    if kind.family == HMAC:
        secret = secrets.token_bytes(size or kind.size)
        return VersionRecord(secret, secret)
    if kind.family in SYMMETRIC:
        return VersionRecord(secrets.token_bytes(kind.size), secrets.token_bytes(HMAC_KEY_BYTES))
    key: PrivateKey
    if kind.family == ED25519:
        key = ed25519.Ed25519PrivateKey.generate()
    elif kind.family == MLDSA:
        key = _MLDSA_PRIVATE[kind.size].generate()
    elif kind.curve is not None:
        key = ec.generate_private_key(kind.curve)
    else:
        key = rsa.generate_private_key(RSA_EXPONENT, kind.size)
    return _asymmetric(key)


def import_secret(kind: KeyType, data: bytes) -> VersionRecord:
    """A version from the bytes that were unwrapped: raw, or PKCS #8. Raises InvalidRequest."""
    if kind.family == HMAC:
        if not HMAC_BYTES_MIN <= len(data) <= HMAC_BYTES_MAX:
            raise InvalidRequest(f"an HMAC key has {HMAC_BYTES_MIN} to {HMAC_BYTES_MAX} bytes")
        return VersionRecord(data, data)
    if kind.family in SYMMETRIC:
        if len(data) != kind.size:
            raise InvalidRequest(f"invalid key size {len(data)} bytes for key type {kind.name}")
        return VersionRecord(data, secrets.token_bytes(HMAC_KEY_BYTES))
    try:
        loaded = serialization.load_der_private_key(data, None, unsafe_skip_rsa_key_validation=True)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise InvalidRequest("error parsing asymmetric key: it must be PKCS #8 in DER") from None
    key = _of_kind(kind, loaded)
    if isinstance(key, rsa.RSAPrivateKey):
        _check_rsa(key)
    return _asymmetric(key)


def import_public(kind: KeyType, pem: str) -> VersionRecord:
    """A version without a secret. Raises InvalidRequest."""
    if not kind.asymmetric:
        raise InvalidRequest("a public key can be imported for asymmetric key types only")
    try:
        key = serialization.load_pem_public_key(pem.encode())
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise InvalidRequest("error parsing public key: it must be a PEM block") from None
    if not _fits(kind, key):
        raise InvalidRequest(f"the imported key is not of type {kind.name}")
    return VersionRecord(b"", secrets.token_bytes(HMAC_KEY_BYTES), key.public_bytes(_DER, _SPKI))


def _asymmetric(key: PrivateKey) -> VersionRecord:
    secret = (
        key.private_bytes_raw()
        if isinstance(key, ed25519.Ed25519PrivateKey)
        else key.private_bytes(_DER, serialization.PrivateFormat.PKCS8, _PLAIN)
    )
    return VersionRecord(secret, secrets.token_bytes(HMAC_KEY_BYTES), key.public_key().public_bytes(_DER, _SPKI))


def _of_kind(kind: KeyType, key: object) -> PrivateKey:
    if not isinstance(key, PrivateKey) or not _fits(kind, key.public_key()):
        raise InvalidRequest(f"the imported key is not of type {kind.name}")
    return key


def _fits(kind: KeyType, key: object) -> bool:
    if kind.family == ED25519:
        return isinstance(key, ed25519.Ed25519PublicKey)
    if kind.family == ECDSA:
        return (
            isinstance(key, ec.EllipticCurvePublicKey) and kind.curve is not None and key.curve.name == kind.curve.name
        )
    if kind.family == MLDSA:
        return isinstance(key, _MLDSA_PUBLIC[kind.size])
    if kind.family != RSA or not isinstance(key, rsa.RSAPublicKey) or key.key_size != kind.size:
        return False
    exponent = key.public_numbers().e
    return 2 < exponent < RSA_EXPONENT_MAX and exponent % 2 == 1


def _check_rsa(key: rsa.RSAPrivateKey) -> None:
    """Whether the numbers of an imported key belong together. That its factors are prime is its owner's word: to test
    it would hold the interpreter too long."""
    numbers = key.private_numbers()
    modulus, exponent = numbers.public_numbers.n, numbers.public_numbers.e
    fits = (
        numbers.p > 1
        and numbers.q > 1
        and numbers.p * numbers.q == modulus
        and exponent * numbers.d % (numbers.p - 1) == 1
        and exponent * numbers.d % (numbers.q - 1) == 1
        and numbers.dmp1 == numbers.d % (numbers.p - 1)
        and numbers.dmq1 == numbers.d % (numbers.q - 1)
        and numbers.iqmp * numbers.q % numbers.p == 1
    )
    if not fits:
        raise InvalidRequest("error parsing asymmetric key: the numbers of the RSA key do not belong together")


_DECODER = msgspec.msgpack.Decoder(VersionRecord)


def encode_version(record: VersionRecord) -> bytes:
    """As it is stored."""
    return msgspec.msgpack.encode(record)


def decode_version(raw: bytes) -> VersionRecord:
    """What :func:`encode_version` wrote. Raises PluginError."""
    try:
        return _DECODER.decode(raw)
    except msgspec.DecodeError:
        raise PluginError("a stored key version cannot be read") from None
