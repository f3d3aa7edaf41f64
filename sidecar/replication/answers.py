"""The primary's side of a merkle sync: the answers to its two round trips. See :mod:`sidecar.replication.sync`."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from typing import TypeVar

from consul_backend.errors import BackendError
from consul_backend.wal_reader import RecordGone
from sidecar.replication.diff import Differences, compare, differing_entries, range_of
from sidecar.replication.hello import NO_MATCHING_WALS, Source
from sidecar.replication.modes import Mode
from sidecar.replication.outgoing import frames_of
from sidecar.replication.parts import parts_of
from sidecar.replication.protocol import (
    DIGEST_BYTES,
    Bye,
    DiffReply,
    DiffRequest,
    Entries,
    FetchRequest,
    Frame,
    Guard,
    LogFrame,
    RecordFrame,
    encode,
    with_length,
)
from sidecar.replication.selection import EVERYTHING, Partitions
from sidecar.replication.shipped import Shipped, load_indexes
from sidecar.replication.shipper import SELECTION_CHANGED
from sidecar.replication.store_view import PrimaryStore

log = logging.getLogger("replication.sync")

_ENTRIES_FRAME_BYTES = 256 * 1024
_ENTRIES_FRAME_MAX = 512
"""What the other end checks and stages in one turn of its event loop."""
_READS_AT_ONCE = 64
_RECORDS_AT_ONCE = 16
_STEPS_BETWEEN_TURNS = 4

_T = TypeVar("_T")


class SelectionChanged(Exception):
    """The secondary asks by a selection that holds no longer: it has to say hello again."""

    def __init__(self) -> None:
        super().__init__(SELECTION_CHANGED)


class _Withdrawn(Exception):
    """Some of what is being sent may not be sent any more."""


def everything() -> Partitions:
    """No filter."""
    return EVERYTHING


async def answer_diff(
    store: PrimaryStore,
    source: Source,
    request: DiffRequest,
    *,
    mode: Mode,
    hold_as: str,
    selected: Callable[[], Partitions] = everything,
) -> DiffReply:
    """The answer to the first round trip. From here on the WAL after the base is held for ``hold_as``. Raises
    SelectionChanged."""
    await load_indexes(store, mode)
    if not request.selection.within(selected()):
        raise SelectionChanged
    shipped = Shipped(store.forest, mode.classes, request.selection)
    head, root, positions = store.head, shipped.root(), store.positions  # no await between: all of one instant
    store.hold(hold_as, head.index)
    found = Differences()
    equal = request.root == root
    counts = {} if equal else {name: shipped.count(name) for name in shipped.partitions()}
    if not equal:
        await last_of(compare(shipped, request, found))
    return DiffReply(
        cluster_id=source.cluster_id,
        set_id=source.set_id,
        generation=source.generation,
        epoch=source.epoch,
        epoch_id=source.epoch_id,
        base_index=head.index,
        base_hash=head.chain_hash,
        equal=equal,
        whole=found.whole,
        gone=found.gone,
        cells=found.cells,
        positions=dict(positions),
        counts=counts,
    )


async def answer_fetch(
    store: PrimaryStore, request: FetchRequest, *, mode: Mode, selected: Callable[[], Partitions] = everything
) -> AsyncGenerator[bytes, None]:
    """The streamed body of the second round trip, in chunks of whole frames. When the store fails, or a filter
    withholds some of it meanwhile, the last frame says so; the secondary comes again. The caller has resolved the
    partitions that the request names, in the request's own selection."""

    def framed(frame: Frame) -> bytes:
        if not request.selection.within(selected()):
            raise _Withdrawn
        return with_length(encode(frame))

    try:
        await load_indexes(store, mode)
        async for frame in _fetched_entries(store, request, mode):
            yield framed(frame)
        guard = Guard(request.base_index, request.base_hash, bytes(DIGEST_BYTES), {})
        if request.final:
            shipped = Shipped(store.forest, mode.classes, request.selection)
            head, root, positions = store.head, shipped.root(), store.positions  # of one instant, as above
            guard = Guard(head.index, head.chain_hash, root, dict(positions))
            async for record in _records_since(store, request, head.index, mode):
                yield framed(record)
        last: Frame = guard
    except _Withdrawn:
        last = Bye("closing", SELECTION_CHANGED)
    except RecordGone:
        last = Bye("need-diff", f"{NO_MATCHING_WALS}: the records since {request.base_index} were collected meanwhile")
    except BackendError as error:
        log.warning("a merkle sync was cut short: %s", error)
        last = Bye("closing", str(error)[:512])
    yield with_length(encode(last))


