"""What a cluster held that its new primary never had: kept before it is overwritten, for an operator to look at.

A record of lost writes is a *head* (where the histories parted, how much is behind it) and *pages* (the entries, each
with the ciphertext it was stored as). Everything is class ``c``: it never leaves the cluster. Pages are written first;
the head is committed together with the role that makes the loss final, so a head without its pages cannot be, and
after a crash in between the same pages are written again. The record names ranges of this cluster's own log; when that
no longer reaches the point where the histories part, it says *at least*.
"""

from __future__ import annotations

import base64
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from consul_backend.large_batch import Assembly
from consul_backend.position import Position
from consul_backend.wal import CorruptRecord, Record, Write
from consul_backend.wal_reader import RecordGone
from plugin_api.errors import InvalidRequest, NotFound
from sidecar.replication.history import Epoch, Parting
from sidecar.replication.modes import DR, PERFORMANCE, Mode
from sidecar.replication.parts import concerns
from sidecar.replication.protocol import is_none
from sidecar.replication.store_view import PrimaryStore
from sidecar.replication.wiring import SealedEntries

logger = logging.getLogger(__name__)

_RECORDS_AT_ONCE = 64
PAGE_BYTES = 256 * 1024
KEPT_BYTES_MAX = 256 * 1024 * 1024
"""Of values kept in one record; what is beyond is counted, its keys are listed, its values are not kept."""
KEYS_MAX = 1_000_000


class LostEntry(msgspec.Struct, frozen=True, array_like=True):
    """One write of the own log's record ``index``. ``value`` None with ``kept``: a deletion."""

    key: str
    index: int
    time_ms: int
    value: bytes | None
    kept: bool = True

    def __repr__(self) -> str:
        return f"LostEntry({self.index})"


class LostHead(msgspec.Struct, frozen=True):
    """One record. ``first`` to ``last`` are the records of this cluster's own log that have lost entries, 0 for none;
    ``records`` and ``entries`` count them. ``at_least``: the log began later than the histories parted. ``certain``
    False: no common epoch was known, or a merkle sync went past the point where the histories part, and everything that
    the log held, or the sync brought, was kept. Times in unix milliseconds."""

    id: str
    mode: str
    set_id: str
    epoch: int
    new_epoch: int
    created_ms: int
    first: int
    last: int
    records: int
    entries: int
    at_least: bool
    certain: bool
    first_ms: int
    last_ms: int
    kept_bytes: int
    complete: bool
    pages: int


@dataclass(slots=True)
class _Gathered:
    """What a walk through the log found so far."""

    first: int = 0
    last: int = 0
    records: int = 0
    entries: int = 0
    first_ms: int = 0
    last_ms: int = 0
    kept_bytes: int = 0
    complete: bool = True
    pages: int = 0
    waiting: list[LostEntry] = field(default_factory=list)
    waiting_bytes: int = 0


@dataclass(frozen=True, slots=True)
class _Reach:
    """The own record from which to look, whether that is early enough, and whether all behind it is lost for sure."""

    start: int
    whole: bool = True
    certain: bool = True


def log_loss(head: LostHead) -> None:
    """For the operator who reads logs first."""
    logger.error(
        "replication: %s%d entries in %d records (%d to %d of this cluster's log) exist here and not on the new "
        "primary; they are kept as %s lost-writes %s and will be replaced",
        "at least " if head.at_least else "",
        head.entries,
        head.records,
        head.first,
        head.last,
        head.mode,
        head.id,
    )


