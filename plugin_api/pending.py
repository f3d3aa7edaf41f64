"""Work in the world outside that a crash must not leave half done: a note of it, in the mount's local storage.

An engine that makes something elsewhere (a database user, a cloud key) notes it *before*, with what it takes to find
and remove it again::

    note = await begin(self.context, {"user": name})
    await self._database.create_user(name)
    return Response(data=..., lease=Lease(internal={"user": name}, pending=note))

The sidecar deletes the note in the very commit that keeps the lease: from then on the lease sees to the end of it. Work
without a lease ends with :func:`done`. Whatever is noted longer than a request can take, because the node died or the
request failed, is handed to :meth:`~plugin_api.engine.Engine.undo`, on whatever node leads then.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from typing import Any

import msgspec

from plugin_api.engine import EngineContext

FOLDER = "_pending/"
"""Below a mount's local storage; an engine keeps nothing else there."""
MIN_AGE_S = 600
"""What is younger may still be under way."""


class _Note(msgspec.Struct):
    began_s: int
    data: dict[str, Any]


@dataclass(frozen=True, slots=True)
class LeftOver:
    """A note that nobody ended. ``data`` (JSON values) is what :func:`begin` was given."""

    id: str
    began_s: int
    data: dict[str, Any] = field(repr=False)


async def begin(context: EngineContext, data: dict[str, Any]) -> str:
    """Note that work is about to begin; ``data`` (JSON values, as little secret as it can be) is what undoing it needs.
    Returns the note's id. Raises what storage raises: then nothing may begin."""
    note = uuid.uuid4().hex
    await context.local_storage.put(FOLDER + note, msgspec.json.encode(_Note(int(context.now()), data)))
    return note


async def done(context: EngineContext, note: str) -> None:
    """The work is complete, or undone; a note there is none of is no failure."""
    await context.local_storage.delete(FOLDER + note)


async def left_over(context: EngineContext, *, min_age_s: float = MIN_AGE_S) -> list[LeftOver]:
    """The notes of at least that age, oldest first. What cannot be read as a note is left out."""
    found = []
    for name in await context.local_storage.list(FOLDER):
        raw = await context.local_storage.get(FOLDER + name)
        if raw is None:
            continue  # ended meanwhile
        try:
            note = msgspec.json.decode(raw, type=_Note)
        except msgspec.MsgspecError:
            continue
        if context.now() - note.began_s >= min_age_s:
            found.append(LeftOver(name, note.began_s, note.data))
    return sorted(found, key=lambda one: one.began_s)
