"""What replication needs of a replicated store. ``consul_backend.replicated.ReplicatedStore`` is both."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol

from consul_backend.position import Position
from consul_backend.wal import Record, Write


class Head(Protocol):
    """The newest record of a store."""

    @property
    def index(self) -> int:
        """Its number."""

    @property
    def chain_hash(self) -> bytes:
        """Its hash, 32 bytes."""


class Forest(Protocol):
    """The merkle forest, exact as of the store's head."""

    def root_of(self, pairs: Iterable[tuple[str, str]]) -> bytes:
        """20 bytes over the given (class, partition) pairs."""

    def names(self, cls: str) -> Sequence[str]:
        """The partitions of a class that hold anything."""

    def partitions(self, cls: str) -> Mapping[str, bytes]:
        """Root by partition."""

    def page_digests(self, cls: str, partition: str) -> Mapping[int, bytes]:
        """Digest by page, non-empty pages only."""

    def subpage_digests(self, cls: str, partition: str, page: int) -> Mapping[int, bytes]:
        """Digest by subpage, non-empty subpages only."""

    def entries(self, cls: str, partition: str, page: int, subpage: int) -> Sequence[tuple[str, bytes]]:
        """Path and digest of each entry in one subpage."""

    def keys(self, cls: str, partition: str) -> Iterator[tuple[str, bytes]]:
        """Path and digest of each entry of a partition."""

    def count(self, cls: str, partition: str) -> int:
        """How many entries a partition holds."""

    def digest_of(self, key: str) -> bytes | None:
        """The digest of one logical key."""


class IndexedStore(Protocol):
    """A store whose index may still be on its way into memory, shortly after its recovery."""

    async def rooted(self) -> None:
        """Wait until every root of the forest is known; it stays so."""

    async def load_index(self, cls: str | None = None) -> None:
        """Have all entries of a class (None: of all) in the forest. Raises BackendError."""


class PrimaryStore(IndexedStore, Protocol):
    """The store that is shipped."""

    @property
    def head(self) -> Head:
        """The newest committed record."""

    @property
    def forest(self) -> Forest:
        """Exact as of :attr:`head` whenever no ``await`` lies between reading both."""

    @property
    def positions(self) -> Mapping[str, Position]:
        """The newest position of each mode, as of :attr:`head` likewise."""

    @property
    def inherited(self) -> Head:
        """The newest record that this tenure found when it began."""

    async def require_tenure(self) -> None:
        """Raises FenceLost unless this tenure still leads, BackendError when that cannot be known."""

    @property
    def oldest_index(self) -> int:
        """The oldest record that :meth:`records` still has."""

    async def wait_head(self, after: int) -> Head:
        """The head, once its index is greater than ``after``."""

    async def records(self, start: int, limit: int) -> Sequence[Record]:
        """At most ``limit`` records from ``start`` on. Raises RecordGone when ``start`` was collected."""

    async def get(self, key: str) -> bytes | None:
        """The whole ciphertext of one logical key."""

    async def get_many(self, keys: Sequence[str]) -> Sequence[bytes | None]:
        """The same of many keys at once."""

    def may_be_large(self, key: str) -> bool:
        """Whether a value may be larger than one transaction of the store."""

    def hold(self, name: str, index: int) -> None:
        """Keep records from ``index`` on for ``name``, within the store's hard bound."""

    def unhold(self, name: str) -> None:
        """Forget what :meth:`hold` promised to ``name``."""


class SecondaryStore(IndexedStore, Protocol):
    """The store that follows."""

    @property
    def forest(self) -> Forest:
        """What travels is written by replication alone, so it is exact as of the position."""

    @property
    def positions(self) -> Mapping[str, Position]:
        """The newest durable position of each mode."""

    async def get(self, key: str) -> bytes | None:
        """The whole ciphertext of one logical key."""

    async def commit(self, writes: Sequence[Write], *, positions: Mapping[str, Position] | None = None) -> Head:
        """All writes and the positions in one record, or nothing."""
