"""Reading the write-ahead log: what is there, records in order, and the newest ones from memory."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator

from consul_backend.errors import BackendError, Corrupt
from consul_backend.physical import Item, PhysicalStore
from consul_backend.wal import CorruptRecord, Record, record_key, segment_prefix

READ_RECORDS = 32
"""Records fetched at once: bounds memory, a record has at most about 390 kB."""
_DECODED_BETWEEN_TURNS_BYTES = 256 * 1024


class RecordGone(BackendError):
    """The record was collected. Whoever asks is too far behind to stream and must compare indexes instead."""


async def list_segments(physical: PhysicalStore, generation: str) -> list[int]:
    """The segments that hold records, ascending. Raises Corrupt for foreign names."""
    names = await physical.list(f"g/{generation}/wal/", consistent=True)
    segments = sorted(_number(name.removesuffix("/")) for name in names)
    for name in names:
        if not name.endswith("/"):
            raise Corrupt(f"g/{generation}/wal/{name} is not a segment of the log")
    return segments


async def list_segment(physical: PhysicalStore, generation: str, segment: int, segment_records: int) -> list[int]:
    """The record numbers in a segment, ascending. Raises Corrupt for names that do not belong there."""
    prefix = segment_prefix(generation, segment)
    indexes = sorted(_number(name) for name in await physical.list(prefix, consistent=True))
    for index in indexes:
        if index // segment_records != segment:
            raise Corrupt(
                f"record {index} is stored in segment {segment}, which is wrong for {segment_records} records a"
                " segment: a generation keeps the segment size it began with"
            )
    return indexes


def _number(name: str) -> int:
    if not name.isascii() or not name.isdigit():
        raise Corrupt(f"{name!r} is not a name of the log")
    return int(name)


async def scan_records(
    physical: PhysicalStore, generation: str, start: int, stop: int, segment_records: int
) -> AsyncIterator[list[tuple[Record, Item]]]:
    """Records ``start`` to ``stop`` (inclusive), consistent, in pieces of ``READ_RECORDS``, each checked to follow the
    one before. Raises CorruptRecord naming the first that is missing or wrong."""
    before: Record | None = None
    decoded_bytes = 0
    for first in range(start, stop + 1, READ_RECORDS):
        indexes = range(first, min(first + READ_RECORDS, stop + 1))
        keys = [record_key(generation, index, segment_records) for index in indexes]
        piece: list[tuple[Record, Item]] = []
        for index, key, item in zip(indexes, keys, await physical.get_many(keys, consistent=True), strict=True):
            if item is None:
                raise CorruptRecord(f"record {index} is missing at {key}")
            before = _follow(key, index, item, before)
            piece.append((before, item))
            decoded_bytes += len(item.value)
            if decoded_bytes > _DECODED_BETWEEN_TURNS_BYTES:
                decoded_bytes = 0
                await asyncio.sleep(0)
        yield piece


def _follow(key: str, index: int, item: Item, before: Record | None) -> Record:
    try:
        record = Record.decode(item.value, expect_prev=before.chain_hash if before is not None else None)
    except CorruptRecord as error:
        raise CorruptRecord(f"{key}: {error}") from None
    if record.index != index:
        raise CorruptRecord(f"{key} holds record {record.index}")
    if before is not None and record.header.epoch < before.header.epoch:
        raise CorruptRecord(f"{key}: its writer's epoch is older than the record's before it")
    return record


class RecordRing:
    """The newest records in memory, bounded by count and bytes; always dense."""

    def __init__(self, records_max: int, bytes_max: int) -> None:
        self._records: deque[Record] = deque()
        self._records_max = records_max
        self._bytes_max = bytes_max
        self.size_bytes = 0

    def append(self, record: Record) -> None:
        """Add the next record; the oldest make room."""
        records = self._records
        records.append(record)
        self.size_bytes += record.size_bytes
        while len(records) > self._records_max or (self.size_bytes > self._bytes_max and len(records) > 1):
            self.size_bytes -= records.popleft().size_bytes

    def read(self, start: int, limit: int, bytes_max: int) -> list[Record]:
        """Up to ``limit`` records from ``start`` on, about ``bytes_max`` bytes; none when ``start`` is not here."""
        if not self._records:
            return []
        at = start - self._records[0].index
        if at < 0:
            return []
        found: list[Record] = []
        size = 0
        for position in range(at, min(at + limit, len(self._records))):
            record = self._records[position]
            size += record.size_bytes
            if found and size > bytes_max:
                break
            found.append(record)
        return found

    def statistics(self) -> dict[str, int]:
        """Counters and gauges, by the names of their metrics."""
        return {"ring_records": len(self._records), "ring_bytes": self.size_bytes}

    def __len__(self) -> int:
        return len(self._records)


async def read_stored(
    physical: PhysicalStore, generation: str, start: int, stop: int, segment_records: int, bytes_max: int
) -> list[Record]:
    """Records ``start`` to ``stop`` (inclusive) from the store, cut short after about ``bytes_max`` bytes. Raises
    CorruptRecord, also for one that is missing."""
    found: list[Record] = []
    size = 0
    async for piece in scan_records(physical, generation, start, stop, segment_records):
        for record, item in piece:
            size += len(item.value)
            if found and size > bytes_max:
                return found
            found.append(record)
    return found
