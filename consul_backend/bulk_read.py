"""Values of many keys in few reads, for those who read everything once: a fill would otherwise cost one request a key,
and leave a cache full of what nobody asks for."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from consul_backend.lazy_index import LazyIndex
from consul_backend.merkle import Forest, entry_digest
from consul_backend.physical import PhysicalStore
from consul_backend.read_lease import ReadLease


async def read_many(
    physical: PhysicalStore,
    lease: ReadLease,
    lazy: LazyIndex,
    forest: Forest,
    wanted: Sequence[tuple[str, str]],
    is_far: Callable[[str], bool],
    get: Callable[[str], Awaitable[bytes | None]],
) -> list[bytes | None]:
    """The value of each (key, physical key), None where there is none. What ``is_far`` from memory is read together;
    the rest, and whatever this read does not settle, because it was written meanwhile, is in chunks or is foreign, is
    left to ``get``. Raises as that does."""
    if lazy.cold:
        await lazy.need([key for key, _ in wanted])
    await lease.ensure()
    far = [(key, where) for key, where in wanted if is_far(key) and forest.digest_of(key) is not None]
    found: dict[str, bytes] = {}
    if far:
        items = await physical.get_many([where for _, where in far])
        if lease.valid():
            for (key, _), item in zip(far, items, strict=True):
                if item is not None and is_far(key) and entry_digest(key, item.value) == forest.digest_of(key):
                    found[key] = item.value
    return [found[key] if key in found else await get(key) for key, _ in wanted]
