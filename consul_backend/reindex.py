"""Making data keys and index agree again while the store serves.

The index, backed by the log, says what the data must be; never the other way round. So of what a check found:

=========  ============================================================================================================
foreign    the value is put aside (*quarantine*) and the right one restored from the log. Not in the log: stays as it is
           and reads of the key go on failing, until ``force`` puts it aside and deletes the entry by an ordinary commit
extra      put aside: the index proves that the key does not exist
lost       absence is proved; restored from the log. Not in the log: stays until ``force`` deletes the entry by a commit
stray      a name that this program never writes: named by the check, left alone, and so never *clean*
page       of the index, damaged in the store: taken from the data keys if these have exactly the digest that is known
           of the page; else only with ``force``
extent     of the index, damaged in the store and right in memory: written anew
=========  ============================================================================================================

What ``force`` would delete is counted first: more than the allowance goes only where the operator named the number.
Every change is one fenced transaction that names the ModifyIndex it saw, so a commit that comes first wins. Cancelling
between two of them leaves nothing half done; a second run finds the rest.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from hashlib import blake2b

import msgspec

from consul_backend.allowance import DeleteAllowance
from consul_backend.batching import MANIFEST_MAGIC
from consul_backend.chunks import split
from consul_backend.errors import Conflict, OutcomeUnknown, TooLarge
from consul_backend.failpoint import failpoint
from consul_backend.fenced import fenced_txn, require_tenure
from consul_backend.index_check import CheckReport, Finding, Inspected, Kind, Progress, check, examine
from consul_backend.keys import encode_partition
from consul_backend.large_batch import Replay
from consul_backend.lazy_index import Name
from consul_backend.merkle import entry_digest
from consul_backend.physical import Item
from consul_backend.txn import CheckIndex, CheckNotExists, Delete, Op, Set
from consul_backend.wal import Write
from consul_backend.wal_reader import RecordGone

log = logging.getLogger("core.reindex")

_encode = msgspec.msgpack.Encoder().encode

_RECORDS_AT_ONCE = 64
_ATTEMPTS = 5


@dataclass(frozen=True, slots=True)
class ReindexOptions:
    """``diff``: read back every stored extent too. ``force``: give up what cannot be restored; that deletes entries,
    and more than the ``allowance`` only as many as are ``accepted``. ``skip_flush``: do not wait until the index
    is stored."""

    diff: bool = False
    force: bool = False
    skip_flush: bool = False
    accepted: int = 0
    allowance: DeleteAllowance = field(default_factory=DeleteAllowance)


@dataclass(slots=True)
class ReindexReport:
    """What was done: keys looked at, restored from the log, put aside, deleted by force; pages of the index repaired,
    extents written anew; and what is left. ``braked``: so many deletions are over the allowance, none was made."""

    keys: int = 0
    restored: int = 0
    quarantined: int = 0
    dropped: int = 0
    pages: int = 0
    extents: int = 0
    unresolved: int = 0
    braked: int = 0

    @property
    def clean(self) -> bool:
        """Whether nothing is left that does not hold."""
        return not self.unresolved


class Quarantined(msgspec.Struct, frozen=True, array_like=True):
    """What was put aside: the logical key, the ModifyIndex and the bytes found there, or piece ``number`` of ``count``
    of them."""

    key: str
    modify_index: int
    value: bytes
    number: int = 0
    count: int = 1


def quarantine_prefix(generation: str) -> str:
    """What every quarantined value's key begins with."""
    return f"g/{generation}/quarantine/"


def quarantine_key(generation: str, key: str, item: Item) -> str:
    """Where one foreign value is put aside: once per key and ModifyIndex. Pieces after the first add their number."""
    cls, partition, path = key.split("/", 2)
    name = blake2b(f"{item.modify_index}/{path}".encode(), digest_size=16).hexdigest()
    return f"{quarantine_prefix(generation)}{encode_partition(cls, partition)}/{name}"


@dataclass(slots=True)
class _Pages:
    """Digests of the data keys of damaged pages."""

    entries: dict[tuple[str, str, int], list[tuple[str, bytes]]] = field(default_factory=dict)

    def collect(self, name: Name, page: int, path: str, digest: bytes) -> None:
        self.entries.setdefault((*name, page), []).append((path, digest))


AskOthers = Callable[[Mapping[str, bytes]], Awaitable[Mapping[str, bytes]]]
"""Values by logical key, of those entries (key to digest) that another cluster has."""


