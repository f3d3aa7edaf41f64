"""Keys that come and go: export, backup, restore, and the import of wrapped keys."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from functools import partial
from typing import Any

from cryptography.hazmat.primitives.asymmetric import rsa

from plugin_api.engine import EngineContext
from plugin_api.errors import Failed, InvalidRequest, ReadOnlyStorage
from plugin_api.framework import Fields, FieldSpec, FieldType, Path, generic_name, writes
from plugin_api.request import Operation, Request, Response
from sidecar.engines.transit.backup import pack, unpack
from sidecar.engines.transit.certificates import pem_of_chain, version_number
from sidecar.engines.transit.encoding import decode_base64, encode_base64
from sidecar.engines.transit.key_types import HMAC, KEY_TYPES, RSA
from sidecar.engines.transit.keys import Key, KeyStore
from sidecar.engines.transit.management import NEW_KEY
from sidecar.engines.transit.material import (
    Material,
    VersionRecord,
    decode_version,
    encode_version,
    generate,
    import_public,
    import_secret,
)
from sidecar.engines.transit.ring import KeyRing, new_ring
from sidecar.engines.transit.work import Workers
from sidecar.engines.transit.wrapping import oaep_hash, unwrap, wrap

_TEXT, _BOOL, _INT = FieldType.STRING, FieldType.BOOL, FieldType.INT
_WRAPPING = KEY_TYPES["rsa-4096"]
_WRAPPING_PATH = "wrapping_key"
_IMPORT = {
    "ciphertext": FieldSpec(_TEXT, description="Base64 of the wrapped AES key and the key wrapped with it."),
    "hash_function": FieldSpec(_TEXT, description="Hash of OAEP; SHA256 if not given."),
    "public_key": FieldSpec(_TEXT, description="PEM public key, in place of ciphertext."),
}
_VERSION = r"(?:/(?P<version>[^/]+))?"
_KEY_EXISTS = (
    "the import path cannot be used with an existing key; use import-version to rotate an existing imported key"
)
_EXPORTS = ("encryption-key", "signing-key", "hmac-key", "public-key", "certificate-chain")


class Exchange:
    """What takes key material in or gives it out."""

    def __init__(self, context: EngineContext, store: KeyStore, workers: Workers) -> None:
        self._context = context
        self._storage = context.storage
        self._store = store
        self._workers = workers
        self._making_key = asyncio.Lock()

    def paths(self) -> list[Path]:
        """The table."""
        name = generic_name("name")
        return [
            Path(
                "export/(?P<kind>[^/]+)/" + name + _VERSION, {}, {Operation.READ: self._export}, help="Exports a key."
            ),
            Path(
                "byok-export/" + generic_name("destination") + "/" + generic_name("source") + _VERSION,
                {"hash": _IMPORT["hash_function"]},
                {Operation.READ: self._wrapped_export},
                help="Exports a key wrapped for import elsewhere.",
            ),
            Path("backup/" + name, {}, {Operation.READ: self._backup}, help="A key with all versions, in plain text."),
            Path(
                "restore(?:/" + name + ")?",
                {
                    "backup": FieldSpec(_TEXT, description="What backup gave."),
                    "force": FieldSpec(_BOOL, description="Whether to replace a key of that name."),
                    "name": FieldSpec(_TEXT, description="Name of the key, in place of the one in the backup."),
                },
                writes(self._restore),
                help="Restores a key from its backup.",
                primary_only=True,
            ),
            Path("wrapping_key", {}, {Operation.READ: self._wrapping_key}, help="The public key to wrap imports with."),
            Path(
                "keys/" + name + "/import",
                NEW_KEY
                | _IMPORT
                | {
                    "allow_rotation": FieldSpec(_BOOL, description="Whether the key may be rotated here."),
                    "context": FieldSpec(_TEXT, description="Accepted for derived keys."),
                },
                writes(self._import),
                help="Creates a key from material that was made elsewhere.",
                primary_only=True,
            ),
            Path(
                "keys/" + name + "/import_version",
                _IMPORT | {"version": FieldSpec(_INT, description="Version that gets its private key.")},
                writes(self._import_version),
                help="Adds a version that was made elsewhere to an imported key.",
                primary_only=True,
            ),
        ]

    # --- export ---

    async def _export(self, request: Request, fields: Fields) -> Response:
        kind = fields["kind"]
        if kind not in _EXPORTS:
            raise InvalidRequest("invalid export type")
        key = await self._store.get(fields["name"])
        give = _exporter(kind, key)
        texts = await self._of_versions(key, fields, lambda number, material: give(material))
        return Response(data={"name": key.ring.name, "type": key.ring.kind.shown["type"], "keys": texts})

    async def _wrapped_export(self, request: Request, fields: Fields) -> Response:
        algorithm = oaep_hash(fields["hash"])
        destination = await self._store.get(fields["destination"])
        if destination.ring.kind.family != RSA:
            raise InvalidRequest("the destination key must be an RSA key")
        source = await self._store.get(fields["source"])
        if not source.ring.exportable:
            raise InvalidRequest("key is not exportable")
        latest = destination.ring.latest
        to = (await self._store.material(destination, [latest]))[latest].public
        if not isinstance(to, rsa.RSAPublicKey):
            raise InvalidRequest("the destination key must be an RSA key")

        def wrapped(number: int, material: Material) -> str:
            return encode_base64(wrap(to, material.import_form(), algorithm))

        texts = await self._of_versions(source, fields, wrapped)
        return Response(data={"name": source.ring.name, "type": source.ring.kind.shown["type"], "keys": texts})

    async def _of_versions(self, key: Key, fields: Fields, give: Callable[[int, Material], str]) -> dict[str, str]:
        """``give`` of the versions that the request asks for, by their numbers."""
        text = fields.get("version") or ""
        number = version_number(key, text) if text else 0
        numbers = [number or key.ring.latest] if text else list(key.ring.usable())
        materials = await self._store.material(key, numbers)
        texts = await self._workers.map(
            lambda one: give(one, materials[one]), numbers, slow=key.ring.kind.slow, size=lambda one: 1
        )
        return {str(one): given for one, given in zip(numbers, texts, strict=True)}

    # --- backup ---

    async def _backup(self, request: Request, fields: Fields) -> Response:
        key = await self._store.get(fields["name"])
        if not key.ring.exportable:
            raise Failed("exporting is disallowed on the policy")
        if not key.ring.allow_plaintext_backup:
            raise Failed("plaintext backup is disallowed on the policy")
        materials = await self._store.material(key, key.ring.created_us)
        records = {number: material.record for number, material in materials.items()}
        return Response(data={"backup": await self._workers.run(pack, key.ring, records)})

    async def _restore(self, request: Request, fields: Fields) -> None:
        if not fields["backup"]:
            raise InvalidRequest("'backup' must be supplied")
        ring, records = await self._workers.run(unpack, fields["backup"])
        name: str = fields["name"] or ring.name
        if not _NAME.regex.fullmatch(name):
            raise InvalidRequest("invalid name for a key")
        ring.name = name
        await self._store.restore(ring, records, force=fields["force"])

    # --- import ---

    async def _wrapping_key(self, request: Request, fields: Fields) -> Response:
        material = await self._wrapping()
        return Response(data={"public_key": material.public_text()})

    async def _wrapping(self) -> Material:
        """The mount's own RSA key. The first to ask for it makes it, which a secondary leaves to the primary."""
        async with self._making_key:
            raw = await self._storage.get(_WRAPPING_PATH)
            if raw is not None:
                return Material(_WRAPPING, decode_version(raw))
            if not self._context.writable():
                raise ReadOnlyStorage
            record = await self._workers.generate(generate, _WRAPPING)
            await self._storage.put(_WRAPPING_PATH, encode_version(record))
            return Material(_WRAPPING, record)

    async def _import(self, request: Request, fields: Fields) -> None:
        settings: dict[str, Any] = {name: fields[name] for name in (*NEW_KEY, "allow_rotation")}
        ring = new_ring(fields["name"], uuid.uuid4().hex, settings | {"imported": True})
        make, _ = await self._importer(fields)
        record = await self._workers.run(make, ring)
        if ring.kind.family == HMAC:
            ring.key_size = len(record.secret)
        if not await self._store.create(ring, record):
            raise InvalidRequest(_KEY_EXISTS)

    async def _import_version(self, request: Request, fields: Fields) -> None:
        if fields["version"] < 0:
            raise InvalidRequest("there is no such key version")
        make, with_secret = await self._importer(fields)
        await self._store.add_imported(fields["name"], make, fields["version"], with_secret=with_secret)

    async def _importer(self, fields: Fields) -> tuple[Callable[[KeyRing], VersionRecord], bool]:
        """What makes a version of the material that was sent, and whether that has a secret."""
        if bool(fields["ciphertext"]) == bool(fields["public_key"]):
            raise InvalidRequest("either ciphertext or public_key must be provided, and not both")
        if fields["public_key"]:
            return partial(_public_version, fields["public_key"]), False
        algorithm = oaep_hash(fields["hash_function"])
        material = await self._wrapping()

        def make(ring: KeyRing) -> VersionRecord:
            key = material.private
            if not isinstance(key, rsa.RSAPrivateKey):
                raise InvalidRequest("the wrapping key is not an RSA key")
            return import_secret(ring.kind, unwrap(key, decode_base64(fields["ciphertext"], "ciphertext"), algorithm))

        return make, True


_NAME = Path(generic_name("name"), {}, {})


def _public_version(pem: str, ring: KeyRing) -> VersionRecord:
    if ring.derived:
        raise InvalidRequest("a derived key cannot be imported as a public key")
    return import_public(ring.kind, pem)


def _exporter(kind: str, key: Key) -> Callable[[Material], str]:
    """What gives a version's text. Raises InvalidRequest where the key does not have it or may not give it."""
    ring = key.ring
    if kind == "certificate-chain":
        return lambda material: pem_of_chain(material.record.chain)
    if kind == "public-key":
        if not ring.kind.asymmetric or ring.derived:
            raise InvalidRequest(f"keys of type {ring.type} have no public key to export")
        return lambda material: material.public_text()
    if not ring.exportable:
        raise InvalidRequest("private key material is not exportable")
    if kind == "hmac-key":
        return lambda material: encode_base64(material.record.hmac_key)
    if kind == "signing-key" and not ring.kind.signs:
        raise InvalidRequest(f"signing is not supported for keys of type {ring.type}")
    if kind == "encryption-key" and not ring.kind.encrypts:
        raise InvalidRequest(f"encryption is not supported for keys of type {ring.type}")
    return lambda material: material.private_text()
