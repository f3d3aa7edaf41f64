"""KV version 2: numbered versions, check-and-set, soft deletion, metadata of its own.

Storage: ``config``; ``metadata/<path>`` (msgpack, so that LIST is a listing of it); ``versions/<path>/<n>`` (JSON). The
metadata is the truth: a version that it does not name does not exist, and it never names one whose data is gone unless
that one is destroyed. So each change is one commit of both, and long runs of versions go in several such steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, TypeVar

import msgspec

from plugin_api.engine import EngineContext
from plugin_api.errors import InvalidRequest, NotFound, PluginError
from plugin_api.framework import Fields, FieldSpec, FieldType, Path, PathEngine, writes
from plugin_api.locks import KeyedLock
from plugin_api.request import Operation, Request, Response, list_response
from plugin_api.storage import Write
from sidecar.engines.json_values import decode_object, encode_json, keys_only, merge_patch
from sidecar.engines.kv_metadata import Config, KeyMetadata, check_cas, checked_custom

VERSIONS_PER_COMMIT_MAX = 32
"""Version data removed in one commit; half of the 61 data operations that the smallest Consul transaction leaves."""

_CONFIG_KEY = "config"

_PATH = FieldSpec(FieldType.STRING, description="Location of the secret.")
_VERSION = FieldSpec(
    FieldType.INT, description="Version to read; the current one if 0 or missing.", query_of=(Operation.READ,)
)
_VERSIONS = FieldSpec(FieldType.INT_LIST, description="Version numbers.")
_OPTIONS = FieldSpec(FieldType.MAP, description="Options of the write; cas: the version it must replace, 0 for none.")
_DATA = FieldSpec(FieldType.MAP, description="The contents of the secret.")
_SETTINGS = {
    "max_versions": FieldSpec(FieldType.INT, description="Versions to keep per key; 0: the mount's number, or 10."),
    "cas_required": FieldSpec(FieldType.BOOL, description="Whether every write must carry cas."),
    "delete_version_after": FieldSpec(FieldType.SIGNED_DURATION_S, description="Age at which versions vanish."),
}
_SHORT_READ = (
    "Invalid path for a versioned K/V secrets engine. See the API docs for the appropriate API endpoints to use. "
    "If using the Vault CLI, use 'vault kv {command}' for this operation."
)
_CLI_COMMANDS = {
    Operation.CREATE: "put",
    Operation.UPDATE: "put",
    Operation.PATCH: "patch",
    Operation.READ: "get",
    Operation.LIST: "list",
    Operation.DELETE: "delete",
}

_Record = TypeVar("_Record")
_CONFIG_DECODER = msgspec.msgpack.Decoder(Config)
_METADATA_DECODER = msgspec.msgpack.Decoder(KeyMetadata)


class KVv2(PathEngine):
    """One versioned key/value mount."""

    type_name: ClassVar[str] = "kv"

    def __init__(self, context: EngineContext) -> None:
        super().__init__(context)
        self._storage = context.storage
        self._locks = KeyedLock()

    def paths(self) -> Sequence[Path]:
        return [
            Path(
                "config",
                _SETTINGS,
                writes(self._write_config) | {Operation.READ: self._read_config},
                help="Settings for every key of this mount.",
                primary_only=True,
            ),
            Path(
                "data/(?P<path>.*)",
                {"path": _PATH, "version": _VERSION, "options": _OPTIONS, "data": _DATA},
                writes(self._write_data)
                | {
                    Operation.READ: self._read_data,
                    Operation.PATCH: self._patch_data,
                    Operation.DELETE: self._delete_latest,
                },
                exists=self._exists,
                help="Writes, patches, reads and deletes data of a secret.",
                primary_only=True,
            ),
            Path(
                "metadata/(?P<path>.*)",
                {
                    "path": _PATH,
                    "custom_metadata": FieldSpec(FieldType.MAP, description="Texts that are kept with the secret."),
                    **_SETTINGS,
                },
                writes(self._write_metadata)
                | {
                    Operation.READ: self._read_metadata,
                    Operation.PATCH: self._patch_metadata,
                    Operation.DELETE: self._delete_metadata,
                    Operation.LIST: self._list,
                },
                exists=self._exists,
                help="Settings and versions of a secret; DELETE removes it with all versions.",
                primary_only=True,
            ),
            *self._paths_of_versions(),
            Path(
                "subkeys/(?P<path>.*)",
                {
                    "path": _PATH,
                    "version": _VERSION,
                    "depth": FieldSpec(FieldType.INT, description="Levels of keys to show; 0 for all."),
                },
                {Operation.READ: self._read_subkeys},
                help="The keys of a secret with null for every value.",
            ),
            Path(".*", {}, dict.fromkeys(Operation, self._wrong_path), free_form=True),
        ]

    def _paths_of_versions(self) -> list[Path]:
        fields = {"path": _PATH, "versions": _VERSIONS}
        rows = (
            ("delete", self._delete_versions, "Deletes versions of a secret; undelete brings them back."),
            ("undelete", self._undelete_versions, "Brings deleted versions of a secret back."),
            ("destroy", self._destroy_versions, "Removes the data of versions of a secret for good."),
        )
        return [
            Path(f"{verb}/(?P<path>.*)", fields, writes(handler), help=text, primary_only=True)
            for verb, handler, text in rows
        ]

    async def _wrong_path(self, request: Request, fields: Fields) -> Response:
        return Response(status=404, warnings=[_SHORT_READ.format(command=_CLI_COMMANDS[request.operation])])

    # --- the mount's settings ---

    async def _config(self) -> Config:
        raw = await self._storage.get(_CONFIG_KEY)
        return Config() if raw is None else _decoded(raw, _CONFIG_DECODER)

    async def _read_config(self, request: Request, fields: Fields) -> Response:
        return Response(data=(await self._config()).describe())

    async def _write_config(self, request: Request, fields: Fields) -> None:
        async with self._locks.hold(_CONFIG_KEY):
            config = await self._config()
            _apply_settings(config, fields)
            await self._storage.put(_CONFIG_KEY, msgspec.msgpack.encode(config))

    # --- data ---

    async def _exists(self, request: Request, fields: Fields) -> bool:
        return _names_a_secret(fields["path"]) and await self._storage.exists(_metadata_key(fields["path"]))

    async def _read_data(self, request: Request, fields: Fields) -> Response:
        return await self._read_version(fields, "data", lambda data: data)

    async def _read_subkeys(self, request: Request, fields: Fields) -> Response:
        depth = fields["depth"]
        if depth < 0:
            raise InvalidRequest("depth cannot be negative")
        return await self._read_version(fields, "subkeys", lambda data: keys_only(data, depth))

    async def _read_version(self, fields: Fields, name: str, view: Any) -> Response:
        path = _secret_to_read(fields)
        found = await self._load_version(path, fields["version"])
        if found is None:
            # Between the two reads another request may have pruned or destroyed it; under the lock nothing can.
            async with self._locks.hold(path):
                found = await self._load_version(path, fields["version"])
        if found is None:
            raise PluginError("the data of a version that exists could not be found")
        metadata, raw = found
        if raw is None:
            return Response(data={name: None, "metadata": metadata}, status=404)
        return Response(data={name: view(decode_object(raw)), "metadata": metadata})

    async def _load_version(self, path: str, number: int) -> tuple[dict[str, Any], bytes | None] | None:
        """A version's description and data (None when deleted or destroyed), or None when its data is missing."""
        metadata = await self._metadata(path)
        if metadata is None:
            raise NotFound
        number = number or metadata.current
        version = metadata.versions.get(number)
        if version is None:
            raise NotFound
        if not version.readable(self._now_us()):
            return metadata.describe_version(number), None
        raw = await self._storage.get(_version_key(path, number))
        return None if raw is None else (metadata.describe_version(number), raw)

    async def _write_data(self, request: Request, fields: Fields) -> Response:
        path = _secret(fields)
        data = _sent_data(request)
        config = await self._config()
        async with self._locks.hold(path):
            metadata = await self._metadata(path)
            check_cas(fields["options"], config, metadata)
            return await self._add_version(path, metadata or self._new_metadata(), config, data)

    async def _patch_data(self, request: Request, fields: Fields) -> Response:
        path = _secret(fields)
        patch = _sent_data(request)
        config = await self._config()
        async with self._locks.hold(path):
            metadata = await self._metadata(path)
            current = metadata.versions.get(metadata.current) if metadata is not None else None
            if metadata is None or current is None:
                raise NotFound
            check_cas(fields["options"], config, metadata)
            if not current.readable(self._now_us()):
                return Response(data=metadata.describe_version(metadata.current), status=404)
            raw = await self._storage.get(_version_key(path, metadata.current))
            if raw is None:
                raise PluginError("the data of a version that exists could not be found")
            return await self._add_version(path, metadata, config, merge_patch(decode_object(raw), patch))

    async def _add_version(self, path: str, metadata: KeyMetadata, config: Config, data: dict[str, Any]) -> Response:
        number = metadata.add_version(config, self._now_us())
        old = metadata.prunable(config)
        new_data = Write(_version_key(path, number), encode_json(data))
        await self._prune(path, metadata, old[:VERSIONS_PER_COMMIT_MAX], [new_data])
        answer = metadata.describe_version(number)
        for start in range(VERSIONS_PER_COMMIT_MAX, len(old), VERSIONS_PER_COMMIT_MAX):
            await self._prune(path, metadata, old[start : start + VERSIONS_PER_COMMIT_MAX], [])
        return Response(data=answer)

    async def _prune(self, path: str, metadata: KeyMetadata, numbers: list[int], with_writes: list[Write]) -> None:
        metadata.prune(numbers)
        removals = [Write(_version_key(path, number), None) for number in numbers]
        await self._storage.commit([*with_writes, *removals, _metadata_write(path, metadata)])

    # --- deletion ---

    async def _delete_latest(self, request: Request, fields: Fields) -> None:
        path = _secret(fields)
        async with self._locks.hold(path):
            metadata = await self._metadata(path)
            if metadata is not None:
                await self._mark_deleted(path, metadata, [metadata.current])

    async def _delete_versions(self, request: Request, fields: Fields) -> None:
        path, numbers = _secret(fields), _numbers(fields)
        async with self._locks.hold(path):
            metadata = await self._metadata(path)
            if metadata is not None:
                await self._mark_deleted(path, metadata, numbers)

    async def _mark_deleted(self, path: str, metadata: KeyMetadata, numbers: Iterable[int]) -> None:
        now_us = self._now_us()
        changed = False
        for number in numbers:
            version = metadata.versions.get(number)
            if version is not None and version.readable(now_us):
                version.deletion_us = now_us
                changed = True
        if changed:
            await self._storage.commit([_metadata_write(path, metadata)])

    async def _undelete_versions(self, request: Request, fields: Fields) -> None:
        path, numbers = _secret(fields), _numbers(fields)
        async with self._locks.hold(path):
            metadata = await self._metadata(path)
            if metadata is None:
                return
            changed = False
            for number in numbers:
                version = metadata.versions.get(number)
                if version is not None and not version.destroyed and version.deletion_us:
                    version.deletion_us = 0
                    changed = True
            if changed:
                await self._storage.commit([_metadata_write(path, metadata)])

    async def _destroy_versions(self, request: Request, fields: Fields) -> None:
        path, numbers = _secret(fields), _numbers(fields)
        async with self._locks.hold(path):
            metadata = await self._metadata(path)
            if metadata is not None:
                await self._destroy(path, metadata, [n for n in metadata.alive() if n in numbers])

    async def _destroy(self, path: str, metadata: KeyMetadata, numbers: Sequence[int]) -> None:
        for start in range(0, len(numbers), VERSIONS_PER_COMMIT_MAX):
            step = numbers[start : start + VERSIONS_PER_COMMIT_MAX]
            for number in step:
                metadata.versions[number].destroyed = True
            removals = [Write(_version_key(path, number), None) for number in step]
            await self._storage.commit([*removals, _metadata_write(path, metadata)])

    # --- metadata ---

    async def _metadata(self, path: str) -> KeyMetadata | None:
        raw = await self._storage.get(_metadata_key(path))
        return None if raw is None else _decoded(raw, _METADATA_DECODER)

    def _new_metadata(self) -> KeyMetadata:
        now_us = self._now_us()
        return KeyMetadata(created_us=now_us, updated_us=now_us)

    def _now_us(self) -> int:
        return round(self.context.now() * 1_000_000)

    async def _list(self, request: Request, fields: Fields) -> Response:
        prefix = fields["path"]
        if prefix and not prefix.endswith("/"):
            prefix += "/"
        return list_response(await self._storage.list(_metadata_key(prefix)))

    async def _read_metadata(self, request: Request, fields: Fields) -> Response:
        metadata = await self._metadata(_secret_to_read(fields))
        if metadata is None:
            raise NotFound
        return Response(data=metadata.describe())

    async def _write_metadata(self, request: Request, fields: Fields) -> Response | None:
        path = _secret(fields)
        custom = checked_custom(fields["custom_metadata"], nulls=False)
        if not any(fields.given(name) for name in ("custom_metadata", *_SETTINGS)):
            return None
        config = await self._config()
        async with self._locks.hold(path):
            metadata = await self._metadata(path) or self._new_metadata()
            _apply_settings(metadata, fields)
            if fields.given("custom_metadata"):
                metadata.custom = {name: value for name, value in custom.items() if value is not None}
            await self._storage.commit([_metadata_write(path, metadata)])
        return _settings_warning(config, fields)

    async def _patch_metadata(self, request: Request, fields: Fields) -> Response | None:
        path = _secret(fields)
        changes = checked_custom(fields["custom_metadata"], nulls=True)
        config = await self._config()
        async with self._locks.hold(path):
            metadata = await self._metadata(path)
            if metadata is None:
                raise NotFound
            _apply_settings(metadata, fields)
            if fields.given("custom_metadata"):
                # A null for the whole map removes it, as a merge patch says.
                old = {} if request.data.get("custom_metadata") is None else metadata.custom
                merged = {name: value for name, value in (old | changes).items() if value is not None}
                checked_custom(dict(merged), nulls=False)
                metadata.custom = merged
            await self._storage.commit([_metadata_write(path, metadata)])
        return _settings_warning(config, fields)

    async def _delete_metadata(self, request: Request, fields: Fields) -> None:
        path = _secret(fields)
        async with self._locks.hold(path):
            metadata = await self._metadata(path)
            if metadata is None:
                return
            alive = metadata.alive()
            last = alive[-VERSIONS_PER_COMMIT_MAX:]
            await self._destroy(path, metadata, alive[: len(alive) - len(last)])
            removals = [Write(_version_key(path, number), None) for number in last]
            await self._storage.commit([*removals, Write(_metadata_key(path), None)])


