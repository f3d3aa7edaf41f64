"""Large batches: what one transaction cannot hold, and is atomic all the same. Pure: planning and reading.

In the log such a batch is *parts* (entries, no data key touched), then one *commit* record, which makes every entry of
the parts true at its own index, or an *abort* record, which voids them. Small batches go on in between. After the
commit, *roll* records write the data keys, until one says *done*.

==========  =============================  =======================  ==============================================
newest of   what is true                   readers see              recovery
==========  =============================  =======================  ==============================================
part        nothing of the batch           the old values           an abort record
commit      all of it                      the new values, from     rolls everything that no later record replaced
roll        all of it                      the overlay or the key   the same: writing a value again changes nothing
roll, done  all of it, in the data keys    the data keys            nothing
abort       nothing, for ever              the old values           nothing
==========  =============================  =======================  ==============================================

An entry whose value is larger than a part goes on in the next one: the first entry of a *continued* part is the rest of
the last entry of the part before. That is the log's own framing; above it entries are whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from consul_backend.batching import GROUP_FRAME_BYTES, Prepared
from consul_backend.errors import TooLarge
from consul_backend.wal import CorruptRecord, Large, PartRef, Record, Write

PART_BYTES_MAX = 192 * 1024
"""Of one part's record: a small write that arrives waits for one part at most, and that not for long."""

COMMIT_BYTES_PER_PART = 48
"""Upper bound of what a commit record holds for one part."""

VALUE_ALLOWANCE_BYTES = 128
"""Of a value, what is not counted against the bound of a batch: what encryption adds is not the client's."""


@dataclass(frozen=True, slots=True)
class BatchBounds:
    """What a batch may be at most, however many transactions it takes."""

    entries_max: int
    bytes_max: int

    def require(self, writes: Sequence[Write]) -> None:
        """Raises TooLarge, naming size and limit."""
        if len(writes) > self.entries_max:
            raise TooLarge(f"{len(writes)} entries in one batch, the limit is {self.entries_max}")
        size = sum([max(0, len(write.value) - VALUE_ALLOWANCE_BYTES) for write in writes if write.value is not None])
        if size > self.bytes_max:
            raise TooLarge(f"values of {size} bytes in one batch, the limit is {self.bytes_max}")


# -- writing


class Cursor(NamedTuple):
    """How far the parts have come: the next entry, and bytes of its value that are written already."""

    entry: int
    offset: int


START = Cursor(0, 0)


@dataclass(frozen=True, slots=True)
class PartPlan:
    """One part. ``after`` is where the next one begins."""

    groups: dict[tuple[str, str], Sequence[tuple[str, bytes | None]]]
    continued: bool
    after: Cursor


def in_order(entries: Iterable[Prepared]) -> list[Prepared]:
    """Entries as parts take them: each group's together."""
    groups: dict[tuple[str, str], list[Prepared]] = {}
    for entry in entries:
        groups.setdefault(entry.group, []).append(entry)
    return [entry for group in sorted(groups) for entry in groups[group]]


