"""From a kv mount of version 1 to version 2: every value becomes version 1 of a versioned secret.

What a value is called tells nothing about its version: a version 1 secret may be named ``metadata/a``. So the keys
that version 2 uses for itself are moved aside first, and a mark says how far the work is. The mark and what is moved
aside have names that no client can send (a control character). Each step is one commit that a crash leaves done or
not done; the work is repeated from the mark.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import msgspec

from plugin_api.storage import Storage, Write
from sidecar.engines.kv_metadata import KeyMetadata, Version

FOLDER = "\x1fupgrade/"
STATE = FOLDER + "state"
_ASIDE = FOLDER + "aside/"
_CLEARING, _CONVERTING = b"clearing", b"converting"
_OWN = ("config", "metadata/", "versions/")

STARTED = (
    "Upgrading mount from version 1 to version 2. This mount will be unavailable for a brief period and will resume "
    "service shortly."
)
UNDER_WAY = (
    "Upgrading from non-versioned to versioned data. This backend will be unavailable for a brief period and will "
    "resume service shortly."
)


async def begin(storage: Storage) -> None:
    """Mark the mount: whoever serves version 2 of it must upgrade first."""
    await storage.put(STATE, _CLEARING)


async def is_under_way(storage: Storage) -> bool:
    """Whether the mark is there."""
    return await storage.exists(STATE)


async def upgrade(storage: Storage, now_us: Callable[[], int]) -> None:
    """Do what is left to do; returns at once where there is no mark."""
    if await storage.get(STATE) == _CLEARING:
        await _each(storage, "", lambda path: _move_aside(storage, path), only=_OWN)
        await storage.put(STATE, _CONVERTING)
    if await storage.get(STATE) == _CONVERTING:
        await _each(storage, "", lambda path: _convert(storage, path, path, now_us()), but=(FOLDER, *_OWN))
        await _each(storage, _ASIDE, lambda path: _convert(storage, path, path[len(_ASIDE) :], now_us()))
        await storage.delete(STATE)


async def _move_aside(storage: Storage, path: str) -> None:
    value = await storage.get(path)
    if value is not None:
        await storage.commit([Write(_ASIDE + path, value), Write(path, None)])


async def _convert(storage: Storage, old: str, path: str, now_us: int) -> None:
    value = await storage.get(old)
    if value is None:
        return
    metadata = KeyMetadata(created_us=now_us, updated_us=now_us, current=1, versions={1: Version(now_us)})
    await storage.commit(
        [
            Write(f"versions/{path}/1", value),
            Write(f"metadata/{path}", msgspec.msgpack.encode(metadata)),
            Write(old, None),
        ]
    )


async def _each(
    storage: Storage,
    prefix: str,
    work: Callable[[str], Awaitable[None]],
    *,
    only: tuple[str, ...] = (),
    but: tuple[str, ...] = (),
) -> None:
    """Call ``work`` for every key below ``prefix``; ``only`` and ``but`` choose among the names right below it."""
    folders = [prefix]
    while folders:
        folder = folders.pop()
        for name in await storage.list(folder):
            if folder == prefix and (name in but or (only and name not in only)):
                continue
            if name.endswith("/"):
                folders.append(folder + name)
            else:
                await work(folder + name)
