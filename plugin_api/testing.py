"""What a plugin's own tests need: a storage in memory, a context, and a suite for other storages."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from plugin_api.engine import EngineContext, MountInfo
from plugin_api.errors import InvalidRequest, ReadOnlyStorage
from plugin_api.request import Caller, Operation, Request
from plugin_api.storage import Storage, Write


class MemoryStorage:
    """A :class:`~plugin_api.storage.Storage` in a dict.

    ``read_only`` refuses commits as a performance secondary does. ``commits`` keeps every batch, so that a test can
    tell one atomic write from two. ``fail_next`` is raised once, by the next commit, which then changes nothing.
    """

    def __init__(self, entries: Mapping[str, bytes] | None = None) -> None:
        self.entries: dict[str, bytes] = dict(entries or {})
        self.commits: list[tuple[Write, ...]] = []
        self.read_only = False
        self.fail_next: Exception | None = None

    def __repr__(self) -> str:
        return f"MemoryStorage({len(self.entries)} entries)"

    async def get(self, path: str) -> bytes | None:
        return self.entries.get(_checked(path))

    async def exists(self, path: str) -> bool:
        return _checked(path) in self.entries

    async def list(self, prefix: str = "") -> list[str]:
        if prefix and not prefix.endswith("/"):
            raise InvalidRequest("a prefix is empty or ends in '/'")
        if prefix:
            _checked(prefix[:-1])
        names = set()
        for path in self.entries:
            if path.startswith(prefix):
                name, slash, _ = path[len(prefix) :].partition("/")
                names.add(name + slash)
        return sorted(names)

    async def commit(self, writes: Sequence[Write]) -> None:
        if self.read_only:
            raise ReadOnlyStorage
        for write in writes:
            _checked(write.path)
        if self.fail_next is not None:
            error, self.fail_next = self.fail_next, None
            raise error
        self.commits.append(tuple(writes))
        for write in writes:
            if write.value is None:
                self.entries.pop(write.path, None)
            else:
                self.entries[write.path] = write.value

    async def put(self, path: str, value: bytes) -> None:
        await self.commit([Write(path, value)])

    async def delete(self, path: str) -> None:
        await self.commit([Write(path, None)])


def _checked(path: str) -> str:
    if not path or path[0] == "/" or path[-1] == "/" or any(part in (".", "..") for part in path.split("/")):
        raise InvalidRequest("a storage path must name a key")
    return path


class SettableClock:
    """A clock that stands still until a test moves ``now_s`` (unix seconds)."""

    def __init__(self, now_s: float = 1_700_000_000.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s


def make_context(
    *,
    path: str = "test/",
    type_name: str = "test",
    options: Mapping[str, str] | None = None,
    storage: MemoryStorage | None = None,
    local_storage: Storage | None = None,
    now: Callable[[], float] | None = None,
) -> EngineContext:
    """A context for one engine. ``writable`` follows the storage's ``read_only``; time stands still by default."""
    store = storage if storage is not None else MemoryStorage()
    mount = MountInfo(
        path=path,
        type=type_name,
        uuid="00000000-0000-4000-8000-000000000000",
        accessor=f"{type_name}_00000000",
        options=dict(options or {}),
    )
    return EngineContext(
        mount=mount,
        storage=store,
        local_storage=local_storage if local_storage is not None else MemoryStorage(),
        now=now if now is not None else SettableClock(),
        writable=lambda: not store.read_only,
    )


def make_request(operation: Operation, path: str, data: Mapping[str, Any] | None = None, **caller: Any) -> Request:
    """A request as the sidecar would send it; keyword arguments are fields of :class:`~plugin_api.request.Caller`."""
    return Request(operation, path, dict(data or {}), mount_point="test/", caller=Caller(**caller), id="test")


async def check_storage(make: Callable[[], Awaitable[Storage]]) -> None:
    """Assert that storages made by ``make`` (each call a new, empty one) keep the contract. Raises AssertionError."""
    for check in (_check_values, _check_atomic_batches, _check_listing, _check_exact_paths):
        await check(await make())


def _expect(condition: bool, rule: str) -> None:
    if not condition:
        raise AssertionError(f"storage contract broken: {rule}")


async def _check_values(storage: Storage) -> None:
    _expect(await storage.get("a") is None, "a missing key reads as None")
    _expect(not await storage.exists("a"), "a missing key does not exist")
    await storage.put("a", b"")
    _expect(await storage.get("a") == b"", "an empty value is a value")
    _expect(await storage.exists("a"), "an empty value exists")
    value = bytes(range(256))
    await storage.put("a", value)
    _expect(await storage.get("a") == value, "any bytes read back unchanged")
    await storage.delete("a")
    await storage.delete("a")
    _expect(await storage.get("a") is None, "a deleted key reads as None, and deleting it again is no failure")
    _expect(not await storage.exists("a"), "a deleted key does not exist")


async def _check_atomic_batches(storage: Storage) -> None:
    await storage.put("gone", b"1")
    await storage.commit([Write("x", b"1"), Write("y/z", b"2"), Write("gone", None)])
    _expect(await storage.get("x") == b"1", "every write of a batch is applied")
    _expect(await storage.get("y/z") == b"2", "every write of a batch is applied")
    _expect(await storage.get("gone") is None, "every delete of a batch is applied")
    await storage.commit([Write("x", b"first"), Write("x", b"last")])
    _expect(await storage.get("x") == b"last", "the last write of one key in a batch wins")


async def _check_listing(storage: Storage) -> None:
    _expect(await storage.list() == [], "an empty storage lists nothing")
    await storage.commit([Write(path, b"v") for path in ("b", "a", "a/b", "a/c/d", "a-b", "c/d")])
    _expect(await storage.list() == ["a", "a-b", "a/", "b", "c/"], "names are sorted; a key and a folder both appear")
    _expect(await storage.list("a/") == ["b", "c/"], "a prefix lists the level below it only")
    _expect(await storage.list("nothing/") == [], "a prefix without keys lists nothing")
    await storage.delete("c/d")
    _expect("c/" not in await storage.list(), "a folder vanishes with its last key")


async def _check_exact_paths(storage: Storage) -> None:
    paths = ["é", "e\u0301", "A", "a", "a b", "a_b", "a%2Fb", "..a", "x\n", "\N{SNOWMAN}/\N{SNOWMAN}"]
    await storage.commit([Write(path, path.encode()) for path in paths])
    for path in paths:
        _expect(await storage.get(path) == path.encode(), "paths are compared byte for byte")
    for path in ("", "/a", "a/", ".", "..", "a/../b"):
        for attempt in (storage.get(path), storage.put(path, b"v"), storage.delete(path)):
            try:
                await attempt
            except InvalidRequest:
                continue
            _expect(False, "a path that names no key is refused with InvalidRequest")