def next_part(entries: Sequence[Prepared], cursor: Cursor, size_max: int) -> PartPlan:
    """The part that begins at ``cursor``, of about ``size_max`` record bytes and never more; at least one entry or a
    piece of one. ``entries`` are :func:`in_order`. Raises TooLarge when not even a piece fits."""
    groups: dict[tuple[str, str], list[tuple[str, bytes | None]]] = {}
    at, offset = cursor
    room = size_max
    while at < len(entries):
        entry = entries[at]
        frame = entry.record_bytes - (len(entry.value) if entry.value is not None else 0)
        if entry.group not in groups:
            frame += GROUP_FRAME_BYTES + len(entry.group[1].encode())
        room -= frame
        left = len(entry.value) - offset if entry.value is not None else 0
        whole = left <= room
        # A piece is cut off only where a part would stay mostly empty without it.
        if not whole and (room < 1 or (groups and room < size_max // 4)):
            break
        piece = entry.value
        if piece is not None:
            piece = piece[offset : offset + room]
        groups.setdefault(entry.group, []).append((entry.path, piece))
        if not whole:
            offset += room
            break
        room -= left
        at, offset = at + 1, 0
    if not groups:
        raise TooLarge(f"an entry's name alone is larger than a part of {size_max} bytes")
    return PartPlan(dict(groups), cursor.offset > 0, Cursor(at, offset))


def part_ref(record: Record) -> PartRef:
    """A written part, as its commit record names it."""
    return PartRef(record.index, record.chain_hash, "".join(sorted({head.cls for head in record.header.groups})))


# -- reading


class Assembly:
    """The entries of one batch, from its parts in order. Parts and groups of classes that are left out are no loss to
    the others."""

    def __init__(self) -> None:
        self._writes: dict[str, Write] = {}
        self._pieces: dict[str, list[bytes]] = {}
        self.parts: list[PartRef] = []

    def add(self, record: Record) -> None:
        """The next part. Raises CorruptRecord when it goes on with what did not come."""
        large = require_large(record)
        continued = large.continued and record.bodies[0] is not None
        for cls, partition, entries in record.groups():
            for path, value in entries:
                key = f"{cls}/{partition}/{path}"
                if continued:
                    continued = False
                    before = self._writes.get(key)
                    if before is None or before.value is None or value is None:
                        raise CorruptRecord(f"record {record.index} goes on with an entry that did not begin")
                    self._pieces.setdefault(key, [before.value]).append(value)
                elif key in self._writes:
                    raise CorruptRecord(f"record {record.index} repeats an entry of its batch")
                else:
                    self._writes[key] = Write(key, value)
        self.parts.append(part_ref(record))

    def writes(self) -> list[Write]:
        """Every entry, whole. Little work for each: it is all done at one moment."""
        for key, pieces in self._pieces.items():
            self._writes[key] = Write(key, b"".join(pieces))
        return list(self._writes.values())

    def by_key(self) -> dict[str, Write]:
        """The same by key, after :meth:`writes`."""
        return dict(self._writes)


def require_large(record: Record) -> Large:
    """What a record says of its large batch. Raises CorruptRecord when it is none."""
    if record.header.large is None:
        raise CorruptRecord(f"record {record.index} belongs to no large batch")
    return record.header.large


@dataclass(slots=True)
class Unrolled:
    """A batch that is true and whose data keys are not all written: ``entries`` are those no later record replaced."""

    id: bytes
    first: int
    commit: int
    entries: dict[str, Write]


@dataclass(slots=True)
class Replay:
    """The log, record by record, as what became true. Begin at or before the first part of whatever matters; that may
    be inside a batch that does not, because it was voided or is out of reach."""

    open: dict[bytes, Assembly] = field(default_factory=dict)
    """Batches whose end has not come, by id."""
    unrolled: Unrolled | None = None
    spans: list[tuple[int, int]] = field(default_factory=list)
    """First part and commit record of every batch that became true."""

    def feed(self, record: Record) -> list[Write]:
        """The entries that are true from this record on. Raises CorruptRecord for a commit without its parts."""
        header = record.header
        large = header.large
        if large is None:
            writes = record.writes()
            if self.unrolled is not None:
                for write in writes:
                    self.unrolled.entries.pop(write.key, None)
            return writes
        if header.kind == "part":
            if large.continued and large.id not in self.open:
                return []  # what is read begins inside this batch: it was voided, or its commit record will say so
            self.open.setdefault(large.id, Assembly()).add(record)
        elif header.kind == "commit":
            return self._commit(record, large)
        elif header.kind == "abort":
            self.open.pop(large.id, None)
        elif large.done and self.unrolled is not None and self.unrolled.id == large.id:
            self.unrolled = None
        return []

    def _commit(self, record: Record, large: Large) -> list[Write]:
        assembly = self.open.pop(large.id, None)
        if assembly is None or tuple(assembly.parts) != large.parts:
            raise CorruptRecord(f"record {record.index} commits a batch whose parts are not those it names")
        writes = assembly.writes()
        first = large.parts[0].index
        self.spans.append((first, record.index))
        self.unrolled = Unrolled(large.id, first, record.index, assembly.by_key())
        return writes

    @property
    def firsts(self) -> list[int]:
        """The first part of every batch that is open or not rolled to its end."""
        found = [assembly.parts[0].index for assembly in self.open.values()]
        return found + ([self.unrolled.first] if self.unrolled is not None else [])


def crossing(spans: Iterable[tuple[int, int]], segment_records: int) -> dict[int, int]:
    """By segment of the log: the first part that a commit record in it needs from an older segment."""
    found: dict[int, int] = {}
    for first, commit in spans:
        segment = commit // segment_records
        if first // segment_records < segment:
            found[segment] = min(first, found.get(segment, first))
    return found
