"""Names below a prefix: corrected where keys are true but not in their data keys yet (the overlay of a large batch),
and without those that somebody else wrote past the index. And whether one name is there, which takes no read."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping

from consul_backend.batching import Prepared
from consul_backend.lazy_index import LazyIndex
from consul_backend.merkle import Forest
from consul_backend.read_lease import ReadLease

ReadNames = Callable[[str], Awaitable[list[str]]]
"""The stored names one level below a logical prefix, decoded, folders with a slash at their end."""

_AT_ONCE = 2000
"""Names looked up in the index before the event loop has its turn."""


async def corrected(read: ReadNames, prefix: str, names: Iterable[str], changes: Mapping[str, bool]) -> set[str]:
    """``names``, read below ``prefix``, as they are with ``changes``: keys below the prefix, and whether they exist.

    A folder stays as long as one key below it does; where all changes below it are deletions, that has to be read."""
    found = set(names)
    if not changes:
        return found
    surviving: set[str] = set()
    doubtful: set[str] = set()
    for key, exists in changes.items():
        name, slash, _ = key[len(prefix) :].partition("/")
        if exists:
            surviving.add(name + slash)
        elif slash:
            doubtful.add(name + slash)
        else:
            found.discard(name)
    for folder in (doubtful - surviving) & found:
        below = prefix + folder
        inner = {key: exists for key, exists in changes.items() if key.startswith(below)}
        if not await corrected(read, below, await read(below), inner):
            found.discard(folder)
    return found | surviving


async def indexed(prefix: str, names: Iterable[str], digest_of: Callable[[str], bytes | None]) -> set[str]:
    """``names`` without keys that the index does not have: a key exists exactly when it does. A folder stays: what is
    in it is told when it is listed itself."""
    found: set[str] = set()
    for number, name in enumerate(names, start=1):
        if name.endswith("/") or digest_of(prefix + name) is not None:
            found.add(name)
        if number % _AT_ONCE == 0:
            await asyncio.sleep(0)
    return found


async def exists(lease: ReadLease, lazy: LazyIndex, forest: Forest, overlay: Mapping[str, Prepared], key: str) -> bool:
    """Whether ``key`` has a value, under the read lease. Raises what loading the index and renewing the lease raise."""
    while True:
        await lease.ensure()
        if lazy.cold:
            await lazy.need((key,))
        pending = overlay.get(key)
        found = forest.digest_of(key) is not None if pending is None else pending.value is not None
        if lease.valid():
            return found
