"""The mount tables: which engine or auth method answers at which path.

One entry per mount: replicated at ``r/core/<table>/<uuid>``, local at ``l/core/<table>/<uuid>``. Replicated entries
keep uuid and accessor on every cluster of a set; the uuid is also the partition the mount's data lives in.
"""

from __future__ import annotations

import asyncio
import os
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TypedDict, Unpack

import msgspec

from consul_backend.wal import Write
from plugin_api.errors import InvalidRequest, ReadOnlyStorage
from sidecar.core.lockout_rules import LockoutTuning
from sidecar.core.metrics import Labelled
from sidecar.core.store_view import SealedStore, read_many, walk

SECRETS = "mounts"
AUTH = "auth"
TABLES = (SECRETS, AUTH)
CLASSES = ("r", "l")
SYSTEM_TTL_MAX_S = 10 * 365 * 86400

_RESERVED = ("sys/", "auth/", "cubbyhole/", "identity/", "audit/")
_DELETES_AT_ONCE = 48


class MountConfig(msgspec.Struct, frozen=True, omit_defaults=True):
    """What can be tuned. TTLs in seconds, 0 means the system's default."""

    default_lease_ttl_s: int = 0
    max_lease_ttl_s: int = 0
    force_no_cache: bool = False
    listing_visibility: str = ""
    token_type: str = ""
    passthrough_request_headers: tuple[str, ...] = ()
    allowed_response_headers: tuple[str, ...] = ()
    audit_non_hmac_request_keys: tuple[str, ...] = ()
    audit_non_hmac_response_keys: tuple[str, ...] = ()
    user_lockout: LockoutTuning | None = None


class MountEntry(msgspec.Struct, frozen=True, omit_defaults=True):
    """One mount. ``path`` ends in ``/`` and is without ``auth/`` also in the auth table. ``local`` never changes.
    ``seal_wrap`` and ``external_entropy_access`` are kept and shown, and change nothing, as in Vault's open server."""

    path: str
    type: str
    uuid: str
    accessor: str
    table: str
    description: str = ""
    options: dict[str, str] | None = None
    config: MountConfig = MountConfig()
    local: bool = False
    seal_wrap: bool = False
    external_entropy_access: bool = False

    @property
    def full_path(self) -> str:
        """The path requests begin with."""
        return f"auth/{self.path}" if self.table == AUTH else self.path

    @property
    def storage_class(self) -> str:
        """The class of the mount's main storage."""
        return "l" if self.local else "r"

    @property
    def key(self) -> str:
        """Where the entry is stored."""
        return f"{self.storage_class}/core/{self.table}/{self.uuid}"


class MountSettings(TypedDict, total=False):
    """What whoever mounts may say of a mount; :class:`MountEntry` has what goes without saying."""

    description: str
    options: dict[str, str] | None
    config: MountConfig
    local: bool
    seal_wrap: bool
    external_entropy_access: bool


def new_mount(
    table: str,
    path: str,
    type_name: str,
    random_bytes: Callable[[int], bytes],
    **settings: Unpack[MountSettings],
) -> MountEntry:
    """An entry with a fresh uuid and accessor (``kv_1a2b3c4d``, ``auth_userpass_1a2b3c4d``)."""
    prefix = "auth_" if table == AUTH else ""
    return MountEntry(
        path=path,
        type=type_name,
        uuid=str(uuid.UUID(bytes=random_bytes(16), version=4)),
        accessor=f"{prefix}{type_name}_{random_bytes(4).hex()}",
        table=table,
        **settings,
    )


def built_in_mounts(random_bytes: Callable[[int], bytes]) -> list[MountEntry]:
    """The mounts every cluster has."""
    return [
        new_mount(
            SECRETS,
            "sys/",
            "system",
            random_bytes,
            description="system endpoints used for control, policy and debugging",
        ),
        built_in_cubbyhole(random_bytes),
        new_mount(AUTH, "token/", "token", random_bytes, description="token based credentials"),
    ]


def built_in_cubbyhole(random_bytes: Callable[[int], bytes]) -> MountEntry:
    """The one built-in mount that is local, so that each cluster makes its own."""
    description = "per-token private secret storage"
    return new_mount(SECRETS, "cubbyhole/", "cubbyhole", random_bytes, description=description, local=True)


