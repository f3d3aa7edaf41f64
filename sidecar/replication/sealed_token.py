"""Activation tokens that are encrypted to one secondary (``secondary_public_key``, contract 1.8).

The secondary makes a key pair, the operator carries its public half to the primary and the encrypted bundle back; no
call goes from the secondary to the primary's API, and only the holder of the private half can read the token.

Both texts are opaque and safe in a shell: a prefix and base64url. The construction is X25519 with a fresh key of the
sender's, HKDF-SHA256 over both public keys, and AES-256-GCM under a key that is used once (so its nonce may be fixed).

What this does *not* prove is who made the token: anybody who saw the public key can make one. Like the wrapped token,
it is carried from a primary that the operator trusts; what it opens is checked in itself and against the cluster port.
"""

from __future__ import annotations

import base64
import binascii
import json
from dataclasses import dataclass
from typing import Any

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from consul_backend.errors import Corrupt
from plugin_api.errors import InvalidRequest
from sidecar.replication.modes import Mode

KEY_PREFIX = "ork1."
TOKEN_PREFIX = "ort1."  # noqa: S105 - what such a token begins with
KEY_LIFE_MS = 24 * 60 * 60 * 1000
TOKEN_CHARS_MAX = 16 * 1024
_KEY_BYTES = 32
_NONCE = bytes(12)
_NO_KEY = (
    "this activation token is encrypted to a key that this cluster does not hold (a newer one replaced it, it expired, "
    "or it is another cluster's): make a key here with generate-public-key, and a token for it on the primary"
)


class ActivationKey(msgspec.Struct, frozen=True):
    """The stored half of a key pair. ``store_id`` is that of the store it will be used for, so that an activation that
    broke off can be tried again with the same token. Times are unix milliseconds."""

    private: bytes
    store_id: str
    expires_ms: int

    def __repr__(self) -> str:
        return f"ActivationKey(expires_ms={self.expires_ms})"

    @property
    def public_text(self) -> str:
        """What the operator carries to the primary."""
        return KEY_PREFIX + _text(X25519PrivateKey.from_private_bytes(self.private).public_key().public_bytes_raw())


@dataclass(frozen=True, slots=True)
class Opened:
    """A decrypted token: the bundle's fields and the SHA-256 of the authority they must name."""

    payload: dict[str, Any]
    ca_sha256: str

    def __repr__(self) -> str:
        return "Opened()"


def key_entry(mode: Mode) -> str:
    """Where the private half is kept: class ``c``, it is this cluster's alone and goes with the old store at a flip."""
    return f"c/replication/activation-key/{mode.name}"


def make_key(store_id: str, *, now_ms: int) -> ActivationKey:
    """A fresh key pair, good for :data:`KEY_LIFE_MS`."""
    return ActivationKey(X25519PrivateKey.generate().private_bytes_raw(), store_id, now_ms + KEY_LIFE_MS)


def encode_key(key: ActivationKey) -> bytes:
    """The plaintext of the entry."""
    return msgspec.msgpack.encode(key)


def decode_key(raw: bytes | None) -> ActivationKey | None:
    """Raises Corrupt."""
    if raw is None:
        return None
    try:
        return msgspec.msgpack.decode(raw, type=ActivationKey)
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise Corrupt("an entry that should hold an activation key holds none") from None


def is_sealed(token: str) -> bool:
    """Whether ``token`` is of this kind."""
    return token.strip().startswith(TOKEN_PREFIX)


def public_key(text: str) -> bytes:
    """The 32 bytes of a ``secondary_public_key``. Raises InvalidRequest."""
    raw = _bytes(text.strip(), KEY_PREFIX)
    if raw is None or len(raw) != _KEY_BYTES:
        raise InvalidRequest(
            '"secondary_public_key" is not one that generate-public-key returns on the secondary; was it truncated?'
        )
    return raw


def seal_bundle(
    mode: Mode, recipient: bytes, payload: dict[str, Any], ca_sha256: str, *, not_before_ms: int, expires_ms: int
) -> str:
    """The token for the holder of ``recipient``. Raises InvalidRequest for a key that is no point of the curve."""
    sender = X25519PrivateKey.generate()
    sent = sender.public_key().public_bytes_raw()
    content = {"bundle": payload, "ca_sha256": ca_sha256, "nbf_ms": not_before_ms, "exp_ms": expires_ms}
    try:
        shared = sender.exchange(X25519PublicKey.from_public_bytes(recipient))
    except ValueError:  # a point of small order, which would make the key known to everybody
        raise InvalidRequest('"secondary_public_key" is not a usable key') from None
    key = _derive(mode, shared, sent, recipient)
    return TOKEN_PREFIX + _text(sent + AESGCM(key).encrypt(_NONCE, json.dumps(content).encode(), None))


def open_bundle(mode: Mode, token: str, key: ActivationKey | None, *, now_ms: int, leeway_ms: int) -> Opened:
    """What the token holds. Nothing is used up. Raises InvalidRequest, saying what to do, quoting nothing."""
    raw = _bytes(token.strip(), TOKEN_PREFIX) if len(token) <= TOKEN_CHARS_MAX else None
    if raw is None or len(raw) <= _KEY_BYTES:
        raise InvalidRequest("error parsing activation token: it is not whole; was it truncated?")
    if key is None or now_ms > key.expires_ms:
        raise InvalidRequest(_NO_KEY)
    private = X25519PrivateKey.from_private_bytes(key.private)
    sent, sealed = raw[:_KEY_BYTES], raw[_KEY_BYTES:]
    try:
        shared = private.exchange(X25519PublicKey.from_public_bytes(sent))
        derived = _derive(mode, shared, sent, private.public_key().public_bytes_raw())
        content = json.loads(AESGCM(derived).decrypt(_NONCE, sealed, None))
        opened = Opened(dict(content["bundle"]), str(content["ca_sha256"]))
        not_before_ms, expires_ms = int(content["nbf_ms"]), int(content["exp_ms"])
    except InvalidTag:
        raise InvalidRequest(f"{_NO_KEY}; or it was issued for another mode of replication") from None
    except (KeyError, TypeError, ValueError):
        raise InvalidRequest("error parsing activation token: it does not hold an activation bundle") from None
    if now_ms > expires_ms + leeway_ms:
        raise InvalidRequest("this activation token has expired; issue a new one on the primary")
    if now_ms < not_before_ms - leeway_ms:
        raise InvalidRequest("this activation token is not valid yet; compare the clocks of both clusters")
    return opened


def _derive(mode: Mode, shared: bytes, sent: bytes, recipient: bytes) -> bytes:
    info = b"outrider activation bundle 1 " + mode.name.encode()
    return HKDF(hashes.SHA256(), length=32, salt=sent + recipient, info=info).derive(shared)


def _text(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode("ascii")


def _bytes(text: str, prefix: str) -> bytes | None:
    if not text.startswith(prefix):
        return None
    part = text.removeprefix(prefix)
    try:
        return base64.b64decode(part + "=" * (-len(part) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        return None
