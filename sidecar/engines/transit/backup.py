"""A key with all its versions as one text. It holds the key in the clear, as the API has it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec
from cryptography.exceptions import UnsupportedAlgorithm

from plugin_api.errors import InvalidRequest
from sidecar.engines.transit.encoding import decode_base64, encode_base64
from sidecar.engines.transit.key_types import HMAC, KEY_TYPES, KeyType
from sidecar.engines.transit.material import Material, VersionRecord
from sidecar.engines.transit.ring import KeyRing

FORMAT = "outrider-transit-1"

_DAMAGED = "the backup is damaged: it holds a version that is no key"


@dataclass(slots=True)
class Backup:
    """What the text holds, as JSON."""

    format: str
    ring: KeyRing
    versions: dict[int, VersionRecord] = field(repr=False)


def pack(ring: KeyRing, records: Mapping[int, VersionRecord]) -> str:
    """Base64 text of a key."""
    return encode_base64(msgspec.json.encode(Backup(FORMAT, ring, dict(records))))


def unpack(text: str) -> tuple[KeyRing, dict[int, VersionRecord]]:
    """What :func:`pack` was given. Raises InvalidRequest for anything that is not a whole and sound key."""
    try:
        backup = msgspec.json.decode(decode_base64(text, "backup"), type=Backup)
    except (msgspec.DecodeError, RecursionError):
        raise InvalidRequest("the backup cannot be read: it was not made by this server's backup") from None
    ring = backup.ring
    if backup.format != FORMAT or ring.type not in KEY_TYPES:
        raise InvalidRequest("the backup cannot be read: it is of another format")
    numbers = sorted(backup.versions)
    if not numbers or numbers != sorted(ring.created_us) or numbers != list(range(ring.min_available, ring.latest + 1)):
        raise InvalidRequest("the backup is damaged: it does not hold the versions that it names")
    ring.check_new()
    ring.check_versions()
    for record in backup.versions.values():
        _check(ring.kind, record)
    return ring, backup.versions


def _check(kind: KeyType, record: VersionRecord) -> None:
    """A version must be what an import would have made, so that using it cannot fail in ways of its own."""
    if not record.hmac_key or (kind.family == HMAC and record.hmac_key != record.secret):
        raise InvalidRequest(_DAMAGED)
    if not record.secret and not kind.asymmetric:
        raise InvalidRequest(_DAMAGED)
    try:
        public = Material(kind, record).check()
    except (ValueError, UnsupportedAlgorithm):
        raise InvalidRequest(_DAMAGED) from None
    if public != record.public:
        raise InvalidRequest(_DAMAGED)