class LostWrites:
    """The records of one mode."""

    def __init__(self, mode: Mode, store: PrimaryStore, sealed: SealedEntries) -> None:
        self._mode = mode
        self._store = store
        self._sealed = sealed
        self._root = f"c/replication/lost/{mode.name}/"

    async def gather(
        self, parting: Parting, *, set_id: str, epoch: int, new_epoch: Epoch, now_ms: int
    ) -> LostHead | None:
        """Write the pages of what lies behind ``parting``; None when nothing does. The caller commits :meth:`head`.
        Nothing else may write what travels meanwhile. Raises BackendError."""
        if not parting.parts:
            return None
        name = f"{epoch}-{new_epoch.number}-{new_epoch.id[:8]}"
        found = _Gathered()
        reach = await self._start(parting)
        async for record in self._records(reach.start, self._store.head.index):
            if concerns(record, self._mode.classes):
                await self._add(found, record, f"{self._root}{name}/")
        await self._flush(found, f"{self._root}{name}/")
        if not found.records and reach.whole and parting.known:
            return None
        return LostHead(
            id=name,
            mode=self._mode.name,
            set_id=set_id,
            epoch=epoch,
            new_epoch=new_epoch.number,
            created_ms=now_ms,
            first=found.first,
            last=found.last,
            records=found.records,
            entries=found.entries,
            at_least=not reach.whole,
            certain=reach.certain,
            first_ms=found.first_ms,
            last_ms=found.last_ms,
            kept_bytes=found.kept_bytes,
            complete=found.complete,
            pages=found.pages,
        )

    def head(self, head: LostHead) -> Write:
        """The write that makes a gathered record exist, not encrypted yet."""
        return Write(f"{self._root}{head.id}/head", msgspec.msgpack.encode(head))

    async def heads(self) -> list[LostHead]:
        """Every record, the oldest first."""
        found = []
        for folder in await self._sealed.list(self._root):
            raw = await self._sealed.get(f"{self._root}{folder}head")
            if raw is not None:
                found.append(msgspec.msgpack.decode(raw, type=LostHead))
        return sorted(found, key=lambda head: head.created_ms)

    async def page(self, head: LostHead, number: int) -> list[LostEntry]:
        """One page of a record, from 1 on. Raises NotFound."""
        raw = await self._sealed.get(f"{self._root}{head.id}/page-{number:06d}")
        if raw is None:
            raise NotFound
        return msgspec.msgpack.decode(raw, type=list[LostEntry])

    async def find(self, name: str) -> LostHead:
        """The record of that id. Raises NotFound."""
        for head in await self.heads():
            if head.id == name:
                return head
        raise NotFound

    async def delete(self, name: str) -> None:
        """Forget a record, the head first: what is left of its pages is no record any more. Raises NotFound."""
        head = await self.find(name)
        await self._sealed.delete(f"{self._root}{head.id}/head")
        for number in range(1, head.pages + 1):
            await self._sealed.delete(f"{self._root}{head.id}/page-{number:06d}")

    async def _start(self, parting: Parting) -> _Reach:
        """The log is walked backwards until a record whose position is common, or by number where the own log tells. A
        record of a sync that was under way has no position: it belongs to the one at which that sync ended."""
        oldest, head = self._store.oldest_index, self._store.head.index
        if not parting.known:
            return _Reach(oldest, whole=False, certain=False)
        if parting.own_max is not None and not parting.bounds:
            first = parting.own_max + 1
            return _Reach(max(first, oldest), whole=first >= oldest)
        at, certain = head, True
        ended: Position | None = None
        while at >= oldest:
            low = max(oldest, at - _RECORDS_AT_ONCE + 1)
            for record in reversed(await self._range(low, at)):
                position = self._position(record)
                if position is not None and is_none(position):
                    held = ended is not None and parting.holds(record.index, ended)
                    certain = certain and held
                else:
                    ended = position
                    held = parting.holds(record.index, position)
                if held:
                    return _Reach(record.index + 1, certain=certain)
            at = low - 1
        return _Reach(oldest, whole=oldest <= 1, certain=certain)

    def _position(self, record: Record) -> Position | None:
        """Where a record left this cluster. What came while it mirrored a DR primary stands in that one's log."""
        positions = record.header.positions
        found = positions.get(self._mode.name)
        return positions.get(DR.name) if found is None and self._mode is PERFORMANCE else found

    async def _range(self, low: int, high: int) -> list[Record]:
        """Records ``low`` to ``high`` that the log still has; what was collected meanwhile is missing."""
        return [record async for record in self._records(low, high)]

    async def _records(self, start: int, stop: int) -> AsyncIterator[Record]:
        at = start
        while at <= stop:
            try:
                records = await self._store.records(at, min(_RECORDS_AT_ONCE, stop - at + 1))
            except RecordGone:
                at = max(at + 1, self._store.oldest_index)
                continue
            if not records:
                return
            for record in records:
                yield record
            at = records[-1].index + 1

    async def _add(self, found: _Gathered, record: Record, folder: str) -> None:
        found.first = found.first or record.index
        found.last = record.index
        found.records += 1
        found.first_ms = found.first_ms or record.header.time_ms
        found.last_ms = record.header.time_ms
        for write in await self._writes(found, record):
            if write.key.split("/", 1)[0] not in self._mode.classes:
                continue
            found.entries += 1
            size = len(write.value or b"")
            kept = found.kept_bytes + size <= KEPT_BYTES_MAX and found.entries <= KEYS_MAX
            found.complete = found.complete and kept
            if found.entries > KEYS_MAX:
                continue
            value = write.value if kept else None
            found.kept_bytes += size if kept else 0
            found.waiting.append(LostEntry(write.key, record.index, record.header.time_ms, value, kept))
            found.waiting_bytes += len(write.key) + (size if kept else 0) + 32
            if found.waiting_bytes >= PAGE_BYTES:
                await self._flush(found, folder)

    async def _writes(self, found: _Gathered, record: Record) -> Sequence[Write]:
        large = record.header.large
        if large is None or record.header.kind != "commit":
            return record.writes()
        assembly = Assembly()
        try:
            for part in large.parts:
                for one in await self._store.records(part.index, 1):
                    assembly.add(one)
        except (RecordGone, CorruptRecord):
            found.complete = False
            return []
        return assembly.writes()

    async def _flush(self, found: _Gathered, folder: str) -> None:
        if not found.waiting:
            return
        found.pages += 1
        await self._sealed.put(f"{folder}page-{found.pages:06d}", msgspec.msgpack.encode(found.waiting))
        found.waiting, found.waiting_bytes = [], 0