async def nobody(wanted: Mapping[str, bytes]) -> Mapping[str, bytes]:
    """There is no other cluster to ask."""
    return {}


async def reindex(
    parts: Inspected, options: ReindexOptions, progress: Progress, ask_others: AskOthers = nobody
) -> ReindexReport:
    """Check everything, then repair what can be repaired: from the log, and from other clusters what the log no longer
    has. Raises FenceLost, and what reading raises."""
    pages = _Pages()
    checked = await check(parts, progress, extents=options.diff, collect=pages.collect)
    report = ReindexReport(keys=checked.keys, unresolved=checked.strays)
    progress.stage = "replaying"
    wanted = {finding.key: finding.digest for finding in checked.findings if finding.digest is not None}
    values = await _from_log(parts, wanted) if wanted else {}
    missing = {key: digest for key, digest in wanted.items() if key not in values}
    if missing:
        told = await ask_others(missing)
        values |= {key: value for key, value in told.items() if entry_digest(key, value) == missing.get(key)}
    options = _braked(parts, checked, values, options, report)
    progress.stage = "committing"
    for finding in checked.findings:
        failpoint("reindex:before-repair")
        await _repair(parts, finding, values.get(finding.key), options, report)
    _repair_pages(parts, checked, pages, options, report)
    for cls, partition, start in checked.bad_extents:
        parts.table.mark(cls, partition, start, parts.head().index)
        report.extents += 1
    if not options.skip_flush and (report.pages or report.extents):
        await parts.stored(parts.head().index)
    if checked.findings or checked.problems:
        log.warning("reindex: %s", report)
    return report


async def heal(parts: Inspected, only: Collection[Name], keys: Collection[str] = ()) -> ReindexReport:
    """Put right, as far as the log can tell, what the partitions ``only`` hold, which are small, and the entries
    ``keys``: before anything is served from them. Nothing is given up. Raises FenceLost, and what reading raises."""
    checked = await check(parts, Progress(), extents=False, only=only)
    await parts.lazy.need(keys)
    found = [await examine(parts, key, parts.where(key)) for key in keys]
    checked.findings += [finding for finding in found if finding is not None]
    report = ReindexReport(keys=checked.keys)
    if checked.strays:
        log.error("before anything is served: %s", "; ".join(checked.problems))
    if not checked.findings:
        return report
    await require_tenure(parts.physical, parts.tenure)  # or else it is a successor's work
    wanted = {finding.key: finding.digest for finding in checked.findings if finding.digest is not None}
    values = await _from_log(parts, wanted)
    for finding in checked.findings:
        parts.foreign.found(finding.key, finding.kind.value)
        await _repair(parts, finding, values.get(finding.key), ReindexOptions(), report)
    log.warning("before anything is served: %s", report)
    if report.unresolved:
        log.error("the log no longer has %d of them: put them back from a backup, or reindex", report.unresolved)
    return report


def _braked(
    parts: Inspected,
    checked: CheckReport,
    values: Mapping[str, bytes],
    options: ReindexOptions,
    report: ReindexReport,
) -> ReindexOptions:
    """Without ``force`` where it would delete more than it may: that much is not lost one by one."""
    doomed = sum([finding.kind is not Kind.EXTRA and finding.key not in values for finding in checked.findings])
    here = sum([parts.forest.count(cls, name) for cls in "rlc" for name in parts.forest.names(cls)])
    if not options.force or doomed <= options.accepted + options.allowance.allows(here):
        return options
    report.braked = doomed
    log.error("mass-delete brake: reindex would give up %d of %d entries; none of them was deleted", doomed, here)
    return replace(options, force=False)


async def _from_log(parts: Inspected, wanted: dict[str, bytes]) -> dict[str, bytes]:
    """The values that the index means, as far as the log reaches back; those of large batches whole. A batch of which
    the parts are collected, and its commit record not yet, is out of reach."""
    replay = Replay()
    found: dict[str, bytes] = {}
    start = index = parts.oldest()
    while index <= parts.head().index:
        try:
            records = await parts.records(index, _RECORDS_AT_ONCE)
        except RecordGone:
            start = index = max(index + 1, parts.oldest())  # collected meanwhile
            replay = Replay()
            continue
        if not records:
            break
        for record in records:
            large = record.header.large
            if large is not None and large.parts and large.parts[0].index < start:
                replay.open.pop(large.id, None)
                continue
            for write in replay.feed(record):
                digest = wanted.get(write.key)
                if digest is not None and write.value is not None and entry_digest(write.key, write.value) == digest:
                    found[write.key] = write.value
        index = records[-1].index + 1
        await asyncio.sleep(0)
    return found


