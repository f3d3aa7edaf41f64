"""OpenPGP public keys that key shares and tokens are handed out under. Keys come base64-encoded from their binary form,
as Vault's API has them; the armored form is taken as well.

Only encryption happens here. The messages are Sequoia's (``pysequoia``), which also decides what is a usable key: it
must be able to encrypt, and be neither expired nor revoked.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from plugin_api.errors import InvalidRequest

if TYPE_CHECKING:
    from pysequoia import Cert

KEY_BYTES_MAX = 64 * 1024
_KEYBASE = "keybase:"


@dataclass(frozen=True, slots=True)
class PgpKey:
    """A key that has encrypted once already. ``fingerprint`` is hex in lower case."""

    fingerprint: str
    _cert: Cert = field(repr=False)

    def encrypt(self, plaintext: bytes) -> bytes:
        """A binary OpenPGP message for this key. Raises InvalidRequest, which says nothing of ``plaintext``."""
        from pysequoia import encrypt

        try:
            return encrypt(plaintext, recipients=[self._cert], armor=False)
        except RuntimeError:  # all that the library raises; its text comes with a stack of addresses
            raise InvalidRequest(f"the PGP key {self.fingerprint} cannot encrypt: is it expired or revoked?") from None


def parse_key(text: str) -> PgpKey:
    """Raises InvalidRequest. A key that cannot encrypt is found out here, before there is a secret to lose."""
    from pysequoia import Cert  # megabytes of library that most servers never need

    if text.startswith(_KEYBASE):
        raise InvalidRequest("keybase names are looked up by the client: give the PGP key itself, base64-encoded")
    if len(text) > KEY_BYTES_MAX:
        raise InvalidRequest(f"error parsing PGP key: it is longer than {KEY_BYTES_MAX} bytes")
    try:
        cert = Cert.from_bytes(base64.b64decode(text, validate=True))
    except (ValueError, binascii.Error):
        raise InvalidRequest("error parsing PGP key: it is not base64 of an OpenPGP public key") from None
    except RuntimeError:
        raise InvalidRequest("error parsing PGP key: it is not an OpenPGP public key") from None
    if cert.is_revoked:
        raise InvalidRequest(f"the PGP key {cert.fingerprint.lower()} is revoked")
    key = PgpKey(cert.fingerprint.lower(), cert)
    key.encrypt(b"trial")
    return key


def parse_keys(texts: Sequence[str], shares: int, name: str) -> list[PgpKey]:
    """One key per share, or none at all. Raises InvalidRequest."""
    if texts and len(texts) != shares:
        raise InvalidRequest(f"count mismatch between number of provided PGP keys ({name}) and number of shares")
    return [parse_key(text) for text in texts]


def encrypt_shares(shares: Sequence[bytes], keys: Sequence[PgpKey]) -> list[bytes]:
    """Each share for its own key; without keys the shares themselves. What is encrypted is the share in hex, as Vault
    does, so that a holder can paste what their tool prints."""
    if not keys:
        return list(shares)
    return [key.encrypt(share.hex().encode()) for share, key in zip(shares, keys, strict=True)]
