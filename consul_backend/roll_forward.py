"""Large batches at work: writes parts, the commit record and the data keys, one batch after the other.

Between the commit record and the last data key the batch lives in the *overlay*: values that are true and not, or not
surely, in their data keys. It has three users: reads (which look there before they look at the store), commits (an
ordinary write to a key takes it out of the overlay, in the log's order, so an older value never follows a newer one)
and the roll-forward (which writes what is left, in transactions of the same single queue).

==========================  ==========================================================================================
fails before the commit     an abort record, then the caller gets the error; nothing was visible
record
a part is refused for size  the limits were learnt meanwhile: the same piece again, smaller
fails after it              the caller has its answer already; the roll-forward goes on until it is through, here or in
                            the next tenure, which finishes it before it serves
tenure ends                 the next tenure aborts or rolls, by the log (:class:`~consul_backend.large_batch.Replay`)
==========================  ==========================================================================================
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import NoReturn

from consul_backend.batching import MANIFEST_MAGIC, OVERHEAD_OPS, Prepared, Preparer
from consul_backend.chunks import Chunks
from consul_backend.commits import MakeSpecial, Special
from consul_backend.errors import (
    BackendError,
    NotApplied,
    OutcomeUnknown,
    PermissionDenied,
    TooLarge,
    Unavailable,
)
from consul_backend.failpoint import failpoint
from consul_backend.group_commit import GroupCommit
from consul_backend.large_batch import (
    COMMIT_BYTES_PER_PART,
    PART_BYTES_MAX,
    START,
    Cursor,
    Replay,
    Unrolled,
    in_order,
    next_part,
    part_ref,
)
from consul_backend.large_queue import Job, LargeQueue
from consul_backend.limits import Limits, op_bytes
from consul_backend.merkle_stage import StagedChange
from consul_backend.physical import PhysicalStore
from consul_backend.position import Position
from consul_backend.txn import Op, Set
from consul_backend.wal import BATCH_ID_BYTES, Head, Large, PartRef, Record, Write

log = logging.getLogger("core.large")

ROLL_BODY_BYTES_MAX = 256 * 1024
"""Data of one roll-forward transaction, so that a small write behind it does not wait long."""

_RESERVE_BYTES = 4 * 1024  # a special record's header and positions, beyond the fixed part
_PART_BYTES_MIN = 2 * 1024
_RETRY_PAUSE_S = 0.25
_ENDED = "this node is no longer active: nothing was written"
_ENDED_UNKNOWN = "this node is no longer active: the write may have been applied"
_PREPARED_BETWEEN_TURNS = 500
_STAGED_BETWEEN_TURNS = 250
_PAGES_BETWEEN_TURNS = 8


@dataclass(slots=True)
class LargeCounts:
    """Since the tenure began."""

    batches: int = 0
    parts: int = 0
    rolls: int = 0
    aborted: int = 0
    refused_sizes: int = 0


@dataclass(slots=True)
class _Open:
    """The batch whose parts are being written, or whose keys are being rolled."""

    id: bytes
    parts: list[PartRef] = field(default_factory=list)
    entries: dict[str, Prepared] = field(default_factory=dict)
    staged: StagedChange | None = None
    committed: bool = False


class LargeBatches:
    """One tenure's. The store calls :meth:`recorded` for each special record when it is true, before anyone is told.

    ``stage`` begins what a batch will do to the index; ``rolled`` hears each key whose value, or its absence, is in its
    data key from now on, and no longer in the overlay."""

    def __init__(
        self,
        physical: PhysicalStore,
        generation: str,
        group_commit: GroupCommit,
        chunks: Chunks,
        *,
        stage: Callable[[], StagedChange],
        rolled: Callable[[str], None],
        queue_max: int,
        queue_bytes_max: int,
        random_bytes: Callable[[int], bytes],
    ) -> None:
        self._stage = stage
        self._on_rolled = rolled
        self._physical = physical
        self._generation = generation
        self._group_commit = group_commit
        self._chunks = chunks
        self._random_bytes = random_bytes
        self._send: Callable[[MakeSpecial], Awaitable[Head]] = group_commit.special
        self._queue = LargeQueue(queue_max, queue_bytes_max)
        self._idle = asyncio.Event()
        self._open: _Open | None = None
        self._rolling: dict[str, Prepared] = {}
        self._manifests: dict[str, tuple[str, Set]] = {}
        self._part_bytes_max = PART_BYTES_MAX
        self._roll_bytes_max = ROLL_BODY_BYTES_MAX
        self._chunked_for: tuple[bytes, Limits] | None = None
        self._unaborted = b""
        self.overlay: dict[str, Prepared] = {}
        self.version = 0
        """Grows whenever a batch becomes true."""
        self.spans: list[tuple[int, int, bool]] = []
        """First part, commit record, and whether the data keys are complete; of batches that recovery may need."""
        self.counts = LargeCounts()

    # -- callers

    async def commit(self, writes: Sequence[Write], positions: Mapping[str, Position] | None) -> Head:
        """Commit ``writes`` atomically in parts. Raises as :meth:`GroupCommit.commit`. Cancelling, or the caller's
        deadline, withdraws a batch that is queued and voids one whose commit record has not been sent."""
        self._queue.require_room(0)
        return await self._queue.commit(Job.of(await self._prepared(writes), positions))

    async def _prepared(self, writes: Iterable[Write]) -> dict[str, Prepared]:
        preparer = Preparer(self._generation, self._physical.limits)
        prepared: dict[str, Prepared] = {}
        for number, write in enumerate(writes, 1):
            prepared[write.key] = preparer.prepare(write, any_size=True)
            if number % _PREPARED_BETWEEN_TURNS == 0:
                await asyncio.sleep(0)
        return prepared

    async def finished(self) -> None:
        """Wait until nothing is queued, open or left to roll forward."""
        while self._open is not None or self._queue:
            await self._idle.wait()

    # -- what the store asks and tells

    def recorded(self, record: Record) -> StagedChange | None:
        """A special record is true now; returns what it does to the index (only a commit does anything)."""
        header = record.header
        opened = self._open
        if opened is None or header.large is None or header.large.id != opened.id:
            return None
        if header.kind == "part":
            opened.parts.append(part_ref(record))
        elif header.kind == "commit":
            opened.committed = True
            self.overlay = dict(opened.entries)
            self.version += 1
            self.spans.append((opened.parts[0].index, record.index, False))
            staged, opened.staged = opened.staged, None
            return staged
        elif header.kind == "roll":
            self._rolled(header.large.done)
        return None

    def _rolled(self, done: bool) -> None:
        for key in self._rolling:
            self.overlay.pop(key, None)
            self._on_rolled(key)
            manifest = self._manifests.pop(key, None)
            if manifest is not None:
                self._chunks.adopted(key, manifest[0])
            else:
                self._chunks.replaced(key)
        self._rolling = {}
        if done:
            self._open = None
            self.spans = [(first, commit, True) for first, commit, _ in self.spans]

    def replaced(self, entries: Mapping[str, Prepared]) -> None:
        """An ordinary commit has written these: what it replaced needs no roll-forward any more."""
        if self._open is not None and self._open.staged is not None:
            self._open.staged.follow(entries.values())
        if not self.overlay:
            return
        for key in entries:
            if self.overlay.pop(key, None) is not None:
                manifest = self._manifests.pop(key, None)
                if manifest is not None:
                    self._chunks.given_up(manifest[0])

    def pending(self, key: str) -> bool:
        """Whether a large batch that is not true yet writes the key."""
        opened = self._open
        return self._queue.writes(key) or (opened is not None and not opened.committed and key in opened.entries)

    def changes(self, prefix: str) -> dict[str, bool]:
        """The keys below ``prefix`` in the overlay, and whether they exist."""
        return {key: entry.value is not None for key, entry in self.overlay.items() if key.startswith(prefix)}

    def statistics(self) -> dict[str, int]:
        """Counters and gauges, by the names of their metrics."""
        counts = {f"large_{name}": count for name, count in asdict(self.counts).items()}
        return counts | self._queue.statistics() | {"large_overlay_entries": len(self.overlay)}

    def firsts(self, dirty_from: int) -> tuple[int, ...]:
        """First parts of the batches that a recovery from record ``dirty_from`` on would need."""
        found = [first for first, commit, done in self.spans if not done or commit >= dirty_from]
        if self._open is not None and self._open.parts:
            found.append(self._open.parts[0].index)
        return tuple(found)

    def forget_before(self, redo_from: int) -> None:
        """The durable checkpoint's redo point: batches before it are nobody's business any more."""
        self.spans = [span for span in self.spans if not span[2] or span[1] >= redo_from]

    # -- at work

    async def run(self) -> NoReturn:
        """Work off what arrives until cancelled."""
        try:
            while True:
                if self._open is not None:
                    await self._finish()
                if not self._queue:
                    self._idle.set()
                    self._idle = asyncio.Event()
                    self._queue.arrived.clear()
                    await self._queue.arrived.wait()
                    continue
                await self._work(self._queue.pop())
        finally:
            self._queue.close()

    async def recover(self, replay: Replay) -> None:
        """Finish what earlier tenures left, before this one serves: roll or abort. ``replay`` has the whole log that
        matters. Raises as :meth:`GroupCommit.special_now`."""
        self._send = self._group_commit.special_now
        self.spans = [(first, commit, True) for first, commit in replay.spans]
        for batch_id, assembly in replay.open.items():
            self._open = _Open(batch_id, list(assembly.parts))
            await self._abort(batch_id)
        if replay.unrolled is not None:
            await self._adopt(replay.unrolled)
            failpoint("large:recovered")
            await self._roll_smaller()
        self._send = self._group_commit.special

    async def _adopt(self, unrolled: Unrolled) -> None:
        entries = await self._prepared(unrolled.entries.values())
        self._open = _Open(unrolled.id, [], entries, committed=True)
        self.overlay = dict(entries)
        self.spans = [(first, commit, commit != unrolled.commit) for first, commit, _ in self.spans]

    async def _work(self, job: Job) -> None:
        """One batch up to its commit record; the rest is :meth:`_finish`'s."""
        if job.future.done():
            return
        opened = _Open(self._random_bytes(BATCH_ID_BYTES), [], job.writes)
        self._open = opened
        try:
            await self._write_parts(in_order(job.writes.values()), opened, job)
            await self._stage_changes(opened)
            failpoint("large:before-commit")
            head = await self._send(partial(_commit_record, job, opened))
        except BackendError as error:
            if isinstance(error, OutcomeUnknown) and not job.sent:
                error = NotApplied(str(error))  # a part changes nothing, written or not
            job.fail(error)
            if not isinstance(error, OutcomeUnknown):
                self._given_up(opened)
            return
        except BaseException:
            job.fail(OutcomeUnknown(_ENDED_UNKNOWN) if job.sent else NotApplied(_ENDED))
            raise
        self.counts.batches += 1
        if not job.future.done():
            job.future.set_result(head)
        failpoint("large:after-commit")

    async def _stage_changes(self, opened: _Open) -> None:
        staged = opened.staged = self._stage()
        for number, entry in enumerate(opened.entries.values(), 1):
            staged.add(entry)
            if number % _STAGED_BETWEEN_TURNS == 0:
                await asyncio.sleep(0)
        for number, _ in enumerate(staged.digest()):
            if number % _PAGES_BETWEEN_TURNS == 0:
                await asyncio.sleep(0)

    def _given_up(self, opened: _Open) -> None:
        opened.staged = None
        if opened.parts:
            self._unaborted = opened.id
        else:
            self._open = None

    async def _write_parts(self, entries: Sequence[Prepared], opened: _Open, job: Job) -> None:
        cursor = START
        tries_left = 8
        while cursor.entry < len(entries):
            job.require_wanted()
            size = self._part_bytes()
            if COMMIT_BYTES_PER_PART * (len(opened.parts) + 1) > self._record_bytes():
                raise TooLarge(f"a batch of more than {len(opened.parts)} parts, its commit record would not fit")
            plan = next_part(entries, cursor, size)
            after: Cursor = plan.after
            special = Special("part", Large(opened.id, plan.continued), plan.groups)
            try:
                await self._send(lambda special=special: special)  # type: ignore[misc]  # binds this round's part
            except TooLarge:
                self.counts.refused_sizes += 1
                tries_left -= 1
                if not tries_left:
                    raise
                self._part_bytes_max = max(_PART_BYTES_MIN, min(size, self._part_bytes_max) // 2)
                continue
            failpoint("large:after-part")
            self.counts.parts += 1
            cursor = after

    def _record_bytes(self) -> int:
        """What a special record may hold, its header not counted."""
        budget = self._group_commit.budget
        room = min(budget.record_bytes_max, (budget.body_bytes_max - budget.fixed_body_bytes) // 4 * 3 - 3)
        return room - budget.fixed_record_bytes - _RESERVE_BYTES

    def _part_bytes(self) -> int:
        return min(self._part_bytes_max, self._record_bytes())

    async def _finish(self) -> None:
        """End the batch that is open: by its roll-forward if it is true, else by an abort record. Goes on through
        everything that passes."""
        while (opened := self._open) is not None:
            try:
                if opened.committed:
                    await self._roll()
                elif opened.id == self._unaborted:
                    await self._abort(opened.id)
                else:
                    break  # its commit record's fate is unknown: this tenure is ending
            except (NotApplied, Unavailable, PermissionDenied, TooLarge) as error:
                if self._group_commit.closed:
                    break
                log.warning("a large batch is not finished yet, trying again: %s", error)
                await asyncio.sleep(_RETRY_PAUSE_S)
        else:
            return
        await asyncio.get_running_loop().create_future()  # whoever ended the tenure cancels this task

    async def _abort(self, batch_id: bytes) -> None:
        failpoint("large:before-abort")
        await self._send(lambda: Special("abort", Large(batch_id)))
        failpoint("large:after-abort")
        self._open = None
        self.counts.aborted += 1

    # -- roll-forward

    async def _roll(self) -> None:
        """Write the data keys of what the overlay holds; ends with a record that says so."""
        while self._open is not None:
            await self._write_chunks(self._open.id)
            failpoint("large:before-roll")
            try:
                await self._send(self._next_roll)
            except TooLarge:
                # The limits were learnt; without news, half as much.
                self.counts.refused_sizes += 1
                self._roll_bytes_max = max(_PART_BYTES_MIN, self._roll_bytes_max // 2)
                raise
            failpoint("large:after-roll")
            self.counts.rolls += 1

    async def _roll_smaller(self) -> None:
        """Before the tenure runs: a size that is refused is halved, at most to the smallest."""
        while True:
            try:
                return await self._roll()
            except TooLarge:
                if self._roll_bytes_max == _PART_BYTES_MIN:
                    raise

    async def _write_chunks(self, batch_id: bytes) -> None:
        """Before a transaction names them: the chunks of entries that will not fit one."""
        limits = self._physical.limits
        if self._chunked_for == (batch_id, limits):
            return
        entries = list(self.overlay.items())
        for number, (key, entry) in enumerate(entries, 1):
            if number % _PREPARED_BETWEEN_TURNS == 0:
                await asyncio.sleep(0)
            if key in self._manifests or not self._needs_chunks(entry, limits) or self.overlay.get(key) is not entry:
                continue
            value = entry.value or b""
            name = f"{batch_id.hex()}-{self._random_bytes(4).hex()}-{number}"
            digest = entry.digest or b""
            manifest = await self._chunks.write(name, key, entry.op.key, value, digest, limits)
            if self.overlay.get(key) is entry:
                self._manifests[key] = (name, Set(entry.op.key, manifest))
            else:
                self._chunks.given_up(name)
        self._chunked_for = (batch_id, limits)

    def _needs_chunks(self, entry: Prepared, limits: Limits) -> bool:
        value = entry.value
        if value is None:
            return False
        room = self._group_commit.budget.body_bytes_max - self._group_commit.budget.fixed_body_bytes - _RESERVE_BYTES
        return entry.op_bytes > room or len(value) > limits.value_bytes_max or value.startswith(MANIFEST_MAGIC)

    def _next_roll(self) -> Special:
        """The transaction whose turn has come: what of the overlay fits, as it is at this moment."""
        if self._open is None:
            raise NotApplied("nothing is left to roll forward")
        budget, limits = self._group_commit.budget, self._physical.limits
        room = min(self._roll_bytes_max, budget.body_bytes_max - budget.fixed_body_bytes - _RESERVE_BYTES)
        rolling: dict[str, Prepared] = {}
        ops: list[Op] = []
        for key, entry in self.overlay.items():
            manifest = self._manifests.get(key)
            if manifest is None and self._needs_chunks(entry, limits):
                continue  # the limits shrank since the chunks were written: the next round writes them
            op: Op = manifest[1] if manifest is not None else entry.op
            size = op_bytes(op, limits.prefix_bytes)
            if ops and (len(ops) >= limits.ops_max - OVERHEAD_OPS or size > room):
                break
            rolling[key] = entry
            ops.append(op)
            room -= size
        self._rolling = rolling
        return Special("roll", Large(self._open.id, done=len(rolling) == len(self.overlay)), ops=ops)


def _commit_record(job: Job, opened: _Open) -> Special:
    """Its turn has come: from here on the batch may become true."""
    job.require_wanted()
    job.sent = True
    return Special("commit", Large(opened.id, parts=tuple(opened.parts)), positions=job.positions)
