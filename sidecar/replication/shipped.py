"""A forest as one mode of replication sees it: only what travels, partitions named ``<class>/<partition>``.

Every name that arrives from the other cluster is resolved here, so whoever asks for a partition that does not
travel is refused here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

from sidecar.replication.modes import Mode
from sidecar.replication.protocol import ProtocolViolation
from sidecar.replication.selection import EVERYTHING, Partitions
from sidecar.replication.store_view import Forest, IndexedStore


class Shipped:
    """``forest`` restricted to ``classes`` and ``selection``. Methods that take a name raise ProtocolViolation for any
    other. A partition that holds nothing has no digests and no entries."""

    def __init__(self, forest: Forest, classes: Collection[str], selection: Partitions = EVERYTHING) -> None:
        self._forest = forest
        self._classes = classes
        self._selection = selection

    def resolve(self, name: str) -> tuple[str, str]:
        """Class and partition of a name. Raises ProtocolViolation."""
        cls, _, partition = name.partition("/")
        if cls not in self._classes or not partition or "/" in partition or not self._selection.takes(cls, partition):
            raise ProtocolViolation("a partition was named that does not travel in this mode of replication")
        return cls, partition

    def root(self) -> bytes:
        """20 bytes over every partition; with one class, the root of that class."""
        return self._forest.root_of(
            (cls, partition)
            for cls in self._classes
            for partition in self._forest.names(cls)
            if self._selection.takes(cls, partition)
        )

    def partitions(self) -> Mapping[str, bytes]:
        """Root by name, of those that hold anything."""
        return {
            f"{cls}/{partition}": root
            for cls in self._classes
            for partition, root in self._forest.partitions(cls).items()
            if self._selection.takes(cls, partition)
        }

    def page_digests(self, name: str) -> Mapping[int, bytes]:
        """Digest by page, non-empty pages only."""
        return self._forest.page_digests(*self.resolve(name))

    def subpage_digests(self, name: str, page: int) -> Mapping[int, bytes]:
        """Digest by subpage, non-empty subpages only."""
        return self._forest.subpage_digests(*self.resolve(name), page)

    def entries(self, name: str, page: int, subpage: int) -> Sequence[tuple[str, bytes]]:
        """Path and digest of each entry in one subpage."""
        return self._forest.entries(*self.resolve(name), page, subpage)

    def keys(self, name: str) -> Iterator[tuple[str, bytes]]:
        """Path and digest of each entry of a partition."""
        return self._forest.keys(*self.resolve(name))

    def count(self, name: str) -> int:
        """How many entries a partition holds."""
        return self._forest.count(*self.resolve(name))


async def load_indexes(store: IndexedStore, mode: Mode) -> None:
    """Have every entry that travels in the forest. Raises BackendError."""
    for cls in mode.classes:
        await store.load_index(cls)