async def _repair(
    parts: Inspected, finding: Finding, value: bytes | None, options: ReindexOptions, report: ReindexReport
) -> None:
    for _ in range(_ATTEMPTS):  # a commit that comes first wins: then it is looked at anew
        now = await examine(parts, finding.key, finding.where)
        if now is None:
            return
        if now.digest != finding.digest:
            value = None  # written since, and wrong again: the log was read before
        if now.kind is not Kind.EXTRA and value is None:
            break
        item = await parts.physical.get(finding.where, consistent=True)
        try:
            if item is not None:
                await _put_aside(parts, finding.key, item)
            await _put_right(parts, now, item, value)
        except (Conflict, OutcomeUnknown):
            continue  # looked at anew
        except TooLarge:  # the limits shrink at this moment
            report.unresolved += 1
            return
        report.quarantined += item is not None
        report.restored += now.kind is not Kind.EXTRA
        return
    await _give_up(parts, finding, options, report)


async def _put_aside(parts: Inspected, key: str, item: Item) -> None:
    """Keep what is stored, in as many pieces as its size needs: they are written before the value is replaced, and
    again, the same, when that was cut short. Raises as :func:`~consul_backend.fenced.fenced_txn`."""
    name = quarantine_key(parts.generation, key, item)
    pieces = split(item.value, parts.physical.limits) or [b""]
    for number, piece in enumerate(pieces):
        aside = _encode(Quarantined(key, item.modify_index, piece, number, len(pieces)))
        ops: list[Op] = [
            CheckIndex(item.key, item.modify_index),
            Set(f"{name}-{number:04d}" if number else name, aside),
        ]
        await fenced_txn(parts.physical, parts.tenure, ops, parts.newest)


async def _put_right(parts: Inspected, finding: Finding, item: Item | None, value: bytes | None) -> None:
    """Store what is known to be right in place of ``item``; a value that fits no transaction as chunks. Raises as
    :func:`~consul_backend.fenced.fenced_txn`."""
    where = finding.where
    seen = CheckIndex(where, item.modify_index) if item is not None else CheckNotExists(where)
    chunks, name = parts.chunks, ""
    if value is None:
        change: Op = Delete(where)
    elif value.startswith(MANIFEST_MAGIC) or len(split(value, parts.physical.limits)) > 1:
        name = parts.fresh_name()
        digest = finding.digest or b""
        change = Set(where, await chunks.write(name, finding.key, where, value, digest, parts.physical.limits))
    else:
        change = Set(where, value)
    try:
        await fenced_txn(parts.physical, parts.tenure, [seen, change], parts.newest)
    except OutcomeUnknown:
        raise  # the data key may name the chunks: the sweep of the next tenure judges them
    except BaseException:
        if name:
            chunks.given_up(name)
        raise
    if name:
        chunks.adopted(finding.key, name)
    else:
        chunks.replaced(finding.key)


async def _give_up(parts: Inspected, finding: Finding, options: ReindexOptions, report: ReindexReport) -> None:
    """The right value cannot be had. With ``force`` the foreign one is put aside and the entry deleted, for secondaries
    too; a secondary gets a replicated one back from its primary."""
    if not options.force or finding.kind is Kind.EXTRA:
        report.unresolved += 1
        return
    item = await parts.physical.get(finding.where, consistent=True)
    if item is not None:
        try:
            await _put_aside(parts, finding.key, item)
            report.quarantined += 1
        except (Conflict, OutcomeUnknown, TooLarge):
            report.unresolved += 1
            return
    if parts.pending(finding.key):
        return  # a write under way replaces what was found, and must not be deleted by this
    # No await from here to the queue: no newer value can come between.
    if parts.forest.digest_of(finding.key) == finding.digest:
        await parts.commit([Write(finding.key, None)])
        report.dropped += 1


def _repair_pages(
    parts: Inspected, checked: CheckReport, pages: _Pages, options: ReindexOptions, report: ReindexReport
) -> None:
    for cls, partition, page in sorted(checked.damaged):
        if (cls, partition, page) not in parts.lazy.damaged:
            continue
        entries = pages.entries.get((cls, partition, page), [])
        if options.force or parts.lazy.proves((cls, partition), page, entries):
            parts.lazy.repair((cls, partition), page, entries, parts.head().index)
            report.pages += 1
        else:
            report.unresolved += 1
