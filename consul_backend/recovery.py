"""Becoming active: what is in the store, what case that is, and what to do. ARIES' analysis and redo.

A commit is one transaction, so no record is ever half true. A large batch (``large_batch.py``) can be half written:
what the log says of it is found here and finished by the new tenure, before it serves: rolled forward if it has its
commit record, else voided by an abort record.

How a store gets into each case, and why the answer is safe:

* *no log*: the generation pointer names a prefix without a genesis. Nothing may be concluded; halt.
* *log torn*: a record below the newest is missing. Collection takes whole segments from the old end only, so this is
  damage; the records after the hole cannot be trusted to follow. Halt.
* *log shorter than the checkpoint*: the checkpoint was written after its head was committed, so records were lost: the
  store was restored in part. Halt.
* *current*: the ordinary case. Stored extents are exactly those that the checkpoint describes; each lacks at most the
  records after its LSN; repeating those in order from the redo point gives the index at the head.
* *log cut*: the redo point was collected. Collection never passes it, so this is damage. Halt.
* *index damaged*: extents are missing, older, foreign or fail their checksum. With the whole log since genesis the
  index is rebuilt from it, because the log alone says what exists. Without, halt: it must be recomputed from data.
* *first start*: nothing was flushed yet; the log since genesis is everything.
* *checkpoint lost*: as *index damaged*, whether it is missing or fails its checksum.

The work is bounded by the distance to the checkpoint, not by the number of keys: a small index is read whole, of a big
one only the heads of its pages; the rest is loaded while it is in use (``lazy_index.py``). Heads that are not those of
the checkpoint are ignored, the index is then read whole, and they are written anew.

Recovery writes nothing (a rebuild deletes what it will not use), so a crash in it is a crash before it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, field
from enum import Enum
from functools import partial

from consul_backend.checkpoint import Checkpoint, checkpoint_key, decode_checkpoint
from consul_backend.digesting import compute_digests
from consul_backend.errors import Corrupt
from consul_backend.failpoint import failpoint
from consul_backend.fenced import fenced_idempotent, require_tenure
from consul_backend.group_commit import Tip
from consul_backend.heads import Heads, HeadsTable, decode_heads, heads_prefix, heads_sum
from consul_backend.keys import may_be_ours, own_folders
from consul_backend.large_batch import Replay
from consul_backend.lazy_index import LazyIndex, put_extent
from consul_backend.merkle import Forest, entry_digest
from consul_backend.merkle_pages import (
    Extent,
    ExtentTable,
    decode_extent,
    merkle_prefix,
    parse_extent_name,
    parse_partition_name,
)
from consul_backend.physical import PhysicalStore
from consul_backend.tenure import Tenure
from consul_backend.txn import Delete, DeleteTree, Op
from consul_backend.wal import GENESIS_INDEX, GENESIS_PREV, CorruptRecord, Record, Write
from consul_backend.wal_reader import list_segment, list_segments, scan_records

log = logging.getLogger("core.recovery")


class Action(Enum):
    """What recovery does."""

    REDO = "repeat the log into the stored index"
    REBUILD = "drop the stored index and repeat the whole log"
    HALT = "serve nothing: a human must decide"


@dataclass(frozen=True, slots=True)
class Facts:
    """What is found, in the order of the table's columns."""

    log: bool
    """There is at least one record."""
    dense: bool
    """No record is missing between the oldest needed and the newest."""
    checkpoint: bool
    """There is a checkpoint and it has its checksum."""
    covers: bool
    """The log reaches up to the checkpoint's head."""
    matches: bool
    """The stored extents are those that the checkpoint describes (without one: there are none)."""
    reaches: bool
    """The log reaches down to the checkpoint's redo point and head."""
    whole: bool
    """The log reaches down to the genesis."""


@dataclass(frozen=True, slots=True)
class Case:
    """One row: ``pattern`` has one entry per fact, None where it does not matter."""

    label: str
    pattern: tuple[bool | None, ...]
    action: Action


YES, NO, ANY = True, False, None

# fmt: off
CASES = (
    #    label                                log  dense ckpt covers match reach whole
    Case("no log",                           (NO,  ANY,  ANY, ANY,   ANY,  ANY,  ANY), Action.HALT),
    Case("log torn",                         (YES, NO,   ANY, ANY,   ANY,  ANY,  ANY), Action.HALT),
    Case("log shorter than the checkpoint",  (YES, YES,  YES, NO,    ANY,  ANY,  ANY), Action.HALT),
    Case("current",                          (YES, YES,  YES, YES,   YES,  YES,  ANY), Action.REDO),
    Case("log cut",                          (YES, YES,  YES, YES,   YES,  NO,   ANY), Action.HALT),
    Case("index damaged, log whole",         (YES, YES,  YES, YES,   NO,   ANY,  YES), Action.REBUILD),
    Case("index damaged",                    (YES, YES,  YES, YES,   NO,   ANY,  NO),  Action.HALT),
    Case("first start",                      (YES, YES,  NO,  ANY,   YES,  ANY,  YES), Action.REDO),
    Case("checkpoint lost, log whole",       (YES, YES,  NO,  ANY,   NO,   ANY,  YES), Action.REBUILD),
    Case("checkpoint lost",                  (YES, YES,  NO,  ANY,   ANY,  ANY,  NO),  Action.HALT),
)
# fmt: on


