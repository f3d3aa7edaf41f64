"""The newest values in memory, least recently used ones out first. Pure."""

from __future__ import annotations

from collections import OrderedDict

_ENTRY_OVERHEAD_BYTES = 200


class ValueCache:
    """Holds about ``bytes_max`` bytes. Its owner keeps it exact: every commit goes through :meth:`put`."""

    def __init__(self, bytes_max: int) -> None:
        self._values: OrderedDict[str, bytes] = OrderedDict()
        self._bytes_max = bytes_max
        self.size_bytes = 0
        self.hits = 0
        self.misses = 0

    def get(self, key: str) -> bytes | None:
        """The value if it is here; that says nothing of whether the key exists."""
        value = self._values.get(key)
        if value is None:
            self.misses += 1
            return None
        self._values.move_to_end(key)
        self.hits += 1
        return value

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def put(self, key: str, value: bytes | None) -> None:
        """The key now has this value (None: it was deleted)."""
        old = self._values.pop(key, None)
        if old is not None:
            self.size_bytes -= len(old) + len(key) + _ENTRY_OVERHEAD_BYTES
        if value is None:
            return
        self._values[key] = value
        self.size_bytes += len(value) + len(key) + _ENTRY_OVERHEAD_BYTES
        while self.size_bytes > self._bytes_max and self._values:
            name, dropped = self._values.popitem(last=False)
            self.size_bytes -= len(dropped) + len(name) + _ENTRY_OVERHEAD_BYTES

    def statistics(self) -> dict[str, int]:
        """Counters and gauges, by the names of their metrics."""
        return {
            "cache_entries": len(self._values),
            "cache_bytes": self.size_bytes,
            "cache_hits": self.hits,
            "cache_misses": self.misses,
        }

    def __len__(self) -> int:
        return len(self._values)
