"""Records as the frames that travel, encoded once however many secondaries there are.

What one secondary is sent depends on the mode and on its selection alone, and with few filters most of a set's
secondaries share one. So the newest frames are kept, by record and selection, and 50 streams that follow the head cost
one encoding of each record. Not shared: skips, which begin wherever a stream happens to stand.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

from consul_backend.wal import Record
from sidecar.replication.parts import concerns, stripped
from sidecar.replication.protocol import RecordFrame, Skip, encode
from sidecar.replication.selection import EVERYTHING, Partitions

SHARED_BYTES_MAX = 4 * 1024 * 1024
SELECTIONS_MAX = 256


class Run(NamedTuple):
    """Records ``first``..``last``: one that travels, or those of which nothing does."""

    first: Record
    last: Record
    travels: bool


def runs_of(records: Sequence[Record], travels: Callable[[Record], bool]) -> Iterator[Run]:
    """Each record that travels by itself, and what does not between them together."""
    skipped: Run | None = None
    for record in records:
        if travels(record):
            if skipped is not None:
                yield skipped
            skipped = None
            yield Run(record, record, True)
        else:
            skipped = Run(skipped.first if skipped is not None else record, record, False)
    if skipped is not None:
        yield skipped


def frames_of(
    records: Sequence[Record], classes: Collection[str], selection: Partitions = EVERYTHING
) -> list[tuple[RecordFrame | Skip, int]]:
    """Records as frames, each with the last index it covers: entries of what travels only, and one skip for each run of
    records that make none of them true. What goes before a frame is :func:`~sidecar.replication.parts.parts_of` its
    record."""
    frames: list[tuple[RecordFrame | Skip, int]] = []
    for first, last, travels in runs_of(records, lambda record: concerns(record, classes, selection)):
        frame = RecordFrame(stripped(last, classes, selection).encode()) if travels else _skip(first, last)
        frames.append((frame, last.index))
    return frames


def _skip(first: Record, last: Record) -> Skip:
    return Skip(first.index, last.index, first.header.prev_hash, last.chain_hash)


class Outgoing(NamedTuple):
    """One frame, encoded. ``record`` is None for a skip; ``last`` is the last record that it covers."""

    raw: bytes
    last: int
    record: Record | None


class SharedFrames:
    """The newest frames of one mode and tenure, ``bytes_max`` of them. ``encoded`` counts what was not found."""

    def __init__(self, classes: Collection[str], bytes_max: int = SHARED_BYTES_MAX) -> None:
        self._classes = classes
        self._bytes_max = bytes_max
        self._bytes = 0
        self._numbers: dict[Partitions, int] = {}
        self._frames: dict[tuple[int, int], bytes] = {}  # by record and selection, in the order they were made
        self.encoded = 0

    def of(self, records: Sequence[Record], selection: Partitions) -> Iterator[Outgoing]:
        """See :func:`frames_of`. Each is made when it is asked for."""
        number = self._number(selection)
        for first, last, travels in runs_of(records, lambda record: concerns(record, self._classes, selection)):
            if travels:
                yield Outgoing(self._frame(last, number, selection), last.index, last)
            else:
                yield Outgoing(encode(_skip(first, last)), last.index, None)

    def _number(self, selection: Partitions) -> int:
        if len(self._numbers) >= SELECTIONS_MAX and selection not in self._numbers:
            self._numbers.clear()
            self._frames.clear()
            self._bytes = 0
        return self._numbers.setdefault(selection, len(self._numbers))

    def _frame(self, record: Record, number: int, selection: Partitions) -> bytes:
        key = record.index, number
        raw = self._frames.get(key)
        if raw is None:
            self.encoded += 1
            raw = self._frames[key] = encode(RecordFrame(stripped(record, self._classes, selection).encode()))
            self._bytes += len(raw)
            while self._bytes > self._bytes_max:
                self._bytes -= len(self._frames.pop(next(iter(self._frames))))
        return raw
