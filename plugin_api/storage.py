"""Storage as an engine sees it: its own mount's keys, plaintext, already encrypted and placed by the sidecar."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Write:
    """One change: ``value`` None deletes. ``path`` is relative to the mount, without a leading slash."""

    path: str
    value: bytes | None


class Storage(Protocol):
    """The keys of one mount. Paths are compared byte for byte.

    Nothing cleans a path: one that is empty, begins or ends with a slash, or has a ``.`` or ``..`` segment is refused
    with InvalidRequest, because another layer might give it a meaning.
    """

    async def get(self, path: str) -> bytes | None:
        """The value, or None if there is none."""

    async def exists(self, path: str) -> bool:
        """Whether there is a value, told without reading it."""

    async def list(self, prefix: str = "") -> list[str]:
        """Names one level below ``prefix`` (``""`` or ending in ``/``), sorted; folders end in ``/``."""

    async def commit(self, writes: Sequence[Write]) -> None:
        """Apply all writes or none. Raises ReadOnlyStorage where this cluster may not write."""

    async def put(self, path: str, value: bytes) -> None:
        """:meth:`commit` of one write."""

    async def delete(self, path: str) -> None:
        """:meth:`commit` of one delete; a missing key is no failure."""