def encode_mount(entry: MountEntry) -> Write:
    """``entry`` as it is stored, before the barrier."""
    return Write(entry.key, msgspec.json.encode(entry))


def clean_mount_path(path: str) -> str:
    """``path`` with its trailing slash. Raises InvalidRequest for one that no request could reach unambiguously."""
    cleaned = path.removesuffix("/") + "/"
    segments = cleaned[:-1].split("/")
    if not path or any(segment in ("", ".", "..") for segment in segments):
        raise InvalidRequest("invalid mount path: it must not be empty or hold empty, '.' or '..' segments")
    if not cleaned.isprintable() or cleaned != cleaned.strip() or any(mark in cleaned for mark in "*+?#%\\"):
        raise InvalidRequest("invalid mount path: it must be printable and hold none of '*', '+', '?', '#', '%', '\\'")
    return cleaned


class MountTable:
    """Both tables, loaded once and kept exact. ``plugin_types`` gives the types known for a table. A replicated mount
    that is ``hidden``, by uuid, is kept and shown to nobody: a filter withholds it from this cluster."""

    def __init__(
        self,
        sealed: SealedStore,
        writable: Callable[[], bool],
        *,
        plugin_types: Callable[[str], Collection[str]] | None = None,
        hidden: Callable[[str], bool] = lambda mount_uuid: False,
        random_bytes: Callable[[int], bytes] = os.urandom,
    ) -> None:
        self._sealed = sealed
        self._writable = writable
        self._plugin_types = plugin_types
        self._hidden = hidden
        self._random_bytes = random_bytes
        self._entries: dict[str, MountEntry] = {}
        self._replicated: tuple[MountEntry, ...] | None = None
        self._sizes: dict[str, tuple[MountEntry, int]] = {}
        self._tables_lock = asyncio.Lock()
        self._purge_lock = asyncio.Lock()

    async def load(self) -> None:
        """Read both tables."""
        entries: dict[str, MountEntry] = {}
        for storage_class in CLASSES:
            for table in TABLES:
                folder = f"{storage_class}/core/{table}/"
                keys = [folder + name for name in await self._sealed.list(folder)]
                for entry in await self._read(keys):
                    entries[entry.key] = entry
        self._entries, self._replicated = entries, None

    def entries(self, table: str) -> list[MountEntry]:
        """The table's entries, sorted by path. A local mount hides a replicated one at the same path, which can only
        have come from the primary later."""
        by_path: dict[str, MountEntry] = {}
        for entry in self._entries.values():
            if entry.table != table or (not entry.local and self._hidden(entry.uuid)):
                continue
            if entry.local or entry.path not in by_path:
                by_path[entry.path] = entry
        return [by_path[path] for path in sorted(by_path)]

    def gauges(self) -> dict[str, float]:
        """Numbers of mounts and the bytes that their entries take, by the names of the telemetry."""
        counts: Counter[Labelled] = Counter()
        sizes: dict[str, tuple[MountEntry, int]] = {}
        for kind, table in (("logical", SECRETS), ("auth", AUTH)):
            for entry in self.entries(table):
                labels = {"type": kind, "local": str(entry.local).lower()}
                counts[Labelled("core.mount_table.num_entries", **labels)] += 1
                sizes[entry.uuid] = size = self._sized(entry)
                counts[Labelled("core.mount_table.size", **labels)] += size[1]
        self._sizes = sizes
        return {name: float(count) for name, count in counts.items()}

    def _sized(self, entry: MountEntry) -> tuple[MountEntry, int]:
        known = self._sizes.get(entry.uuid)
        return known if known and known[0] is entry else (entry, len(encode_mount(entry).value or b""))

    def replicated(self) -> tuple[MountEntry, ...]:
        """Every replicated mount of both tables, hidden or not; the same object until a table changes."""
        if self._replicated is None:
            self._replicated = tuple([entry for entry in self._entries.values() if not entry.local])
        return self._replicated

    def find(self, table: str, path: str) -> MountEntry | None:
        """The mount at exactly ``path`` (with or without its trailing slash)."""
        wanted = path.removesuffix("/") + "/"
        return next((entry for entry in self.entries(table) if entry.path == wanted), None)

    async def mount(
        self,
        table: str,
        path: str,
        type_name: str,
        *,
        check: Callable[[MountEntry], None] | None = None,
        **settings: Unpack[MountSettings],
    ) -> MountEntry:
        """Add a mount, unless ``check`` raises for it. Raises InvalidRequest, ReadOnlyStorage."""
        path = clean_mount_path(path)
        if not type_name:
            raise InvalidRequest("backend type must be specified as a string")
        if self._plugin_types is not None and type_name not in self._plugin_types(table):
            raise InvalidRequest(f"plugin not found in the catalog: {type_name}")
        check_config(settings.get("config", MountConfig()))
        async with self._tables_lock:
            self._require_free(table, path)
            entry = new_mount(table, path, type_name, self._random_bytes, **settings)
            if check is not None:
                check(entry)
            await self._store(entry)
            return entry

    async def unmount(self, table: str, path: str) -> MountEntry | None:
        """Remove a mount; None where there is none. Its data is deleted by :meth:`purge` afterwards, under a mark of
        the same commit. Raises InvalidRequest, ReadOnlyStorage."""
        async with self._tables_lock:
            entry = self.find(table, path)
            self._require_removable(table, path.removesuffix("/") + "/")
            if entry is None:
                return None
            self._require_writable(entry)
            await self._sealed.commit([Write(entry.key, None), _purge_mark("l", entry.uuid), *self._shared_mark(entry)])
            del self._entries[entry.key]
            self._replicated = None
            return entry

    async def tune(
        self,
        table: str,
        path: str,
        *,
        config: MountConfig | None = None,
        description: str | None = None,
        options: Mapping[str, str] | None = None,
    ) -> MountEntry:
        """Change what is given (``options`` are merged). Raises InvalidRequest, ReadOnlyStorage."""
        async with self._tables_lock:
            entry = self.find(table, path)
            if entry is None:
                shown = path.removesuffix("/") + "/"
                raise InvalidRequest(f'cannot fetch sysview for path "{"auth/" if table == AUTH else ""}{shown}"')
            check_config(config or entry.config)
            tuned = msgspec.structs.replace(
                entry,
                config=config or entry.config,
                description=entry.description if description is None else description,
                options=entry.options if options is None else {**(entry.options or {}), **options},
            )
            await self._store(tuned)
            return tuned

    def check_remount(self, source: str, target: str) -> tuple[MountEntry, str]:
        """What :meth:`remount` would move, and its new path in the table. Raises as that does."""
        table, source, target = _remount_places(source, target)
        entry = self.find(table, source)
        if entry is None:
            raise InvalidRequest(
                f'no matching mount at "{"auth/" if table == AUTH else ""}{source.removesuffix("/")}/"'
            )
        self._require_removable(table, entry.path)
        self._require_free(table, target)
        self._require_writable(entry)
        return entry, target

    async def remount(self, source: str, target: str) -> MountEntry:
        """Move a mount; its data stays in its partition. Auth mounts are named with ``auth/`` and stay auth mounts.
        Raises InvalidRequest, ReadOnlyStorage."""
        async with self._tables_lock:
            entry, path = self.check_remount(source, target)
            moved = msgspec.structs.replace(entry, path=path)
            await self._store(moved)
            return moved

    def paths(self) -> set[str]:
        """The full paths of everything mounted."""
        return {entry.full_path for entry in self._entries.values()}

    async def invalidate(self, keys: Iterable[str]) -> bool:
        """Replication changed these logical keys. True if a table changed, so that the router must be rebuilt.
        The local data of a mount that went is marked for :meth:`purge`."""
        folders = tuple(f"{storage_class}/core/{table}/" for storage_class in CLASSES for table in TABLES)
        changed = [key for key in keys if key.startswith(folders)]
        if not changed:
            return False
        async with self._tables_lock:
            read = {entry.key: entry for entry in await self._read(changed)}
            gone = [self._entries[key].uuid for key in changed if key in self._entries and key not in read]
            if gone:
                await self._sealed.commit([_purge_mark("l", mount_uuid) for mount_uuid in gone])
            for key in changed:
                self._entries.pop(key, None)
            self._entries.update(read)
            self._replicated = None
        return True

    async def purge(self) -> int:
        """Delete the data of unmounted mounts; returns how many entries went. Safe to cut short and to repeat."""
        deleted = 0
        async with self._purge_lock:
            for storage_class in CLASSES:
                if storage_class == "r" and not self._writable():
                    continue
                marks = f"{storage_class}/core/purge/"
                for mount_uuid in await self._sealed.list(marks):
                    deleted += await self._purge_partition(f"{storage_class}/{mount_uuid}/")
                    await self._sealed.delete(marks + mount_uuid)
        return deleted

    async def _purge_partition(self, prefix: str) -> int:
        deleted = 0
        while keys := await walk(self._sealed, prefix, _DELETES_AT_ONCE):
            await self._sealed.commit([Write(key, None) for key in keys])
            deleted += len(keys)
        return deleted

    async def _read(self, keys: Sequence[str]) -> list[MountEntry]:
        return [msgspec.json.decode(raw, type=MountEntry) for raw in await read_many(self._sealed, keys)]

    async def _store(self, entry: MountEntry) -> None:
        self._require_writable(entry)
        await self._sealed.commit([encode_mount(entry)])
        self._entries[entry.key], self._replicated = entry, None

    def _require_writable(self, entry: MountEntry) -> None:
        if not entry.local and not self._writable():
            raise ReadOnlyStorage

    def _require_free(self, table: str, path: str) -> None:
        if table == SECRETS:
            if path.startswith(_RESERVED):
                raise InvalidRequest(f'cannot mount "{path}"')
        elif path == "token/" or path.startswith("token/"):
            raise InvalidRequest("path is already in use at token/")
        for entry in self.entries(table):
            # Neither may hide a part of the other.
            if entry.path.startswith(path) or path.startswith(entry.path):
                raise InvalidRequest(f"path is already in use at {entry.path}")

    def _require_removable(self, table: str, path: str) -> None:
        if table == AUTH and path == "token/":
            raise InvalidRequest("token credential backend cannot be disabled")
        if table == SECRETS and path in _RESERVED:
            raise InvalidRequest(f'cannot unmount "{path}"')

    def _shared_mark(self, entry: MountEntry) -> list[Write]:
        return [] if entry.local else [_purge_mark("r", entry.uuid)]


