"""Rows of a simulated store in memory: a dict, its keys in order, and an undo log. Pure."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

from consul_backend.physical import Item

_AFTER_SLASH = "0"
"""The character that follows ``/``."""


class MemoryTable:
    """Keeps :class:`consul_backend.kv_rules.Table`. Keys are ASCII (``limits.require_key``), so text order is byte
    order."""

    def __init__(self) -> None:
        self._items: dict[str, Item] = {}
        self._keys: list[str] = []
        self._undo: list[tuple[str, Item | None]] = []

    def copy(self) -> MemoryTable:
        """The rows as they are now, for a reader that is to see no later change."""
        other = MemoryTable()
        other._items, other._keys = dict(self._items), list(self._keys)
        return other

    def restore(self, other: MemoryTable) -> list[str]:
        """Take over the rows of a :meth:`copy`; the keys of all rows before and after."""
        touched = sorted({*self._items, *other._items})
        self._items, self._keys = dict(other._items), list(other._keys)
        return touched

    def items(self, prefix: str = "") -> list[Item]:
        """Every row below ``prefix``, in order of its key."""
        first, stop = self._range(prefix)
        return [self._items[key] for key in self._keys[first:stop]]

    def begin(self) -> None:
        self._undo.clear()

    def commit(self, index: int) -> None:
        self._undo.clear()

    def rollback(self) -> None:
        while self._undo:
            key, before = self._undo.pop()
            if before is None:
                del self._items[key]
                del self._keys[bisect_left(self._keys, key)]
            else:
                self._insert(before)

    def read(self, key: str) -> Item | None:
        return self._items.get(key)

    def put(self, item: Item) -> None:
        self._undo.append((item.key, self._items.get(item.key)))
        self._insert(item)

    def delete(self, key: str) -> bool:
        before = self._items.pop(key, None)
        if before is None:
            return False
        del self._keys[bisect_left(self._keys, key)]
        self._undo.append((key, before))
        return True

    def delete_tree(self, prefix: str) -> Sequence[str]:
        first, stop = self._range(prefix)
        doomed = self._keys[first:stop]
        for key in doomed:
            self.delete(key)
        return doomed

    def locked(self) -> Sequence[Item]:
        return [item for item in self._items.values() if item.session]

    def names(self, prefix: str) -> list[str]:
        start, stop = self._range(prefix)
        names: list[str] = []
        while start < stop:
            name, slash, _ = self._keys[start][len(prefix) :].partition("/")
            names.append(name + slash)
            start = bisect_left(self._keys, prefix + name + _AFTER_SLASH, start, stop) if slash else start + 1
        return names

    def names_below(self, prefix: str, names_max: int) -> list[str] | None:
        start, stop = self._range(prefix)
        return [key[len(prefix) :] for key in self._keys[start:stop]] if stop - start <= names_max else None

    def _range(self, prefix: str) -> tuple[int, int]:
        first = bisect_left(self._keys, prefix)
        return first, bisect_left(self._keys, prefix + "\x7f", first)

    def _insert(self, item: Item) -> None:
        if item.key not in self._items:
            insort(self._keys, item.key)
        self._items[item.key] = item
