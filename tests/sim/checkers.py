"""Judges of a finished run: what clients were told against the log the witness kept. P1 :func:`landed`,
P3 :func:`linearizable`, P4 and P2 :func:`data_is_fold`, P8 :func:`index_is_exact` and :func:`stored_index_reaches`. At
every transaction P2, P4, P11 and P13 are judged (``witness.py``), P14 and F46 by the world (``world.py``).

Each takes what it needs and returns violations; none of them trusts anything that the tested code computed.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from consul_backend.lazy_index import put_extent
from consul_backend.memory_table import MemoryTable
from consul_backend.merkle import Forest
from consul_backend.merkle_pages import Extent, decode_extent, merkle_prefix, parse_extent_name, parse_partition_name
from consul_backend.wal import record_key
from tests.sim.fold import Fold
from tests.sim.history import NEVER, History, Listing, Read, Write
from tests.sim.witness import Violation, Witness

Version = tuple[int, int]
"""(record, 1 for the value that the record holds and 0 for one that shared the record and was overwritten in it)."""


class Logged(Protocol):
    """A log that was read."""

    @property
    def fold(self) -> Fold:
        """What it makes true."""


def landed(history: History, witness: Logged) -> tuple[dict[int, int], list[Violation]]:
    """P1: every acknowledged batch is in the log exactly once, failed ones never, unknown ones at most once; and each
    is there whole. Returns the record of each batch that is there, by the batch's number."""
    found: list[Violation] = []
    where = _records_by_value(witness)
    contents = witness.fold.effects
    by_index: dict[int, list[Write]] = defaultdict(list)
    for write in history.writes:
        by_index[write.index].append(write)
    uncertain = [write for write in history.writes if write.outcome == "unknown"]
    at: dict[int, int] = {}
    for write in history.writes:
        seen = {index for item in write.entries.items() if item[1] is not None for index in where.get(item, ())}
        what = f"batch {write.number} of {write.client} ({write.outcome})"
        if len(seen) > 1:
            found.append(Violation("P1", f"{what} is in records {sorted(seen)}"))
        if write.outcome == "fail" and seen:
            found.append(Violation("P1", f"{what} was reported as failed and is in record {min(seen)}"))
        if write.outcome == "ok":
            if not 1 <= write.index <= len(contents) or not seen <= {write.index}:
                found.append(Violation("P1", f"{what} was acknowledged as record {write.index}, is in {sorted(seen)}"))
                continue
            at[write.number] = write.index
        elif write.outcome == "unknown" and seen:
            at[write.number] = min(seen)
        if write.number in at:
            found += _whole(write, at[write.number], contents[at[write.number] - 1], by_index, uncertain)
    return at, found


def _records_by_value(witness: Logged) -> dict[tuple[str, bytes | None], list[int]]:
    where: dict[tuple[str, bytes | None], list[int]] = defaultdict(list)
    for key, versions in witness.fold.versions.items():
        for index, value in versions:
            where[key, value].append(index)
    return where


def _whole(
    write: Write,
    index: int,
    content: dict[str, bytes | None],
    by_index: dict[int, list[Write]],
    uncertain: list[Write],
) -> Iterable[Violation]:
    for key, value in write.entries.items():
        if key in content and content[key] == value:
            continue
        # Another batch of the same transaction may have overwritten it there.
        others = [*by_index[index], *uncertain] if key in content else []
        if not any(it is not write and key in it.entries and it.entries[key] == content[key] for it in others):
            yield Violation("P1", f"batch {write.number} ({write.outcome}) is in record {index} without its {key}")


@dataclass(frozen=True, slots=True)
class Exemption:
    """Reads, or lists only, that overlap this time are not judged: the fault at its beginning is outside what they
    promise."""

    start_s: float
    stop_s: float
    lists_only: bool = False