def _remount_places(source: str, target: str) -> tuple[str, str, str]:
    """(table, path there, new path there). Raises InvalidRequest."""
    table = AUTH if source.startswith("auth/") else SECRETS
    if (table == AUTH) != target.startswith("auth/"):
        raise InvalidRequest("cannot remount between the auth and the secrets table")
    if table == AUTH:
        source, target = source.removeprefix("auth/"), target.removeprefix("auth/")
    return table, source, clean_mount_path(target)


def _purge_mark(storage_class: str, mount_uuid: str) -> Write:
    return Write(f"{storage_class}/core/purge/{mount_uuid}", b"")


def check_config(config: MountConfig) -> None:
    """Raises InvalidRequest for TTLs out of range or in the wrong order, and for words that mean nothing."""
    default_s, max_s = config.default_lease_ttl_s, config.max_lease_ttl_s
    if not 0 <= default_s <= SYSTEM_TTL_MAX_S or not 0 <= max_s <= SYSTEM_TTL_MAX_S:
        raise InvalidRequest("lease TTLs must not be negative or longer than ten years")
    if max_s and default_s > max_s:
        raise InvalidRequest(
            f"backend max lease TTL of {max_s} would be less than backend default lease TTL of {default_s}"
        )
    if config.listing_visibility not in ("", "hidden", "unauth"):
        raise InvalidRequest(f'invalid value for listing_visibility: "{config.listing_visibility}"')
    if config.token_type not in ("", "default-service", "default-batch", "service", "batch"):
        raise InvalidRequest(f'invalid value for token_type: "{config.token_type}"')