def classify(facts: Facts) -> Case:
    """The one case that fits."""
    found = astuple(facts)
    for case in CASES:
        if all(want is ANY or want is fact for want, fact in zip(case.pattern, found, strict=True)):
            return case
    raise AssertionError(f"the recovery table does not cover {facts}")


@dataclass(slots=True)
class Recovered:
    """A store's state as of its newest record."""

    forest: Forest
    table: ExtentTable
    tip: Tip
    checkpoint: Checkpoint | None
    checkpoint_index: int
    oldest_index: int
    segment_bytes: dict[int, int]
    case: str
    lazy: LazyIndex
    heads: HeadsTable
    replay: Replay
    """Of the records that were read: large batches to finish."""
    crossings: dict[int, int]
    redone: int
    """Records that were repeated."""
    recent: list[Record] = field(default_factory=list)
    """The newest of them, for the ring of recent records."""


@dataclass(slots=True)
class _Found:
    """What analysis read, before it is judged."""

    oldest: int = 0
    newest: int = 0
    missing: int | None = None
    checkpoint: Checkpoint | None = None
    checkpoint_stored: bool = False
    checkpoint_index: int = 0
    extents: list[tuple[str, str, int, int, Extent]] = field(default_factory=list)
    damage: list[str] = field(default_factory=list)
    heads: dict[tuple[str, str], Heads] = field(default_factory=dict)
    heads_damaged: set[tuple[str, str]] = field(default_factory=set)
    heads_match: bool = field(init=False)
    lazy: bool = field(init=False)

    @property
    def redo_from(self) -> int:
        """The first record that the stored index may lack."""
        return self.checkpoint.redo_from if self.checkpoint is not None else GENESIS_INDEX


RECENT_RECORDS = 256
EAGER_KEYS = 10_000
"""An index of up to so many entries (about 40 extents) is read whole."""
_ENTRIES_BETWEEN_TURNS = 500


async def recover(
    physical: PhysicalStore, generation: str, tenure: Tenure, segment_records: int, eager_keys: int = EAGER_KEYS
) -> Recovered:
    """The index, the head and the positions of a generation, from its checkpoint, extents and log.

    Raises Corrupt (naming what is wrong), FenceLost and what the physical store raises. The caller holds the lock.
    """
    try:
        return await _recover(physical, generation, tenure, segment_records, eager_keys)
    except Corrupt:
        # What is read here is no snapshot: to a node that lost the lock meanwhile, its successor's writes look like
        # damage.
        await require_tenure(physical, tenure)
        raise


async def _recover(
    physical: PhysicalStore, generation: str, tenure: Tenure, segment_records: int, eager_keys: int
) -> Recovered:
    found = _Found()
    await _find_checkpoint(physical, generation, found)
    failpoint("recovery:after-checkpoint")
    await _find_log(physical, generation, segment_records, found)
    await _find_heads(physical, generation, found)
    found.lazy = found.heads_match and sum([head.count for head in found.heads.values()]) > eager_keys
    table = ExtentTable(generation)
    if not found.lazy:
        await _find_extents(physical, generation, found)
    elif found.checkpoint is not None:
        table.resume(found.checkpoint.extents, found.checkpoint.extents_sum)
    failpoint("recovery:after-extents")
    for extent in found.extents:
        table.add_stored(*extent)
    case = classify(_facts(found, table))
    if case.action is Action.HALT:
        raise Corrupt(_explain(case, generation, found))
    if case.action is Action.REBUILD:
        log.warning("%s: the index is made anew from the log", _explain(case, generation, found))
        doomed: list[Op] = [DeleteTree(merkle_prefix(generation)), DeleteTree(heads_prefix(generation))]
        doomed.append(Delete(checkpoint_key(generation)))
        await fenced_idempotent(physical, tenure, doomed)
        found.extents, found.checkpoint, found.checkpoint_index = [], None, 0
        found.heads, found.heads_match, found.lazy = {}, True, False
        table = ExtentTable(generation)
    recovered = await _redo(physical, generation, tenure, segment_records, found, table, case)
    failpoint("recovery:after-redo")
    return recovered


