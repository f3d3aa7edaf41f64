"""Hashes, HMACs, and signatures with one version of a key. Pure but for the randomness of ECDSA and PSS."""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import cmac, hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa, utils
from cryptography.hazmat.primitives.ciphers import algorithms

from plugin_api.errors import InvalidRequest
from sidecar.engines.transit.encoding import decode_base64, decode_base64_url, encode_base64, encode_base64_url
from sidecar.engines.transit.key_types import ECDSA, ED25519, MLDSA
from sidecar.engines.transit.material import Material, MlDsaPrivateKey, MlDsaPublicKey

DEFAULT_HASH = "sha2-256"
NO_HASH = "none"

HASHES: Mapping[str, hashes.HashAlgorithm] = {
    "sha1": hashes.SHA1(),  # noqa: S303 - the API offers it for old signatures
    "sha2-224": hashes.SHA224(),
    "sha2-256": hashes.SHA256(),
    "sha2-384": hashes.SHA384(),
    "sha2-512": hashes.SHA512(),
    "sha3-224": hashes.SHA3_224(),
    "sha3-256": hashes.SHA3_256(),
    "sha3-384": hashes.SHA3_384(),
    "sha3-512": hashes.SHA3_512(),
}
DIGESTS: Mapping[str, str] = {
    name: name.replace("sha2-", "sha").replace("sha3-", "sha3_") for name in HASHES if name != "sha1"
}
"""Names of hashes for ``hash`` and ``hmac``, as the standard library knows them."""

_BY_SIZE = {HASHES[f"sha2-{bits}"].digest_size: HASHES[f"sha2-{bits}"] for bits in (224, 256, 384, 512)} | {
    20: HASHES["sha1"]
}


def digest_name(name: str) -> str:
    """A hash of :data:`DIGESTS`, ``""`` for the default. Raises InvalidRequest."""
    found = DIGESTS.get(name or DEFAULT_HASH)
    if found is None:
        raise InvalidRequest("unsupported hash algorithm")
    return found


@dataclass(frozen=True, slots=True)
class Scheme:
    """How a signature is made. ``salt`` is ``auto``, ``hash`` or a number of bytes, for PSS."""

    hash_name: str = DEFAULT_HASH
    prehashed: bool = False
    algorithm: str = "pss"
    marshaling: str = "asn1"
    salt: str | int = "auto"

    def check(self, family: str) -> None:
        """Raise InvalidRequest where the parts do not fit together or ``family`` does not take them."""
        if self.hash_name != NO_HASH and self.hash_name not in HASHES:
            raise InvalidRequest("unsupported hash algorithm")
        if self.algorithm not in ("pss", "pkcs1v15"):
            raise InvalidRequest("unsupported signature algorithm")
        if self.marshaling not in ("asn1", "jws"):
            raise InvalidRequest("unsupported marshaling algorithm")
        if self.hash_name == NO_HASH and not (self.prehashed and self.algorithm == "pkcs1v15"):
            raise InvalidRequest("hash_algorithm=none requires both prehashed=true and signature_algorithm=pkcs1v15")
        if family == ECDSA and self.hash_name == NO_HASH:
            raise InvalidRequest("hash_algorithm=none is for RSA keys only")
        if family == ED25519 and (self.prehashed or self.hash_name == "sha2-512"):
            raise InvalidRequest("only pure Ed25519 signatures are supported: neither prehashed nor sha2-512")
        if family == MLDSA and self.prehashed:
            raise InvalidRequest("only pure ML-DSA signatures are supported: the input must not be prehashed")


def parse_salt(text: str) -> str | int:
    """``auto``, ``hash`` or bytes; the numbers 0 and -1 stand for the two words. Raises InvalidRequest."""
    words: dict[str, str] = {"": "auto", "auto": "auto", "0": "auto", "hash": "hash", "-1": "hash"}
    if text in words:
        return words[text]
    if not text.isascii() or not text.isdigit() or len(text) > 4:
        raise InvalidRequest("unsupported salt_length: it must be 'auto', 'hash' or a number of bytes")
    return int(text)


def make_hmac(key: bytes, data: bytes, name: str) -> bytes:
    """HMAC with a hash of the standard library's name."""
    return hmac.digest(key, data, name)


def make_cmac(key: bytes, data: bytes, length: int) -> bytes:
    """AES-CMAC (RFC 4493, NIST SP 800-38B), its first ``length`` bytes."""
    made = cmac.CMAC(algorithms.AES(key))
    made.update(data)
    return made.finalize()[:length]


