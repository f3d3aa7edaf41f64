"""The names below prefixes that were listed lately, least recently used ones out first. Pure."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence

_NAME_OVERHEAD_BYTES = 60
_PREFIX_OVERHEAD_BYTES = 300
_READING_MAX = 1000  # reads that failed stay until the prefix is read again


class NameCache:
    """Holds about ``bytes_max`` bytes. Its owner keeps it exact: whatever makes a key or removes one goes through
    :meth:`changed` before anybody learns of it. A list that was read while that happened is not kept."""

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._names: OrderedDict[str, Sequence[str]] = OrderedDict()
        self._reading: dict[str, object] = {}
        self.size_bytes = 0
        self.hits = 0
        self.misses = 0

    def get(self, prefix: str) -> Sequence[str] | None:
        """The sorted names below ``prefix``, if they are here."""
        names = self._names.get(prefix)
        if names is None:
            self.misses += 1
            return None
        self._names.move_to_end(prefix)
        self.hits += 1
        return names

    def reading(self, prefix: str) -> object:
        """The names are about to be read; :meth:`put` wants what this returns."""
        if len(self._reading) >= _READING_MAX:
            del self._reading[next(iter(self._reading))]
        mark = self._reading[prefix] = object()
        return mark

    def put(self, prefix: str, names: Sequence[str], mark: object) -> None:
        """``names`` were read and are true now, unless something changed meanwhile or somebody reads anew."""
        if self._reading.get(prefix) is not mark:
            return
        del self._reading[prefix]
        self._drop(prefix)
        self._names[prefix] = names
        self.size_bytes += _size(prefix, names)
        while self.size_bytes > self._bytes_max:
            self._drop(next(iter(self._names)))

    def concerns(self, key: str) -> bool:
        """Whether making or removing ``key`` could change anything here."""
        if not self._names and not self._reading:
            return False
        return any(prefix in self._names or prefix in self._reading for prefix in _above(key))

    def changed(self, key: str) -> None:
        """``key`` exists from now on, or no longer."""
        for prefix in _above(key):
            self._reading.pop(prefix, None)
            self._drop(prefix)

    def clear(self) -> None:
        """Many keys changed."""
        self._names.clear()
        self._reading.clear()
        self.size_bytes = 0

    def statistics(self) -> dict[str, int]:
        """Counters and gauges, by the names of their metrics."""
        return {"names_bytes": self.size_bytes, "names_hits": self.hits, "names_misses": self.misses}

    def _drop(self, prefix: str) -> None:
        names = self._names.pop(prefix, None)
        if names is not None:
            self.size_bytes -= _size(prefix, names)


def _above(key: str) -> Iterator[str]:
    """Every prefix that ``key`` is listed below, nearest first: down to ``<class>/<partition>/``."""
    end = len(key)
    root = key.index("/", key.index("/") + 1)
    while (end := key.rfind("/", 0, end)) >= root:
        yield key[: end + 1]


def _size(prefix: str, names: Sequence[str]) -> int:
    return len(prefix) + _PREFIX_OVERHEAD_BYTES + sum(map(len, names)) + _NAME_OVERHEAD_BYTES * len(names)