def _facts(found: _Found, table: ExtentTable) -> Facts:
    checkpoint = found.checkpoint
    if checkpoint is not None:
        matches = (checkpoint.extents, checkpoint.extents_sum) == (table.count, table.total)
        reaches = found.oldest <= checkpoint.scan_from
        covers = found.newest >= checkpoint.head_index
    else:
        matches, reaches, covers = not found.checkpoint_stored and not table.count, False, False
    return Facts(
        log=found.newest > 0,
        dense=found.missing is None,
        checkpoint=checkpoint is not None,
        covers=covers,
        matches=matches and not found.damage,
        reaches=reaches,
        whole=found.oldest == GENESIS_INDEX,
    )


def _explain(case: Case, generation: str, found: _Found) -> str:
    details = {
        "no log": "there is no write-ahead log",
        "log torn": f"record {found.missing} is missing",
        "log shorter than the checkpoint": f"the newest record is {found.newest}, the checkpoint was written later",
        "log cut": f"the oldest record is {found.oldest}, the checkpoint needs older ones",
        "checkpoint lost": f"there is no valid checkpoint and the oldest record is {found.oldest}",
    }
    named = "; ".join(found.damage[:5]) or "stored index extents are not those that the checkpoint describes"
    return f"generation {generation}: {case.label}: {details.get(case.label, named)}"


async def _find_checkpoint(physical: PhysicalStore, generation: str, found: _Found) -> None:
    item = await physical.get(checkpoint_key(generation), consistent=True)
    if item is None:
        return
    found.checkpoint_stored = True
    found.checkpoint_index = item.modify_index
    try:
        found.checkpoint = decode_checkpoint(generation, item.value)
    except Corrupt as error:
        found.damage.append(str(error))


async def _find_log(physical: PhysicalStore, generation: str, segment_records: int, found: _Found) -> None:
    segments = await list_segments(physical, generation)
    if not segments:
        return
    needed = GENESIS_INDEX
    if found.checkpoint is not None:
        needed = found.checkpoint.scan_from
    expected: int | None = None
    for segment in segments:
        first = segment * segment_records
        indexes: Sequence[int]
        if segment not in (segments[0], segments[-1]) and first + segment_records <= needed:
            # Older than anything recovery reads: only that the segment exists is checked.
            indexes = range(first, first + segment_records)
        else:
            indexes = await list_segment(physical, generation, segment, segment_records)
        if not indexes:
            continue
        for index in indexes:
            if expected is not None and index != expected and found.missing is None:
                found.missing = expected
            expected = index + 1
        found.oldest = found.oldest or indexes[0]
        found.newest = indexes[-1]
    if found.oldest % segment_records and found.oldest != GENESIS_INDEX and found.missing is None:
        # Collection takes whole segments, so a segment that begins in its middle lost records.
        found.missing = found.oldest - 1


async def _find_heads(physical: PhysicalStore, generation: str, found: _Found) -> None:
    prefix = heads_prefix(generation)
    for cls in own_folders(await physical.list(prefix, consistent=True)):
        names = list(filter(may_be_ours, await physical.list(prefix + cls, consistent=True)))
        keys = [prefix + cls + name for name in names]
        for name, key, item in zip(names, keys, await physical.get_many(keys, consistent=True), strict=True):
            where = (cls.removesuffix("/"), parse_partition_name(name))
            try:
                if item is not None:
                    found.heads[where] = decode_heads(key, item.value)
            except Corrupt as error:
                log.warning("the index will be read whole: %s", error)
                found.heads_damaged.add(where)
    checkpoint = found.checkpoint
    if checkpoint is not None:
        total = heads_sum({name: head.checksum for name, head in found.heads.items()})
        same = (checkpoint.heads, checkpoint.heads_sum) == (len(found.heads), total)
        found.heads_match = same and not found.heads_damaged
    else:
        found.heads_match = not found.heads and not found.heads_damaged


async def _find_extents(physical: PhysicalStore, generation: str, found: _Found) -> None:
    prefix = merkle_prefix(generation)
    for cls in own_folders(await physical.list(prefix, consistent=True)):
        for folder in own_folders(await physical.list(prefix + cls, consistent=True)):
            partition = parse_partition_name(folder)
            names = list(filter(may_be_ours, await physical.list(prefix + cls + folder, consistent=True)))
            keys = [prefix + cls + folder + name for name in names]
            items = await physical.get_many(keys, consistent=True)
            for name, key, item in zip(names, keys, items, strict=True):
                try:
                    depth, start = parse_extent_name(name)
                    if item is None:
                        raise Corrupt(f"index extent {key} is gone")
                    extent = decode_extent(key, item.value)
                except Corrupt as error:
                    found.damage.append(str(error))
                else:
                    found.extents.append((cls.removesuffix("/"), partition, depth, start, extent))
            await asyncio.sleep(0)


