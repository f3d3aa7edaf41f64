"""Names below a prefix when some keys are true but not in their data keys yet (the overlay of a large batch)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping

ReadNames = Callable[[str], Awaitable[list[str]]]
"""The stored names one level below a logical prefix, decoded, folders with a slash at their end."""


async def corrected(read: ReadNames, prefix: str, names: Iterable[str], changes: Mapping[str, bool]) -> set[str]:
    """``names``, read below ``prefix``, as they are with ``changes``: keys below the prefix, and whether they exist.

    A folder stays as long as one key below it does; where all changes below it are deletions, that has to be read."""
    found = set(names)
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
