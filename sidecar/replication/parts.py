"""The parts of large batches on their way: a commit record travels right behind its parts.

Where a part stands in the log, a secondary gets a skip: until the commit record it is nothing. So a position never
stands inside a batch, and one that was cut off is asked for again, parts and all, by the position before its commit.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection

from consul_backend.large_batch import Assembly
from consul_backend.wal import CorruptRecord, PartRef, Record, Write
from sidecar.replication.protocol import PartFrame, ProtocolViolation
from sidecar.replication.store_view import PrimaryStore

PARTS_BYTES_MAX = 320 * 1024 * 1024
"""Of one batch, held until its commit record comes: more than any store takes (its bound of staged batches)."""


def concerns(record: Record, classes: Collection[str]) -> bool:
    """Whether a record makes entries of these classes true."""
    header = record.header
    if header.kind == "commit" and header.large is not None:
        return any(_has_any(part, classes) for part in header.large.parts)
    return header.kind != "part" and any(head.cls in classes for head in header.groups)


async def parts_of(store: PrimaryStore, record: Record, classes: Collection[str]) -> AsyncIterator[PartFrame]:
    """What goes before ``record``: its parts, if it commits a large batch. Raises RecordGone, Corrupt."""
    large = record.header.large
    if large is None or record.header.kind != "commit":
        return
    for part in large.parts:
        if not _has_any(part, classes):
            continue
        found = await store.records(part.index, 1)
        if not found or found[0].chain_hash != part.chain_hash:
            raise CorruptRecord(f"record {part.index} is not the part that record {record.index} names")
        yield PartFrame(found[0].only(classes).encode())


class Parts:
    """The receiving side: parts, with the entries of ``classes``, that wait for their commit record."""

    def __init__(self, classes: Collection[str]) -> None:
        self._classes = classes
        self._waiting: dict[int, Record] = {}
        self._bytes = 0

    def accept(self, frame: PartFrame) -> None:
        """Raises ProtocolViolation for what is no part of a batch, or more than fits any."""
        try:
            record = Record.decode(frame.raw)
        except (CorruptRecord, UnicodeDecodeError):
            raise ProtocolViolation("a part of a large batch does not decode") from None
        if record.header.kind != "part":
            raise ProtocolViolation(f"record {record.index} came as a part and is none")
        for head, body in zip(record.header.groups, record.bodies, strict=True):
            if (head.cls in self._classes) != (body is not None):
                raise ProtocolViolation(f"part {record.index} brings entries of other classes than it should")
        self._waiting[record.index] = record
        self._bytes += len(frame.raw)
        if self._bytes > PARTS_BYTES_MAX:
            raise ProtocolViolation(f"parts of {self._bytes} bytes came without their commit record")

    def take(self, record: Record) -> list[Write]:
        """The entries that a commit record makes true. Raises ProtocolViolation when a part is missing or another."""
        large = record.header.large
        if large is None:
            raise ProtocolViolation(f"record {record.index} commits nothing")
        assembly = Assembly()
        for part in large.parts:
            if not _has_any(part, self._classes):
                continue
            found = self._waiting.get(part.index)
            if found is None or found.chain_hash != part.chain_hash:
                raise ProtocolViolation(f"record {record.index} came without its part {part.index}")
            try:
                assembly.add(found)
            except CorruptRecord as error:
                raise ProtocolViolation(str(error)) from None
        self._waiting.clear()
        self._bytes = 0
        return assembly.writes()


def _has_any(part: PartRef, classes: Collection[str]) -> bool:
    return any(cls in part.classes for cls in classes)
