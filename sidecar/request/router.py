"""Which mount serves a path: the longest mount that is a prefix of it, by whole segments. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Generic, TypeVar

import msgspec

T = TypeVar("T")


class Match(msgspec.Struct, Generic[T], frozen=True):
    """``mount`` ends in ``/``; ``rest`` is the path below it, without a leading slash."""

    mount: str
    target: T
    rest: str


class Router(Generic[T]):
    """An immutable routing table; a change of mounts makes a new one, so a request sees one table throughout."""

    def __init__(self, targets: Mapping[str, T]) -> None:
        for mount in targets:
            if not mount.endswith("/") or mount.startswith("/"):
                raise ValueError(f"a mount path ends in '/' and does not begin with it: {mount!r}")
        self._targets = dict(targets)

    def match(self, path: str) -> Match[T] | None:
        """The mount of ``path``, or None. ``secret`` reaches ``secret/`` with an empty rest."""
        targets = self._targets
        # Every way to cut the path after a slash, longest first; without a final slash it is tried with one too.
        mount = path if path.endswith("/") else path + "/"
        while mount not in targets:
            end = mount.rfind("/", 0, len(mount) - 1)
            if end < 0:
                return None
            mount = mount[: end + 1]
        return Match(mount, targets[mount], path[len(mount) :])

    def get(self, mount: str) -> T | None:
        """The target mounted at exactly ``mount``."""
        return self._targets.get(mount)

    def items(self) -> Iterator[tuple[str, T]]:
        """Every mount with its target, by path."""
        return iter(sorted(self._targets.items()))