async def _fetched_entries(store: PrimaryStore, request: FetchRequest, mode: Mode) -> AsyncIterator[Entries]:
    """The keyrings first, and again before any frame that may hold entries under a newer one."""
    sent: dict[str, bytes] = {}
    async for frame in _differing_entries(store, request, mode):
        for key in sorted(mode.keyrings):
            digest = store.forest.digest_of(key)
            if digest is not None and digest != sent.get(key) and (value := await store.get(key)) is not None:
                sent[key] = digest
                yield Entries([(key, value)], [], 0)
        yield frame


async def _differing_entries(store: PrimaryStore, request: FetchRequest, mode: Mode) -> AsyncIterator[Entries]:
    puts: list[tuple[str, bytes]] = []
    dropped: list[tuple[int, bytes]] = []
    size_bytes = 0
    shipped = Shipped(store.forest, mode.classes, request.selection)
    for done, extent in enumerate(request.extents):
        part = range_of(request, extent)
        prefix = f"{part.partition}/"
        wanted, extra = differing_entries(shipped, request.salt, part, extent.ids)
        for keys in _reads(store, prefix, wanted):
            await asyncio.sleep(0)  # what is in memory is read without a pause
            for key, value in zip(keys, await store.get_many(keys), strict=True):
                if value is None:  # deleted since the digest was read: its record follows
                    continue
                if puts and (size_bytes + len(value) > _ENTRIES_FRAME_BYTES or len(puts) >= _ENTRIES_FRAME_MAX):
                    yield Entries(puts, dropped, done)
                    puts, dropped, size_bytes = [], [], 0
                puts.append((key, value))
                size_bytes += len(value) + len(key)
        if extra:  # after the puts: the id of an old version must not delete what replaces it
            dropped.append((done, extra))
            size_bytes += len(extra)
        if size_bytes > _ENTRIES_FRAME_BYTES:
            yield Entries(puts, dropped, done + 1)
            puts, dropped, size_bytes = [], [], 0
        await asyncio.sleep(0)
    yield Entries(puts, dropped, len(request.extents))


def _reads(store: PrimaryStore, prefix: str, paths: Sequence[str]) -> Iterator[list[str]]:
    """Keys to read at once: some, of values that each fit a transaction, or one whose value may be of any size."""
    keys: list[str] = []
    for path in paths:
        key = prefix + path
        alone = store.may_be_large(key)
        if keys and (alone or len(keys) == _READS_AT_ONCE):
            yield keys
            keys = []
        keys.append(key)
        if alone:
            yield keys
            keys = []
    if keys:
        yield keys


async def _records_since(store: PrimaryStore, request: FetchRequest, last: int, mode: Mode) -> AsyncIterator[LogFrame]:
    at = request.base_index
    while at < last:
        records = await store.records(at + 1, min(_RECORDS_AT_ONCE, last - at))
        by_index = {record.index: record for record in records}
        for frame, covered in frames_of(records, mode.classes, request.selection):
            if isinstance(frame, RecordFrame):
                async for part in parts_of(store, by_index[covered], mode.classes, request.selection):
                    yield part
            yield frame
            at = covered


async def last_of(steps: Iterator[_T]) -> _T | None:
    """Run a generator to its end, letting other tasks run now and then; its last item."""
    last: _T | None = None
    for count, item in enumerate(steps):
        last = item
        if count % _STEPS_BETWEEN_TURNS == 0:
            await asyncio.sleep(0)
    return last
