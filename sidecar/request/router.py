"""Which mount serves a path: the longest mount that is a prefix of it, by whole segments. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Match(Generic[T]):
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
        for mount in _prefixes(path):
            target = self._targets.get(mount)
            if target is not None:
                return Match(mount, target, path[len(mount) :])
        return None

    def get(self, mount: str) -> T | None:
        """The target mounted at exactly ``mount``."""
        return self._targets.get(mount)

    def items(self) -> Iterator[tuple[str, T]]:
        """Every mount with its target, by path."""
        return iter(sorted(self._targets.items()))


def _prefixes(path: str) -> Iterator[str]:
    """Every way to cut ``path`` after a slash, longest first; a path without a final slash is tried with one too."""
    if not path.endswith("/"):
        yield path + "/"
    end = len(path)
    while (end := path.rfind("/", 0, end)) >= 0:
        yield path[: end + 1]
