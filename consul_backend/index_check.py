"""Comparing the index with what is stored, while the store serves: data keys, and the index's own extents. Read-only.

Every data key is read and its digest compared with the index's. A difference counts only after it was looked at again
past every commit in flight, with a consistent read. Entries that the index has and the scan did not meet are read one
by one: the store says *absent* with proof or raises. Memory is bounded by one counter a bucket and the findings.
"""

from __future__ import annotations

import asyncio
from array import array
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum

from consul_backend.chunks import Chunks
from consul_backend.errors import Corrupt
from consul_backend.fenced import Newest, require_tenure
from consul_backend.foreign import ForeignWrites
from consul_backend.keys import (
    CLASSES,
    decode_path,
    decode_segment,
    encode_partition,
    encode_path,
    may_be_ours,
    own_folders,
)
from consul_backend.lazy_index import LazyIndex, Name
from consul_backend.merkle import BUCKETS, SUBPAGES, Forest, bucket_of, count_entries, entry_digest, unpack_entries
from consul_backend.merkle_pages import (
    ExtentTable,
    decode_extent,
    extent_key,
    merkle_prefix,
    parse_extent_name,
    range_of,
)
from consul_backend.physical import Item, PhysicalStore
from consul_backend.tenure import Tenure
from consul_backend.wal import Head, Record, Write

PAGES = BUCKETS // SUBPAGES
PAGES_AT_ONCE = 16
READ_AT_ONCE = 64
READS_AT_ONCE = 4
LISTS_AT_ONCE = 4
NAMES_AT_ONCE = 8192
FINDINGS_MAX = 100_000


class Kind(Enum):
    """What is wrong with one key."""

    FOREIGN = "its value is none that this cluster wrote"
    EXTRA = "the index does not have it"
    LOST = "it is not stored"


@dataclass(frozen=True, slots=True)
class Finding:
    """One key whose stored state is not what the index says; ``digest`` is the index's."""

    kind: Kind
    key: str
    where: str
    digest: bytes | None


@dataclass(slots=True)
class Inspected:
    """The parts of one tenure's store that a check looks at and a reindex changes.

    ``value_of(stored)`` is the value that a data key's bytes stand for, None when it cannot be had (most stand for
    themselves). ``settled(key)``
    waits for commits in flight that touch the key, ``pending(key)`` says whether any is queued or in flight;
    ``elsewhere(key)`` says that the key's value is on its way to the
    data key and readers have it from memory meanwhile. ``stored(index)`` waits until the index is, up to that record.
    ``fresh_name()`` has never been the name of chunks.
    """

    physical: PhysicalStore
    generation: str
    tenure: Tenure
    chunks: Chunks
    forest: Forest
    table: ExtentTable
    lazy: LazyIndex
    head: Callable[[], Head]
    oldest: Callable[[], int]
    newest: Newest
    stored: Callable[[int], Awaitable[None]]
    records: Callable[[int, int], Awaitable[list[Record]]]
    commit: Callable[[Sequence[Write]], Awaitable[Head]]
    value_of: Callable[[bytes], Awaitable[bytes | None]]
    settled: Callable[[str], Awaitable[bool]]
    pending: Callable[[str], bool]
    elsewhere: Callable[[str], bool]
    fresh_name: Callable[[], str]
    foreign: ForeignWrites

    def where(self, key: str) -> str:
        """The physical data key."""
        cls, partition, path = key.split("/", 2)
        return f"g/{self.generation}/d/{encode_partition(cls, partition)}/{encode_path(path)}"


