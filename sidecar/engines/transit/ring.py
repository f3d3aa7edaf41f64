"""A named key: its settings and the numbers of its versions, with the rules about them. Pure.

Versions count from 1. Those from ``min_available`` to ``latest`` exist; of these, older ones than ``min_decryption``
are kept but not used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from plugin_api.errors import InvalidRequest, PluginError
from plugin_api.framework import Fields
from sidecar.engines.transit.key_types import (
    DEFAULT_TYPE,
    HMAC,
    HMAC_BYTES_MAX,
    HMAC_BYTES_MIN,
    KEY_TYPES,
    KeyType,
    key_type,
)

AUTO_ROTATE_S_MIN = 3600
CONVERGENT_VERSION = 3
"""What keys of today say in the API: the nonce comes from the plaintext and is part of the ciphertext."""

_FORCED_TO_ONE = "since Vault 0.3, transit decryption keys start at 1; forcing minimum to 1"


@dataclass(slots=True)
class KeyRing:
    """``uid`` names the versions in storage and is new whenever a key is created or restored. ``created_us`` holds the
    unix microseconds of every version that is available. Periods in seconds, sizes in bytes."""

    name: str
    uid: str
    type: str = DEFAULT_TYPE
    derived: bool = False
    convergent: bool = False
    exportable: bool = False
    allow_plaintext_backup: bool = False
    deletion_allowed: bool = False
    auto_rotate_period_s: int = 0
    key_size: int = 0
    min_decryption: int = 1
    min_encryption: int = 0
    min_available: int = 1
    imported: bool = False
    allow_rotation: bool = False
    created_us: dict[int, int] = field(default_factory=dict)

    @property
    def kind(self) -> KeyType:
        return KEY_TYPES[self.type]

    @property
    def latest(self) -> int:
        return max(self.created_us, default=0)

    def add_version(self, now_us: int) -> int:
        """Count a new version; returns its number."""
        number = self.latest + 1
        self.created_us[number] = now_us
        return number

    def usable(self) -> range:
        """The versions that may decrypt and verify."""
        return range(max(self.min_decryption, self.min_available), self.latest + 1)

    # --- which version ---

    def for_encryption(self, requested: int) -> int:
        """The version to encrypt, sign or HMAC with; 0 is the latest. Raises InvalidRequest."""
        if requested < 0:
            raise InvalidRequest("requested version is negative")
        if requested > self.latest:
            raise InvalidRequest("requested version is higher than the latest key version")
        if requested and requested < (self.min_encryption or self.min_decryption):
            raise InvalidRequest("requested version is less than the minimum encryption key version")
        return requested or self.latest

    def for_decryption(self, version: int, what: str) -> int:
        """``version`` if it may decrypt or verify. ``what`` names what carries it. Raises InvalidRequest."""
        if version > self.latest:
            raise InvalidRequest(f"invalid {what}: version is too new")
        if version not in self.usable():
            raise InvalidRequest(f"{what} version is disallowed by policy (too old)")
        return version

    def due(self, now_us: int) -> bool:
        """Whether the key is to be rotated because its period is over."""
        if not self.auto_rotate_period_s or (self.imported and not self.allow_rotation):
            return False
        return now_us >= self.created_us[self.latest] + self.auto_rotate_period_s * 1_000_000

    # --- changes ---

    def apply_config(self, fields: Fields) -> list[str]:
        """Take over what was sent to the key's configuration; returns warnings. Raises InvalidRequest; then nothing of
        this object may be stored."""
        warnings = []
        if fields.given("min_decryption_version"):
            self.min_decryption = fields["min_decryption_version"]
            if self.min_decryption == 0:
                self.min_decryption = 1
                warnings.append(_FORCED_TO_ONE)
        if fields.given("min_encryption_version"):
            self.min_encryption = fields["min_encryption_version"]
        if fields.given("deletion_allowed"):
            self.deletion_allowed = fields["deletion_allowed"]
        if fields.given("auto_rotate_period"):
            self.auto_rotate_period_s = fields["auto_rotate_period"]
        # What was once allowed stays so: a copy may already be out.
        self.exportable |= fields["exportable"]
        self.allow_plaintext_backup |= fields["allow_plaintext_backup"]
        self.check_versions()
        self._check_period()
        return warnings

    def check_versions(self) -> None:
        """Whether the minimum versions fit together. Raises InvalidRequest."""
        for name, version in (("decryption", self.min_decryption), ("encryption", self.min_encryption)):
            if version < 0:
                raise InvalidRequest(f"min {name} version cannot be negative")
            if version > self.latest:
                raise InvalidRequest(f"cannot set min {name} version of {version}, latest key version is {self.latest}")
        if 0 < self.min_encryption < self.min_decryption:
            raise InvalidRequest(
                f"cannot set min encryption/decryption values; min encryption version of {self.min_encryption} must be "
                f"greater than or equal to min decryption version of {self.min_decryption}"
            )
        if self.min_decryption < self.min_available:
            raise InvalidRequest("min decryption version should not be less than min available version")

    def _check_period(self) -> None:
        if self.auto_rotate_period_s and self.auto_rotate_period_s < AUTO_ROTATE_S_MIN:
            raise InvalidRequest("auto rotate period must be 0 to disable or at least an hour")
        if self.auto_rotate_period_s and self.imported and not self.allow_rotation:
            raise InvalidRequest("allow_rotation must be set to true if auto-rotation is enabled")

    def check_trim(self, minimum: int) -> None:
        """Whether versions below ``minimum`` may be removed for ever. Raises InvalidRequest."""
        if minimum < self.min_available:
            raise InvalidRequest("minimum available version cannot be decremented")
        if not self.min_encryption:
            raise InvalidRequest("minimum available version cannot be set when minimum encryption version is not set")
        if minimum > self.latest:
            raise InvalidRequest("minimum available version cannot be higher than the latest key version")
        for name, version in (("encryption", self.min_encryption), ("decryption", self.min_decryption)):
            if minimum > version:
                raise InvalidRequest(f"minimum available version cannot be higher than minimum {name} version")

    def trim(self, minimum: int) -> list[int]:
        """Forget versions below ``minimum``; returns their numbers."""
        gone = [number for number in self.created_us if number < minimum]
        for number in gone:
            del self.created_us[number]
        self.min_available = minimum
        return gone

    def check_new(self) -> None:
        """Whether the settings of a new key fit together. Raises InvalidRequest."""
        kind = self.kind
        if (self.derived and not kind.derives) or (self.convergent and not kind.converges):
            raise InvalidRequest(f"key derivation and convergent encryption not supported for keys of type {kind.name}")
        if self.convergent and not self.derived:
            raise InvalidRequest("convergent encryption requires derivation to be enabled")
        if self.key_size and kind.family != HMAC:
            raise InvalidRequest("key_size can only be specified for HMAC key type")
        if self.key_size and not HMAC_BYTES_MIN <= self.key_size <= HMAC_BYTES_MAX:
            raise InvalidRequest(f"invalid key_size: an HMAC key has {HMAC_BYTES_MIN} to {HMAC_BYTES_MAX} bytes")
        self._check_period()

    def describe(self) -> dict[str, Any]:
        """As a read of the key shows it, without ``keys``."""
        kind = self.kind
        data: dict[str, Any] = {
            "name": self.name,
            **kind.shown,
            "derived": self.derived,
            "exportable": self.exportable,
            "allow_plaintext_backup": self.allow_plaintext_backup,
            "deletion_allowed": self.deletion_allowed,
            "auto_rotate_period": self.auto_rotate_period_s,
            "min_available_version": self.min_available if self.min_available > 1 else 0,
            "min_decryption_version": self.min_decryption,
            "min_encryption_version": self.min_encryption,
            "latest_version": self.latest,
            "supports_encryption": kind.encrypts,
            "supports_decryption": kind.encrypts,
            "supports_signing": kind.signs,
            "supports_derivation": kind.derives,
            "imported_key": self.imported,
        }
        if self.imported:
            data["imported_key_allow_rotation"] = self.allow_rotation
        if self.derived:
            data |= {"kdf": "hkdf_sha256", "convergent_encryption": self.convergent}
        if self.convergent:
            data["convergent_encryption_version"] = CONVERGENT_VERSION
        if self.key_size:
            data["key_size"] = self.key_size
        return data


def new_ring(name: str, uid: str, settings: Mapping[str, Any]) -> KeyRing:
    """A ring without versions from the fields of a create or import. Raises InvalidRequest."""
    ring = KeyRing(
        name,
        uid,
        type=key_type(settings["type"], settings.get("parameter_set", "")).name,
        derived=settings["derived"],
        convergent=settings.get("convergent_encryption", False),
        exportable=settings.get("exportable", False),
        allow_plaintext_backup=settings.get("allow_plaintext_backup", False),
        auto_rotate_period_s=settings.get("auto_rotate_period", 0),
        key_size=settings.get("key_size", 0),
        imported=settings.get("imported", False),
        allow_rotation=settings.get("allow_rotation", False),
    )
    ring.check_new()
    return ring


_DECODER = msgspec.msgpack.Decoder(KeyRing)


def encode_ring(ring: KeyRing) -> bytes:
    """As it is stored."""
    return msgspec.msgpack.encode(ring)


def decode_ring(raw: bytes) -> KeyRing:
    """What :func:`encode_ring` wrote. Raises PluginError."""
    try:
        ring = _DECODER.decode(raw)
    except msgspec.DecodeError:
        raise PluginError("a stored key cannot be read") from None
    if ring.type not in KEY_TYPES or not ring.created_us:
        raise PluginError("a stored key cannot be read")
    return ring