class _Register:
    """One key. Its versions are given by the log, so checking is a sweep over the operations by invocation."""

    def __init__(self, key: str, versions: Sequence[tuple[int, bytes | None]]) -> None:
        self._key = key
        self._indexes = [0, *(index for index, _ in versions)]
        self._values: list[bytes | None] = [None, *(value for _, value in versions)]
        self._by_value = {value: index for index, value in versions if value is not None}
        self._writes: list[tuple[float, float, Version]] = []
        self._invoked: dict[Version, float] = {}
        self._reads: list[tuple[float, float, Callable[[Version], Version | None], str]] = []

    def wrote(self, write: Write, index: int) -> None:
        at = bisect_left(self._indexes, index)
        shown = at < len(self._indexes) and self._values[at] == write.entries[self._key]
        version = (index, 1 if shown else 0)
        self._writes.append((write.invoked_s, write.completed_s, version))
        if shown:
            self._invoked[version] = min(write.invoked_s, self._invoked.get(version, NEVER))

    def read(self, read: Read) -> None:
        if read.value is None:
            choose = self._first(lambda value: value is None)
        else:
            index = self._by_value.get(read.value)
            version = None if index is None else (index, 1)
            choose = lambda low: version if version is not None and version >= low else None  # noqa: E731 - two choices side by side
        what = "nothing" if read.value is None else f"the value of record {self._by_value.get(read.value, 'none')}"
        self._reads.append((read.invoked_s, read.completed_s, choose, f"{read.client} read {what}"))

    def listed(self, listing: Listing, present: bool) -> None:
        choose = self._first(lambda value: (value is not None) is present)
        seen = "listed it" if present else "did not list it"
        self._reads.append((listing.invoked_s, listing.completed_s, choose, f"{listing.client} {seen}"))

    def _first(self, holds: Callable[[bytes | None], bool]) -> Callable[[Version], Version | None]:
        """The oldest version from ``low`` on whose value fits: the choice that leaves later operations most room."""

        def choose(low: Version) -> Version | None:
            for at in range(bisect_left(self._indexes, low[0]), len(self._indexes)):
                if holds(self._values[at]) and (self._indexes[at], 1) >= low:
                    return self._indexes[at], 1
            return None

        return choose

    def violations(self) -> Iterable[Violation]:
        """The history is linearizable iff each operation's version is no older than that of any operation which ended
        before it began, and no read ends before the write of its version begins."""
        steps: list[tuple[float, int, float, Version | None, int]] = []
        steps += [(inv, 0, comp, version, -1) for inv, comp, version in self._writes]
        steps += [(read[0], 1, read[1], None, n) for n, read in enumerate(self._reads)]
        steps.sort(key=lambda step: (step[0], step[1], step[2]))
        done: list[tuple[float, Version]] = []
        low: Version = (0, 1)
        for invoked_s, _, completed_s, version, read in steps:
            while done and done[0][0] < invoked_s:
                low = max(low, heapq.heappop(done)[1])
            if read < 0:
                assert version is not None
                if version < low:
                    yield self._violation(invoked_s, f"record {version[0]} was written after record {low[0]} was seen")
            else:
                _, _, choose, what = self._reads[read]
                version = choose(low)
                if version is None:
                    yield self._violation(invoked_s, f"{what}, when record {low[0]} had been seen or acknowledged")
                    continue
                if self._invoked.get(version, 0.0) > completed_s:
                    yield self._violation(invoked_s, f"{what}, before it was written")
            if completed_s != NEVER:
                heapq.heappush(done, (completed_s, version))

    def _violation(self, at_s: float, text: str) -> Violation:
        return Violation("P3", f"{self._key} at {at_s:.3f} s: {text}")


def linearizable(
    history: History, witness: Witness, at: dict[int, int], exempt: Sequence[Exemption] = ()
) -> list[Violation]:
    """P3: each key is a linearizable register for acknowledged writes, reads and lists. Linear time per key."""
    registers: dict[str, _Register] = {}

    def register(key: str) -> _Register:
        if key not in registers:
            registers[key] = _Register(key, witness.fold.versions.get(key, ()))
        return registers[key]

    def judged(operation: Read | Listing) -> bool:
        return not any(
            operation.invoked_s <= it.stop_s and operation.completed_s >= it.start_s
            for it in exempt
            if isinstance(operation, Listing) or not it.lists_only
        )

    for write in history.writes:
        if write.number in at:
            for key in write.entries:
                register(key).wrote(write, at[write.number])
    for read in filter(judged, history.reads):
        register(read.key).read(read)
    folder: dict[str, set[str]] = defaultdict(set)
    for key in witness.fold.versions:
        folder[key[: key.rindex("/") + 1]].add(key)
    for listing in filter(judged, history.listings):
        below = folder.get(listing.prefix, set())
        for name in listing.names - {key.removeprefix(listing.prefix) for key in below}:
            register(listing.prefix + name).listed(listing, True)
        for key in below:
            register(key).listed(listing, key.removeprefix(listing.prefix) in listing.names)
    return [violation for key in sorted(registers) for violation in registers[key].violations()]