@dataclass(slots=True)
class CheckReport:
    """``pages`` are the subpages that do not hold, by page, by (class, partition); ``problems`` are for people and name
    no path of ours. ``counts`` are the findings by kind, of which ``findings`` has the first and ``met`` the keys;
    ``strays`` are names that this program never writes: nothing of it reads them, or could."""

    pages: dict[Name, dict[int, set[int]]] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    damaged: set[tuple[str, str, int]] = field(default_factory=set)
    bad_extents: list[tuple[str, str, int]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    met: set[str] = field(default_factory=set)
    counts: Counter[Kind] = field(default_factory=Counter)
    strays: int = 0
    keys: int = 0

    @property
    def corrupted(self) -> bool:
        """Whether anything does not hold."""
        return bool(self.pages or self.problems)

    def add(self, cls: str, partition: str, bucket: int) -> None:
        """A bucket does not hold."""
        pages = self.pages.setdefault((cls, partition), {})
        pages.setdefault(bucket // SUBPAGES, set()).add(bucket % SUBPAGES)

    def stray(self, where: str, names: Sequence[str]) -> None:
        """Names that were met where they cannot be ours."""
        if names:
            self.strays += len(names)
            self.problems.append(
                f"{where}: {len(names)} names that this program never writes, one of them {min(names)!r}: they are left"
                " alone; whoever wrote them can delete them"
            )


@dataclass(slots=True)
class Progress:
    """``done`` of about ``total`` keys. Whoever looks at it sees it move."""

    stage: str = "scanning"
    done: int = 0
    total: int = 0


Collect = Callable[[Name, int, str, bytes], None]
"""Hears class and partition, page, path and digest of every data key in a damaged page."""


async def check(
    parts: Inspected,
    progress: Progress,
    *,
    extents: bool = True,
    collect: Collect | None = None,
    only: Collection[Name] | None = None,
) -> CheckReport:
    """Compare data keys and, if asked for, stored extents with the index; of everything, or of the partitions ``only``.
    Raises FenceLost, and what reading raises."""
    report = CheckReport()
    await parts.lazy.load_undamaged(only)
    for (cls, partition, page), problem in parts.lazy.damaged.items():
        if only is not None and (cls, partition) not in only:
            continue
        report.damaged.add((cls, partition, page))
        report.pages.setdefault((cls, partition), {}).setdefault(page, set()).update(range(SUBPAGES))
        report.problems.append(f"class {cls}, partition {partition}, page {page}: {problem}")
    names = {(cls, name) for cls in "rlc" for name in parts.forest.names(cls)} if only is None else set(only)
    progress.total = sum([parts.forest.count(*name) for name in names])
    progress.stage = "building"
    stored = await _partitions(parts, report) if only is None else set()
    for name in sorted(names | stored):
        await _check_partition(parts, name, report, progress, collect)
    if extents:
        for name in parts.table.names if only is None else only:
            await _check_extents(parts, name, report)
    if report.findings or report.problems:
        await require_tenure(parts.physical, parts.tenure)  # or else what looks like damage is a successor's work
    return report


async def _partitions(parts: Inspected, report: CheckReport) -> set[Name]:
    root = f"g/{parts.generation}/d/"
    found: set[Name] = set()
    strays: list[str] = []
    for cls in await parts.physical.list(root, consistent=True):
        if cls.removesuffix("/") not in CLASSES or not cls.endswith("/"):
            strays.append(cls)
            continue
        for folder in await parts.physical.list(root + cls, consistent=True):
            if own_folders([folder]):
                found.add((cls.removesuffix("/"), decode_segment(folder.removesuffix("/"))))
            else:
                strays.append(cls + folder)
    report.stray("beside the partitions", strays)
    return found


async def scan(
    physical: PhysicalStore, generation: str, name: Name, strays: list[str]
) -> AsyncIterator[list[tuple[str, Item]]]:
    """Path and item of every data key of a partition, in pieces; keys that vanish meanwhile are left out. Names that
    this program never writes go to ``strays``, of a folder its own."""
    root = f"g/{generation}/d/{encode_partition(*name)}/"
    folders: list[str] = [root]
    keys: deque[str] = deque()
    while folders or keys:
        if folders and len(keys) < READ_AT_ONCE * READS_AT_ONCE:
            # Folders may hold one key each: they are listed side by side, and what they hold is read together.
            batch, folders = folders[-LISTS_AT_ONCE:], folders[:-LISTS_AT_ONCE]
            for found, deeper in await asyncio.gather(*(_listed(physical, folder, strays) for folder in batch)):
                keys += found
                folders += deeper
            continue
        pieces = [
            [keys.popleft() for _ in range(min(READ_AT_ONCE, len(keys)))]
            for _ in range(min(READS_AT_ONCE, -(-len(keys) // READ_AT_ONCE)))
        ]
        for items in await asyncio.gather(*(physical.get_many(piece, consistent=True) for piece in pieces)):
            yield [(decode_path(item.key.removeprefix(root)), item) for item in items if item is not None]


async def _listed(physical: PhysicalStore, folder: str, strays: list[str]) -> tuple[list[str], list[str]]:
    """Keys below a folder, and those folders in it that are still to be listed: none unless it holds too many keys."""
    names = await physical.names_below(folder, NAMES_AT_ONCE, consistent=True)
    if names is not None:
        return _ours(folder, names, strays), []
    level = _ours(folder, await physical.list(folder, consistent=True), strays)
    return [name for name in level if not name.endswith("/")], [name for name in level if name.endswith("/")]


def _ours(folder: str, names: Iterable[str], strays: list[str]) -> list[str]:
    """Those of the names below ``folder``, whole, that may be ours."""
    found: list[str] = []
    for name in names:
        plain = all(map(may_be_ours, name.removesuffix("/").split("/"))) and name != "/"
        (found if plain else strays).append(folder + name)
    return found


async def _check_partition(
    parts: Inspected, name: Name, report: CheckReport, progress: Progress, collect: Collect | None
) -> None:
    met = array("I", bytes(4 * BUCKETS))
    prefix = f"{name[0]}/{name[1]}/"
    strays: list[str] = []
    async for piece in scan(parts.physical, parts.generation, name, strays):
        for path, item in piece:
            bucket = bucket_of(path)
            if (*name, bucket // SUBPAGES) in report.damaged:
                value = await parts.value_of(item.value)
                if collect is not None and value is not None:
                    collect(name, bucket // SUBPAGES, path, entry_digest(prefix + path, value))
                continue
            met[bucket] += 1
            if parts.forest.digest_of(prefix + path) != entry_digest(prefix + path, item.value):
                await _look_again(parts, prefix + path, item.key, report)
        report.keys += len(piece)
        progress.done = report.keys
        await asyncio.sleep(0)
    report.stray(f"class {name[0]}, partition {name[1]}", strays)
    # Counters only say where to look: a commit during the scan makes them differ and changes nothing else.
    damaged = [number for cls, partition, number in report.damaged if (cls, partition) == name]
    for start, stop in _between(damaged):
        for bucket, blob in list(parts.forest.blobs(*name, start * SUBPAGES, stop * SUBPAGES)):
            if count_entries(blob) != met[bucket]:
                for path, _ in unpack_entries(blob):
                    await _look_again(parts, prefix + path, parts.where(prefix + path), report)
        await asyncio.sleep(0)


def _between(damaged: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Runs of pages, first and last exclusive, without those that cannot be read."""
    start = 0
    for stop in sorted({*damaged, *range(PAGES_AT_ONCE, PAGES + 1, PAGES_AT_ONCE)}):
        if start < stop:
            yield start, stop
        start = stop + 1 if stop in damaged else stop


async def _look_again(parts: Inspected, key: str, where: str, report: CheckReport) -> None:
    if key in report.met:
        return  # its bucket held another one that is wrong
    finding = await examine(parts, key, where)
    if finding is None:
        return
    cls, partition, path = key.split("/", 2)
    report.add(cls, partition, bucket_of(path))
    report.counts[finding.kind] += 1
    if len(report.findings) < FINDINGS_MAX:
        report.findings.append(finding)
        report.met.add(key)


async def examine(parts: Inspected, key: str, where: str) -> Finding | None:
    """What is wrong with one key, judged past commits in flight; None when all is well."""
    while True:
        before = parts.forest.digest_of(key)
        item = await parts.physical.get(where, consistent=True)
        values = [item.value, await parts.value_of(item.value)] if item is not None else []
        digest = parts.forest.digest_of(key)
        if await parts.settled(key) or digest != before or parts.forest.digest_of(key) != digest:
            continue
        if parts.elsewhere(key):
            return None
        if item is None:
            return Finding(Kind.LOST, key, where, digest) if digest is not None else None
        if digest is None:
            return Finding(Kind.EXTRA, key, where, None)
        same = any(value is not None and entry_digest(key, value) == digest for value in values)
        return None if same else Finding(Kind.FOREIGN, key, where, digest)


async def _check_extents(parts: Inspected, name: Name, report: CheckReport) -> None:
    """Every stored extent must be the one that the table knows; dirty leaves are about to be written anyway."""
    prefix = f"{merkle_prefix(parts.generation)}{encode_partition(*name)}/"
    listed = await parts.physical.list(prefix, consistent=True)
    names = list(filter(may_be_ours, listed))
    report.stray(f"index of class {name[0]}, partition {name[1]}", [one for one in listed if one not in set(names)])
    met: set[tuple[int, int]] = set()
    for start in range(0, len(names), READ_AT_ONCE // 4):
        piece = names[start : start + READ_AT_ONCE // 4]
        items = await parts.physical.get_many([prefix + one for one in piece], consistent=True)
        for one, item in zip(piece, items, strict=True):
            try:
                depth, first = parse_extent_name(one)
            except Corrupt as error:
                report.problems.append(f"class {name[0]}, partition {name[1]}: {error}")
                continue
            met.add((depth, first))
            if not parts.lazy.lacks(*name, first // SUBPAGES):
                await _check_extent(parts, name, prefix + one, depth, first, item, report)
        await asyncio.sleep(0)
    for depth, first in parts.table.clean_leaves(*name):
        if (depth, first) not in met and not parts.lazy.lacks(*name, first // SUBPAGES):
            where = extent_key(parts.generation, *name, depth, first)
            item = await parts.physical.get(where, consistent=True)
            await _check_extent(parts, name, where, depth, first, item, report)


async def _check_extent(
    parts: Inspected, name: Name, where: str, depth: int, first: int, item: Item | None, report: CheckReport
) -> None:
    problem = ""
    for _ in range(3):
        known = parts.table.stored_checksum(*name, depth, first)
        if known is None:
            return
        try:
            if item is None:
                raise Corrupt(f"index extent {where} is gone")
            if decode_extent(where, item.value).checksum == known:
                return
            problem = f"index extent {where} is not the newest"
        except Corrupt as error:
            problem = str(error)
        item = await parts.physical.get(where, consistent=True)  # perhaps it was flushed between list and look
    report.problems.append(problem)
    report.bad_extents.append((*name, first))
    low, high = range_of(depth, first)
    for bucket in range(low, high):
        report.add(*name, bucket)