async def _redo(
    physical: PhysicalStore,
    generation: str,
    tenure: Tenure,
    segment_records: int,
    found: _Found,
    table: ExtentTable,
    case: Case,
) -> Recovered:
    checkpoint = found.checkpoint
    redo_from = found.redo_from
    forest = Forest()
    await _load(forest, found.extents)
    if not found.lazy:
        table.settle(redo_from)
    heads = HeadsTable()
    if found.heads_match:
        heads.checksums = {name: head.checksum for name, head in found.heads.items()}
    else:
        heads.stale = {*found.heads, *found.heads_damaged, *table.names}
    proof = partial(require_tenure, physical, tenure)
    cold = found.heads if found.lazy else {}
    lazy = LazyIndex(physical, generation, forest, table, cold, redo_from, prove_tenure=proof)
    repeated = await _repeat(physical, generation, segment_records, found, lazy)
    if repeated.tip is None:
        raise AssertionError("the newest record is always read")
    if not found.lazy:
        await compute_digests(forest)
    return Recovered(
        forest=forest,
        table=table,
        tip=repeated.tip,
        checkpoint=checkpoint,
        checkpoint_index=found.checkpoint_index,
        oldest_index=found.oldest,
        segment_bytes=repeated.segment_bytes,
        case=case.label,
        lazy=lazy,
        heads=heads,
        replay=repeated.replay,
        crossings=dict(checkpoint.crossings) if checkpoint is not None else {},
        redone=found.newest - redo_from + 1,
        recent=repeated.recent,
    )


@dataclass(slots=True)
class _Repeated:
    """What the log held; see :class:`Recovered`."""

    segment_bytes: dict[int, int]
    replay: Replay = field(default_factory=Replay)
    recent: list[Record] = field(default_factory=list)
    tip: Tip | None = None


async def _repeat(
    physical: PhysicalStore, generation: str, segment_records: int, found: _Found, lazy: LazyIndex
) -> _Repeated:
    """Every record that the checkpoint does not cover, in order, into the index. Raises CorruptRecord."""
    checkpoint = found.checkpoint
    repeated = _Repeated({})
    sizes = repeated.segment_bytes
    if checkpoint is not None:
        kept = found.oldest // segment_records
        sizes |= {segment: size for segment, size in checkpoint.segment_bytes.items() if segment >= kept}
    start = checkpoint.scan_from if checkpoint is not None else GENESIS_INDEX
    async for piece in scan_records(physical, generation, start, found.newest, segment_records):
        for record, item in piece:
            if record.index == GENESIS_INDEX and record.header.prev_hash != GENESIS_PREV:
                raise CorruptRecord(f"{item.key}: the first record follows another one")
            if checkpoint is not None and record.index == checkpoint.head_index:
                if record.chain_hash != checkpoint.head_hash:
                    raise CorruptRecord(f"{item.key}: the checkpoint was written after another record {record.index}")
            elif checkpoint is None or record.index > checkpoint.head_index:
                segment = record.index // segment_records
                sizes[segment] = sizes.get(segment, 0) + len(item.value)
            true = repeated.replay.feed(record)
            if record.index >= found.redo_from:
                await _redo_record(record, lazy.redo, true)
            repeated.recent.append(record)
            repeated.tip = Tip(record, item.key, item.modify_index)
        del repeated.recent[:-RECENT_RECORDS]
        await asyncio.sleep(0)
    return repeated


Redo = Callable[[str, str, str, bytes | None, int], None]
"""Repeats one change: class, partition, path, entry digest (None: deleted), record."""


async def _redo_record(record: Record, apply: Redo, true: Sequence[Write]) -> None:
    """Repeat one record into the index, where what is stored is older: ``true`` are the entries that it made true, its
    own unless it belongs to a large batch. Raises CorruptRecord when entries are left out: a cluster's own log is
    complete."""
    if None in record.bodies:
        raise CorruptRecord(f"record {record.index} lacks entries of its own log")
    for number, write in enumerate(true, 1):
        cls, partition, path = write.key.split("/", 2)
        digest = None if write.value is None else entry_digest(write.key, write.value)
        apply(cls, partition, path, digest, record.index)
        if number % _ENTRIES_BETWEEN_TURNS == 0:
            await asyncio.sleep(0)


async def _load(forest: Forest, extents: list[tuple[str, str, int, int, Extent]]) -> None:
    """Extents into the index, in the order of their names: of a partition the shallow ones first, so that for each
    bucket the deepest one counts."""
    for cls, partition, depth, start, extent in extents:
        put_extent(forest, cls, partition, depth, start, extent)
        await asyncio.sleep(0)