def summary(head: LostHead) -> dict[str, Any]:
    """A head as the API shows it: counts and ranges, no key and no value."""
    return {
        "id": head.id,
        "mode": head.mode,
        "replication_epoch": head.epoch,
        "new_replication_epoch": head.new_epoch,
        "created_ms": head.created_ms,
        "first_wal": head.first,
        "last_wal": head.last,
        "records": head.records,
        "entries": head.entries,
        "exact": not head.at_least and head.certain,
        "first_written_ms": head.first_ms,
        "last_written_ms": head.last_ms,
        "values_kept_bytes": head.kept_bytes,
        "complete": head.complete,
        "pages": head.pages,
    }


async def shown_entries(
    entries: Collection[LostEntry], open_entry: Callable[[str, bytes], Awaitable[bytes | None]] | None
) -> list[dict[str, Any]]:
    """Entries as the API shows them: without ``open_entry`` keys only, with it the plaintext in base64 too, or
    that it is withheld."""
    shown = []
    for entry in entries:
        row: dict[str, Any] = {
            "key": entry.key,
            "wal": entry.index,
            "written_ms": entry.time_ms,
            "deleted": entry.kept and entry.value is None,
        }
        if open_entry is not None and entry.kept and entry.value is not None:
            plain = await open_entry(entry.key, entry.value)
            row |= {"value_withheld": True} if plain is None else {"value": base64.b64encode(plain).decode()}
        elif open_entry is not None and not entry.kept:
            row["value_not_kept"] = True
        shown.append(row)
    return shown


def page_number(text: str | int, head: LostHead) -> int:
    """Which page a request asks for, the first by default. Raises InvalidRequest."""
    try:
        number = int(text or 1)
    except ValueError:
        number = 0
    if not 1 <= number <= max(head.pages, 1):
        raise InvalidRequest(f'"page" is a number from 1 to {max(head.pages, 1)}')
    return number