def sign(material: Material, data: bytes, scheme: Scheme, context: bytes | None) -> str:
    """The signature, encoded as ``scheme`` says. Raises InvalidRequest."""
    key = material.private if context is None else material.derived_signer(context)
    if isinstance(key, ed25519.Ed25519PrivateKey | MlDsaPrivateKey):
        made = key.sign(data)
    elif isinstance(key, ec.EllipticCurvePrivateKey):
        made = key.sign(data, ec.ECDSA(_ecdsa_hash(data, scheme)))
        if scheme.marshaling == "jws":
            made = _jws_of_der(made, (key.key_size + 7) // 8)
    else:
        try:
            made = key.sign(data, _rsa_padding(scheme, verifying=False), _rsa_hash(data, scheme))
        except ValueError:
            raise InvalidRequest("the input or the salt is too long for this key") from None
    return encode_base64_url(made) if scheme.marshaling == "jws" else encode_base64(made)


def verify(material: Material, data: bytes, signature: str, scheme: Scheme, context: bytes | None) -> bool:
    """Whether ``signature`` (without its version) is one of ``data``. Raises InvalidRequest where it is not base64."""
    key = material.public if context is None else material.derived_signer(context).public_key()
    decode = decode_base64_url if scheme.marshaling == "jws" else decode_base64
    raw = decode(signature, "signature")
    try:
        if isinstance(key, ed25519.Ed25519PublicKey | MlDsaPublicKey):
            key.verify(raw, data)
        elif isinstance(key, ec.EllipticCurvePublicKey):
            if scheme.marshaling == "jws":
                raw = _der_of_jws(raw, (key.key_size + 7) // 8)
            key.verify(raw, data, ec.ECDSA(_ecdsa_hash(data, scheme)))
        else:
            _verify_rsa(key, raw, data, scheme)
    except InvalidSignature:
        return False
    return True


def _verify_rsa(key: rsa.RSAPublicKey, raw: bytes, data: bytes, scheme: Scheme) -> None:
    hashed = _rsa_hash(data, scheme)
    if isinstance(hashed, utils.NoDigestInfo):
        if not hmac.compare_digest(key.recover_data_from_signature(raw, padding.PKCS1v15(), hashed), data):
            raise InvalidSignature
        return
    try:
        key.verify(raw, data, _rsa_padding(scheme, verifying=True), hashed)
    except ValueError:
        # A salt that no signature of this key can have.
        raise InvalidSignature from None


def _jws_of_der(made: bytes, size: int) -> bytes:
    r, s = utils.decode_dss_signature(made)
    return r.to_bytes(size, "big") + s.to_bytes(size, "big")


def _der_of_jws(raw: bytes, size: int) -> bytes:
    if len(raw) != 2 * size:
        raise InvalidSignature
    return utils.encode_dss_signature(int.from_bytes(raw[:size], "big"), int.from_bytes(raw[size:], "big"))


def _ecdsa_hash(data: bytes, scheme: Scheme) -> hashes.HashAlgorithm | utils.Prehashed:
    if not scheme.prehashed:
        return HASHES[scheme.hash_name]
    # ECDSA signs a number: which hash it came from makes no difference, so its size is all that is asked of it.
    by_size = _BY_SIZE.get(len(data))
    if by_size is None:
        raise InvalidRequest("prehashed input has no length of a hash")
    return utils.Prehashed(by_size)


def _rsa_hash(data: bytes, scheme: Scheme) -> hashes.HashAlgorithm | utils.Prehashed | utils.NoDigestInfo:
    if scheme.hash_name == NO_HASH:
        return utils.NoDigestInfo()
    algorithm = HASHES[scheme.hash_name]
    if not scheme.prehashed:
        return algorithm
    if len(data) != algorithm.digest_size:
        raise InvalidRequest("prehashed input has not the length of the hash_algorithm")
    return utils.Prehashed(algorithm)


def _rsa_padding(scheme: Scheme, *, verifying: bool) -> padding.AsymmetricPadding:
    if scheme.algorithm == "pkcs1v15":
        return padding.PKCS1v15()
    mask = padding.MGF1(HASHES[scheme.hash_name])
    if scheme.salt == "hash":
        return padding.PSS(mask, padding.PSS.DIGEST_LENGTH)
    if isinstance(scheme.salt, int):
        return padding.PSS(mask, scheme.salt)
    return padding.PSS(mask, padding.PSS.AUTO if verifying else padding.PSS.MAX_LENGTH)
