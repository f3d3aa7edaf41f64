"""The store of keys, with what is in use kept in memory.

Storage: ``key/<name>`` (a :class:`~sidecar.engines.transit.ring.KeyRing`), ``version/<uid>/<number>``, and
``garbage/<uid>`` for versions that nothing names any more. The ring is the truth: every change of a key is one commit
of it together with the versions it gains or loses. Where these are more than one commit may hold, they are written
under a new uid before the ring names it, or removed after the ring was, with a garbage mark that outlives a crash.
"""

from __future__ import annotations

import asyncio
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from plugin_api.engine import EngineContext
from plugin_api.errors import Failed, InvalidRequest, PluginError, ReadOnlyStorage
from plugin_api.locks import KeyedLock
from plugin_api.storage import Write
from sidecar.engines.transit.material import Material, VersionRecord, decode_version, encode_version, generate
from sidecar.engines.transit.ring import KeyRing, decode_ring, encode_ring
from sidecar.engines.transit.work import Workers

VERSIONS_PER_COMMIT_MAX = 32
"""Half of the 61 data operations that the smallest Consul transaction leaves; 32 RSA keys are 100 KB."""

CACHED_KEYS_MAX = 10_000
VERSIONS_READ_AT_ONCE = 32

NOT_FOUND = "encryption key not found"


@dataclass(slots=True)
class Key:
    """A key in use: its ring, which nobody changes, and the versions of it that were needed so far."""

    ring: KeyRing
    versions: dict[int, Material] = field(default_factory=dict, repr=False)