def _metadata_key(path: str) -> str:
    return f"metadata/{path}"


def _version_key(path: str, number: int) -> str:
    return f"versions/{path}/{number}"


def _metadata_write(path: str, metadata: KeyMetadata) -> Write:
    return Write(_metadata_key(path), msgspec.msgpack.encode(metadata))


def _decoded(raw: bytes, decoder: msgspec.msgpack.Decoder[_Record]) -> _Record:
    try:
        return decoder.decode(raw)
    except msgspec.DecodeError:
        raise PluginError("a stored record of this mount cannot be read") from None


def _names_a_secret(path: str) -> bool:
    return bool(path) and not path.endswith("/")


def _secret_to_read(fields: Fields) -> str:
    path: str = fields["path"]
    if not _names_a_secret(path):
        raise NotFound
    return path


def _secret(fields: Fields) -> str:
    path: str = fields["path"]
    if not path:
        raise InvalidRequest("missing path")
    if not _names_a_secret(path):
        raise InvalidRequest("a secret's path cannot end in '/'")
    return path


def _sent_data(request: Request) -> dict[str, Any]:
    data = request.data.get("data")
    if data is None:
        raise InvalidRequest("no data provided")
    if not isinstance(data, dict):
        raise InvalidRequest('error converting input for field "data": expected a map')
    return data


def _numbers(fields: Fields) -> frozenset[int]:
    numbers = frozenset[int](fields["versions"])
    if not numbers:
        raise InvalidRequest("No version number provided")
    return numbers


def _apply_settings(target: Config | KeyMetadata, fields: Fields) -> None:
    """Take over the settings that were sent; null is a setting's default."""
    if fields.given("max_versions"):
        if fields["max_versions"] < 0:
            raise InvalidRequest("max_versions cannot be negative")
        target.max_versions = fields["max_versions"]
    if fields.given("cas_required"):
        target.cas_required = fields["cas_required"]
    if fields.given("delete_version_after"):
        target.delete_version_after_s = fields["delete_version_after"]


def _settings_warning(config: Config, fields: Fields) -> Response | None:
    if config.cas_required and fields.given("cas_required") and not fields["cas_required"]:
        return Response(
            warnings=[
                '"cas_required" set to false, but is mandated by backend config. This value will be ignored.',
            ]
        )
    return None