def data_is_fold(witness: Witness, table: MemoryTable, generation: str, segment_records: int) -> list[Violation]:
    """P4 and P2 on what is stored at the end: data = fold of the log, and the log is all there from its oldest on."""
    found: list[Violation] = []
    state = witness.fold.state_at(len(witness.records))
    names = {witness.where(key) for key in state}
    settled = [key for key in state if key not in witness.fold.unrolled and key not in witness.beyond_repair]
    differing = [key for key in settled if witness.stored_value(key) != state[key]]
    foreign = [item.key for item in table.items(f"g/{generation}/d/") if item.key not in names]
    foreign = [key for key in foreign if key not in {witness.where(key) for key in witness.fold.unrolled}]
    if differing or foreign:
        what = f"{len(differing) + len(foreign)} keys differ from the fold of the log"
        found.append(Violation("P4", f"{what}, first {min(differing + foreign)}"))
    log = {item.key for item in table.items(f"g/{generation}/wal/")}
    indexes = range(witness.oldest_index, len(witness.records) + 1)
    if log != {record_key(generation, index, segment_records) for index in indexes}:
        found.append(Violation("P2", f"the stored log is not records {indexes.start} to {indexes.stop - 1}"))
    return found


def index_is_exact(witness: Witness, forest: Forest, index: int, *, roots: bool) -> list[Violation]:
    """P8: the index of a store whose head is record ``index`` is the one computed from the data. ``roots``: also by
    comparing roots with an index built anew."""
    state = witness.fold.state_at(index)
    wrong = [key for key, value in state.items() if forest.digest_of(key) != witness.digest_of(key, value)]
    if wrong:
        return [Violation("P8", f"at record {index} the index is wrong for {len(wrong)} keys, first {min(wrong)}")]
    count = sum(forest.count(cls, partition) for cls in "rlc" for partition in forest.names(cls))
    if count != len(state):
        return [Violation("P8", f"at record {index} the index has {count} keys, the log {len(state)}")]
    if roots:
        fresh = Forest()
        fresh.apply((key, witness.digest_of(key, value)) for key, value in state.items())
        for cls in "rlc":
            if fresh.root(cls) != forest.root(cls):
                return [Violation("P8", f"at record {index} the root of class {cls} is not that of the data")]
    return []


def stored_index_reaches(witness: Witness, table: MemoryTable, generation: str) -> list[Violation]:
    """P8 on what is stored: the index that the extents hold lacks nothing from before the checkpoint's redo point."""
    if witness.checkpoint is None:
        return []
    state = witness.fold.state_at(len(witness.records))
    newest = {key: versions[-1][0] for key, versions in witness.fold.versions.items()}
    forest = Forest()
    for where in stored_extents(table, generation):
        put_extent(forest, *where)
    redo_from = witness.checkpoint.redo_from
    for key, index in sorted(newest.items()):
        expected = witness.digest_of(key, state[key]) if key in state else None
        if index < redo_from and forest.digest_of(key) != expected:
            head = witness.checkpoint.head_index
            what = f"checkpoint {head} says redo from {redo_from}, but the stored index lacks {key} of record {index}"
            return [Violation("P8", what)]
    return []


def stored_extents(table: MemoryTable, generation: str) -> list[tuple[str, str, int, int, Extent]]:
    """Every stored extent, the shallow ones first: class, partition, depth, first bucket, contents."""
    found = []
    for item in table.items(merkle_prefix(generation)):
        cls, folder, name = item.key.removeprefix(merkle_prefix(generation)).split("/")
        depth, start = parse_extent_name(name)
        found.append((cls, parse_partition_name(f"{folder}/"), depth, start, decode_extent(item.key, item.value)))
    return sorted(found, key=lambda extent: extent[2])
