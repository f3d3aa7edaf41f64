"""The parts of large batches on their way: a commit record travels right behind its parts.

Where a part stands in the log, a secondary gets a skip: until the commit record it is nothing. So a position never
stands inside a batch, and one that was cut off is asked for again, parts and all, by the position before its commit.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection

from consul_backend.large_batch import Assembly
from consul_backend.wal import CorruptRecord, PartRef, Record, Write
from sidecar.replication.protocol import PartFrame, ProtocolViolation
from sidecar.replication.selection import EVERYTHING, Partitions
from sidecar.replication.store_view import PrimaryStore

PARTS_BYTES_MAX = 320 * 1024 * 1024
"""Of one batch, held until its commit record comes: more than any store takes (its bound of staged batches)."""


def concerns(record: Record, classes: Collection[str], selection: Partitions = EVERYTHING) -> bool:
    """Whether a record may make entries of these classes and partitions true. The commit of a large batch names the
    classes of its parts alone."""
    header = record.header
    if header.kind == "commit" and header.large is not None:
        return any(_has_any(part, classes) for part in header.large.parts)
    return header.kind != "part" and any(
        head.cls in classes and selection.takes(head.cls, head.partition) for head in header.groups
    )


def stripped(record: Record, classes: Collection[str], selection: Partitions = EVERYTHING) -> Record:
    """The record as it travels: without the bodies of what does not."""
    return record.picked(lambda cls, partition: cls in classes and selection.takes(cls, partition))


async def parts_of(
    store: PrimaryStore, record: Record, classes: Collection[str], selection: Partitions = EVERYTHING
) -> AsyncIterator[PartFrame]:
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
        yield PartFrame(stripped(found[0], classes, selection).encode())


class Parts:
    """The receiving side: parts, with the entries of ``classes`` and ``selection``, that wait for their commit."""

    def __init__(self, classes: Collection[str], selection: Partitions = EVERYTHING) -> None:
        self._classes = classes
        self._selection = selection
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
            travels = head.cls in self._classes and self._selection.takes(head.cls, head.partition)
            if travels != (body is not None):
                raise ProtocolViolation(f"part {record.index} brings entries of other partitions than it should")
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
