"""Keys: create, read, list, delete, configure, rotate, trim; and the settings of the mount."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

import msgspec

from plugin_api.engine import EngineContext
from plugin_api.errors import InvalidRequest, NotFound, PluginError
from plugin_api.formats import format_time_us
from plugin_api.framework import Fields, FieldSpec, FieldType, Path, generic_name, writes
from plugin_api.request import Operation, Request, Response, list_response
from sidecar.engines.transit.certificates import pem_of_chain
from sidecar.engines.transit.encoding import decode_base64
from sidecar.engines.transit.keys import Key, KeyStore
from sidecar.engines.transit.material import Material
from sidecar.engines.transit.ring import KeyRing, new_ring
from sidecar.engines.transit.work import Workers

CACHE_SIZE_MIN = 10

_TEXT, _BOOL, _INT = FieldType.STRING, FieldType.BOOL, FieldType.INT

NEW_KEY = {
    "type": FieldSpec(_TEXT, description="Type of the key; aes256-gcm96 if not given."),
    "parameter_set": FieldSpec(_TEXT, description="Of an ml-dsa key: 44, 65 or 87."),
    "derived": FieldSpec(_BOOL, description="Whether every use needs a context, which leads to a key of its own."),
    "exportable": FieldSpec(_BOOL, description="Whether the key may be exported; cannot be taken back."),
    "allow_plaintext_backup": FieldSpec(_BOOL, description="Whether backups are allowed; cannot be taken back."),
    "auto_rotate_period": FieldSpec(FieldType.DURATION_S, description="Age at which the key rotates; 0 for never."),
}
_CREATE = NEW_KEY | {
    "convergent_encryption": FieldSpec(_BOOL, description="Whether equal inputs give equal ciphertexts."),
    "key_size": FieldSpec(_INT, description="Bytes of an HMAC key, 32 to 512."),
    "context": FieldSpec(_TEXT, description="Base64 context: a read then shows the derived public key."),
}
_CONFIG = {
    "min_decryption_version": FieldSpec(_INT, description="Oldest version that decrypts and verifies."),
    "min_encryption_version": FieldSpec(_INT, description="Oldest version that encrypts and signs; 0 for the latest."),
    "deletion_allowed": FieldSpec(_BOOL, description="Whether the key may be deleted."),
    "exportable": NEW_KEY["exportable"],
    "allow_plaintext_backup": NEW_KEY["allow_plaintext_backup"],
    "auto_rotate_period": NEW_KEY["auto_rotate_period"],
}


class Management:
    """Whatever writes a key is decided on the primary."""

    def __init__(self, context: EngineContext, store: KeyStore, workers: Workers) -> None:
        self._store = store
        self._workers = workers
        self._settings = Settings(context, store)

    @property
    def settings(self) -> Settings:
        return self._settings

    def paths(self) -> list[Path]:
        """The table."""
        key = "keys/" + generic_name("name")
        return [
            Path("keys/?", {}, {Operation.LIST: self._list}, help="The names of all keys."),
            Path(
                key,
                _CREATE,
                writes(self._create) | {Operation.READ: self._read, Operation.DELETE: self._delete},
                exists=self._exists,
                help="Creates, reads or deletes a key.",
                primary_only=True,
            ),
            Path(key + "/config", _CONFIG, writes(self._configure), help="Configures a key.", primary_only=True),
            Path(key + "/rotate", {}, writes(self._rotate), help="Adds a version to a key.", primary_only=True),
            Path(
                key + "/trim",
                {"min_available_version": FieldSpec(_INT, description="Oldest version to keep.")},
                writes(self._trim),
                help="Removes old versions of a key for ever.",
                primary_only=True,
            ),
            *self._settings.paths(),
        ]

    async def _exists(self, request: Request, fields: Fields) -> bool:
        return await self._store.exists(fields["name"])

    async def _list(self, request: Request, fields: Fields) -> Response:
        return list_response(await self._store.names())

    async def _create(self, request: Request, fields: Fields) -> Response:
        ring = new_ring(fields["name"], uuid.uuid4().hex, {name: fields[name] for name in _CREATE})
        created = await self._store.create(ring)
        warnings = [] if created else [f"key {ring.name} already existed"]
        return await self._described(ring.name, warnings)

    async def _read(self, request: Request, fields: Fields) -> Response:
        key = await self._store.find(fields["name"])
        if key is None:
            raise NotFound
        key = await self._store.get(fields["name"])
        context = decode_base64(fields["context"], "context") if fields["context"] else None
        return Response(data=key.ring.describe() | {"keys": await self._versions(key, context)})

    async def _described(self, name: str, warnings: list[str]) -> Response:
        key = await self._store.find(name)
        if key is None:
            raise NotFound
        data = key.ring.describe() | {"keys": await self._versions(key, None)}
        return Response(data=data, warnings=warnings)

    async def _versions(self, key: Key, context: bytes | None) -> dict[str, Any]:
        ring = key.ring
        if not ring.kind.asymmetric:
            return {str(number): ring.created_us[number] // 1_000_000 for number in ring.usable()}
        materials = await self._store.material(key, ring.usable())
        return await self._workers.run(_described_versions, ring, materials, context)

    async def _delete(self, request: Request, fields: Fields) -> None:
        await self._store.delete(fields["name"])

    async def _configure(self, request: Request, fields: Fields) -> Response:
        warnings = await self._store.change(fields["name"], lambda ring: ring.apply_config(fields))
        return await self._described(fields["name"], warnings)

    async def _rotate(self, request: Request, fields: Fields) -> Response:
        await self._store.rotate(fields["name"])
        return await self._described(fields["name"], [])

    async def _trim(self, request: Request, fields: Fields) -> Response:
        if not fields.given("min_available_version"):
            raise InvalidRequest("missing min_available_version")
        await self._store.trim(fields["name"], fields["min_available_version"])
        return await self._described(fields["name"], [])


def _described_versions(ring: KeyRing, materials: Mapping[int, Material], context: bytes | None) -> dict[str, Any]:
    return {str(number): _described_version(ring, number, material, context) for number, material in materials.items()}


def _described_version(ring: KeyRing, number: int, material: Material, context: bytes | None) -> dict[str, Any]:
    if ring.derived:
        # Such a key has a public half for every context and none of its own.
        public = material.public_text(context) if context is not None and material.has_secret else ""
    else:
        public = material.public_text()
    return {
        "name": ring.kind.label,
        "public_key": public,
        "creation_time": format_time_us(ring.created_us[number]),
        "certificate_chain": pem_of_chain(material.record.chain),
    }


class Settings:
    """``config/keys`` and ``cache-config``: one small entry each."""

    def __init__(self, context: EngineContext, store: KeyStore) -> None:
        self._storage = context.storage
        self._store = store

    def paths(self) -> list[Path]:
        """The table."""
        return [
            Path(
                "config/keys",
                {"disable_upsert": FieldSpec(_BOOL, description="Whether encrypting may not create keys.")},
                writes(self._write_keys) | {Operation.READ: self._read_keys},
                help="Settings for all keys.",
                primary_only=True,
            ),
            Path(
                "cache-config",
                {"size": FieldSpec(_INT, description="Keys to hold in memory; 0 for as many as the server likes.")},
                writes(self._write_cache) | {Operation.READ: self._read_cache},
                help="How many keys are held in memory.",
                primary_only=True,
            ),
        ]

    async def may_upsert(self) -> bool:
        """Whether encrypting may create a key."""
        return not (await self._load("config/keys")).get("disable_upsert", 0)

    async def _load(self, path: str) -> dict[str, int]:
        raw = await self._storage.get(path)
        if raw is None:
            return {}
        try:
            return msgspec.msgpack.decode(raw, type=dict[str, int])
        except msgspec.DecodeError:
            raise PluginError("stored settings cannot be read") from None

    async def _read_keys(self, request: Request, fields: Fields) -> Response:
        return Response(data={"disable_upsert": not await self.may_upsert()})

    async def _write_keys(self, request: Request, fields: Fields) -> Response:
        if fields.given("disable_upsert"):
            value = {"disable_upsert": int(fields["disable_upsert"])}
            await self._storage.put("config/keys", msgspec.msgpack.encode(value))
        return await self._read_keys(request, fields)

    async def _read_cache(self, request: Request, fields: Fields) -> Response:
        return Response(data={"size": (await self._load("cache-config")).get("size", 0)})

    async def _write_cache(self, request: Request, fields: Fields) -> Response:
        size: int = fields["size"]
        if size < 0 or 0 < size < CACHE_SIZE_MIN:
            raise InvalidRequest(f"size must be 0 or a value greater or equal to {CACHE_SIZE_MIN}")
        await self._storage.put("cache-config", msgspec.msgpack.encode({"size": size}))
        self._store.limit_cache(size)
        return Response(data={"size": size})