class KeyStore:
    """Keys of one mount. Readers share :class:`Key` objects; writers work on copies of their own, under a lock."""

    def __init__(self, context: EngineContext, workers: Workers) -> None:
        self._context = context
        self._storage = context.storage
        self._workers = workers
        self._locks = KeyedLock()
        self._cached: OrderedDict[str, Key] = OrderedDict()
        self._cached_max = CACHED_KEYS_MAX
        # Counts what was forgotten, so that a read that began before does not bring it back.
        self._forgotten = 0

    def now_us(self) -> int:
        return round(self._context.now() * 1_000_000)

    # --- reading ---

    async def names(self) -> list[str]:
        return await self._storage.list("key/")

    async def exists(self, name: str) -> bool:
        return name in self._cached or await self._storage.exists(_ring_key(name))

    async def find(self, name: str) -> Key | None:
        """The key, or None; to use, not to change."""
        key = self._cached.get(name)
        if key is not None:
            self._cached.move_to_end(name)
            return key
        forgotten = self._forgotten
        ring = await self._load(name)
        if ring is None:
            return None
        key = Key(ring)
        if forgotten == self._forgotten:
            self._cached[name] = key
            while len(self._cached) > self._cached_max:
                self._cached.popitem(last=False)
        return key

    async def get(self, name: str) -> Key:
        """The key, rotated if its period is over and this cluster may write. Raises InvalidRequest if there is none."""
        key = await self.find(name)
        if key is None:
            raise InvalidRequest(NOT_FOUND)
        if key.ring.due(self.now_us()) and self._context.writable():
            await self.rotate(name, only_if_due=True)
            return await self.get(name)
        return key

    async def material(self, key: Key, numbers: Iterable[int]) -> dict[int, Material]:
        """Versions of ``key``. Raises InvalidRequest where one was removed meanwhile."""
        wanted = sorted(set(numbers))
        missing = [number for number in wanted if number not in key.versions]
        for start in range(0, len(missing), VERSIONS_READ_AT_ONCE):
            step = missing[start : start + VERSIONS_READ_AT_ONCE]
            raws = await asyncio.gather(*(self._storage.get(_version_key(key.ring.uid, number)) for number in step))
            for number, raw in zip(step, raws, strict=True):
                if raw is None:
                    self.forget(key.ring.name)
                    raise InvalidRequest("the key version is not there any more")
                key.versions[number] = Material(key.ring.kind, decode_version(raw))
        return {number: key.versions[number] for number in wanted}

    async def _load(self, name: str) -> KeyRing | None:
        raw = await self._storage.get(_ring_key(name))
        return None if raw is None else decode_ring(raw)

    # --- forgetting ---

    def forget(self, name: str) -> None:
        """Drop what is in memory of one key."""
        self._forgotten += 1
        self._cached.pop(name, None)

    def invalidate(self, path: str) -> None:
        """Replication changed ``path``."""
        folder, _, rest = path.partition("/")
        if folder == "key":
            self.forget(rest)
        elif folder == "version":
            uid = rest.partition("/")[0]
            for name in [name for name, key in self._cached.items() if key.ring.uid == uid]:
                self.forget(name)

    def limit_cache(self, size: int) -> None:
        """Keep at most ``size`` keys in memory; 0 for the default."""
        self._cached_max = size or CACHED_KEYS_MAX
        while len(self._cached) > self._cached_max:
            self._cached.popitem(last=False)

    # --- writing ---

    def _require_writable(self) -> None:
        if not self._context.writable():
            raise ReadOnlyStorage

    async def create(self, ring: KeyRing, record: VersionRecord | None = None) -> bool:
        """Add a key with a first version, generated unless given. False if there is one of that name."""
        self._require_writable()
        async with self._locks.hold(ring.name):
            if await self._load(ring.name) is not None:
                return False
            await self._add_version(ring, record)
            return True

    async def rotate(self, name: str, *, only_if_due: bool = False) -> None:
        """Add a generated version. Raises InvalidRequest where the key's origin forbids it."""
        async with self._locks.hold(name):
            ring = await self._known(name)
            if only_if_due and not ring.due(self.now_us()):
                # Somebody else did it; whoever asked looked at an older copy.
                self.forget(name)
                return
            if ring.imported and not ring.allow_rotation:
                raise InvalidRequest("imported key does not allow rotation within Vault")
            # From here on its versions are of mixed origin: no more imports.
            ring.imported = False
            await self._add_version(ring, None)

    async def add_imported(
        self, name: str, make: Callable[[KeyRing], VersionRecord], version: int, *, with_secret: bool
    ) -> None:
        """Add an imported version; or give ``version`` (0: the latest, if it has none) its secret."""
        async with self._locks.hold(name):
            ring = await self._known(name)
            if not ring.imported:
                raise InvalidRequest("the import_version endpoint can only be used with an imported key")
            record = await self._workers.run(make, ring)
            number = await self._awaiting_secret(ring, version) if with_secret or version else 0
            if not number:
                await self._add_version(ring, record)
                return
            old = await self._version(ring, number)
            if not record.secret or old.secret or old.public != record.public:
                raise InvalidRequest("the imported key does not match the version it was sent for")
            old.secret = record.secret
            await self._commit(ring, {number: old})

    async def _awaiting_secret(self, ring: KeyRing, version: int) -> int:
        """The version that the import is for, or 0 for a new one."""
        if version:
            if version not in ring.created_us:
                raise InvalidRequest("there is no such key version")
            return version
        return 0 if (await self._version(ring, ring.latest)).secret else ring.latest

    async def change(self, name: str, apply: Callable[[KeyRing], list[str]]) -> list[str]:
        """Change settings; returns the warnings of ``apply``."""
        async with self._locks.hold(name):
            ring = await self._known(name)
            warnings = apply(ring)
            await self._commit(ring, {})
            return warnings

    async def set_chain(self, name: str, version: int, check: Callable[[Material], list[bytes]]) -> None:
        """Store the certificates that ``check`` finds good for a version (0: the latest)."""
        async with self._locks.hold(name):
            ring = await self._known(name)
            number = version or ring.latest
            if number not in ring.usable():
                raise InvalidRequest("there is no such key version")
            record = await self._version(ring, number)
            record.chain = await self._workers.run(check, Material(ring.kind, record))
            await self._commit(ring, {number: record})

    async def trim(self, name: str, minimum: int) -> None:
        """Remove versions below ``minimum`` for ever."""
        async with self._locks.hold(name):
            ring = await self._known(name)
            ring.check_trim(minimum)
            while ring.min_available < minimum:
                step = min(minimum, min(ring.created_us) + VERSIONS_PER_COMMIT_MAX)
                await self._commit(ring, dict.fromkeys(ring.trim(step)))

    async def delete(self, name: str) -> None:
        """Remove a key with all versions. Raises InvalidRequest where it is not allowed or there is none."""
        async with self._locks.hold(name):
            ring = await self._load(name)
            if ring is None:
                raise InvalidRequest("could not delete key; not found")
            if not ring.deletion_allowed:
                raise InvalidRequest(f"error deleting policy {name}: deletion is not allowed for this key")
            await self._storage.commit([Write(_ring_key(name), None), _garbage_write(ring.uid)])
            self.forget(name)
        await self.sweep()

    async def restore(self, ring: KeyRing, records: Mapping[int, VersionRecord], *, force: bool) -> None:
        """Store a whole key under a new uid, in place of one of its name if ``force``."""
        async with self._locks.hold(ring.name):
            old = await self._load(ring.name)
            if old is not None and not force:
                raise Failed(f'key "{ring.name}" already exists')
            ring.uid = uuid.uuid4().hex
            numbers = sorted(records)
            async with self._locks.hold(_garbage_key(ring.uid)):
                await self._storage.commit([_garbage_write(ring.uid)])
                for start in range(0, len(numbers), VERSIONS_PER_COMMIT_MAX):
                    step = numbers[start : start + VERSIONS_PER_COMMIT_MAX]
                    await self._storage.commit(
                        [Write(_version_key(ring.uid, number), encode_version(records[number])) for number in step]
                    )
                flip = [Write(_ring_key(ring.name), encode_ring(ring)), Write(_garbage_key(ring.uid), None)]
                await self._storage.commit(flip + ([_garbage_write(old.uid)] if old is not None else []))
            self.forget(ring.name)
        if old is not None:
            await self.sweep()

    async def sweep(self) -> None:
        """Remove versions that nothing names any more, also those that a crash left."""
        for uid in await self._storage.list("garbage/"):
            # A restore holds this lock while its versions wait for their ring.
            async with self._locks.hold(_garbage_key(uid)):
                if await self._storage.get(_garbage_key(uid)) is None:
                    continue
                folder = f"version/{uid}/"
                names = await self._storage.list(folder)
                for start in range(0, len(names), VERSIONS_PER_COMMIT_MAX):
                    step = names[start : start + VERSIONS_PER_COMMIT_MAX]
                    await self._storage.commit([Write(folder + name, None) for name in step])
                await self._storage.delete(_garbage_key(uid))

    async def _known(self, name: str) -> KeyRing:
        ring = await self._load(name)
        if ring is None:
            raise InvalidRequest("no existing key by that name was found")
        return ring

    async def _version(self, ring: KeyRing, number: int) -> VersionRecord:
        raw = await self._storage.get(_version_key(ring.uid, number))
        if raw is None:
            raise PluginError("a key version that exists could not be found")
        return decode_version(raw)

    async def _add_version(self, ring: KeyRing, record: VersionRecord | None) -> None:
        record = record or await self._workers.generate(generate, ring.kind, ring.key_size)
        number = ring.add_version(self.now_us())
        await self._commit(ring, {number: record})

    async def _commit(self, ring: KeyRing, versions: Mapping[int, VersionRecord | None]) -> None:
        writes = [
            Write(_version_key(ring.uid, number), None if record is None else encode_version(record))
            for number, record in versions.items()
        ]
        await self._storage.commit([*writes, Write(_ring_key(ring.name), encode_ring(ring))])
        self.forget(ring.name)


def _ring_key(name: str) -> str:
    return f"key/{name}"


def _version_key(uid: str, number: int) -> str:
    return f"version/{uid}/{number}"


def _garbage_key(uid: str) -> str:
    return f"garbage/{uid}"


def _garbage_write(uid: str) -> Write:
    return Write(_garbage_key(uid), b"1")
