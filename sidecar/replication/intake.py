"""What a secondary makes of the records it receives: checked, in order, merged into commits. Pure.

Past :meth:`Intake.accept` this holds:

1. A record's index is the last one plus one, its previous hash is the last one's hash, its bytes are what its header
   says, and its tenure is not older than the last one seen.
2. It brings every entry of the classes that travel in this mode, and of the partitions selected, and none of another;
   every key is well formed.
3. A batch holds whole records in order, and the position of its last record. A record that changes a
   keyring ends its batch: entries encrypted under a new key come after the key is loaded.
4. The commit record of a large batch brings every entry of its parts; parts alone bring nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from consul_backend.keys import split_key
from consul_backend.limits import Limits, base64_bytes
from consul_backend.position import Position
from consul_backend.wal import CorruptRecord, Record, Write
from sidecar.replication.hello import Source
from sidecar.replication.modes import Mode
from sidecar.replication.parts import Parts
from sidecar.replication.protocol import LogFrame, PartFrame, ProtocolViolation, RecordFrame, Skip
from sidecar.replication.selection import EVERYTHING, Partitions

_GUARD_OPS = 3
"""Fence, chain check and the record itself."""

_RESERVE_BYTES = 8 * 1024
"""Fence, chain check, the record's header with its positions, and JSON around them."""

_WRITE_OVERHEAD_BYTES = 320
"""JSON of one operation, the store's own part of a key, and a group's head in the record's header."""

_MERGED_RECORDS_MAX = 256


@dataclass(frozen=True, slots=True)
class Budget:
    """What one commit of this store may hold, as an upper estimate; the store itself has the last word."""

    writes_max: int
    bytes_max: int
    prefix_bytes: int

    @classmethod
    def of(cls, limits: Limits) -> Budget:
        """The budget that the limits of a physical store leave to data."""
        return cls(limits.ops_max - _GUARD_OPS, limits.body_bytes_max - _RESERVE_BYTES, limits.prefix_bytes)

    def cost_bytes(self, write: Write) -> int:
        """Request bytes of one write at most: a value travels twice, in its key and in the record."""
        key_bytes = len(write.key.encode(errors="replace"))
        value_bytes = len(write.value) if write.value is not None else 0
        return (
            _WRITE_OVERHEAD_BYTES
            + self.prefix_bytes
            + 3 * key_bytes  # an encoded byte takes up to three
            + base64_bytes(value_bytes)
            + base64_bytes(value_bytes + key_bytes)
        )


@dataclass(frozen=True, slots=True)
class Step:
    """One record or skip: its writes, and where it leaves the secondary. ``source_positions`` are those that the
    record itself holds: where the primary stood in other modes; None for a skip, which does not say."""

    writes: tuple[Write, ...]
    position: Position
    ends_batch: bool = False
    source_positions: Mapping[str, Position] | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """Several steps as one commit; of several writes to one key only the last is left."""

    writes: tuple[Write, ...]
    position: Position
    steps: tuple[Step, ...]

    @property
    def source_positions(self) -> Mapping[str, Position] | None:
        """Where the primary stood in other modes when it wrote the newest record that says so."""
        said = [step.source_positions for step in self.steps if step.source_positions is not None]
        return said[-1] if said else None


class Intake:
    """Records in, batches out. Holds what was accepted and not yet taken; the caller bounds that by not feeding."""

    def __init__(self, mode: Mode, position: Position, budget: Budget, selection: Partitions = EVERYTHING) -> None:
        self._mode = mode
        self._keyrings = mode.keyrings
        self._selection = selection
        self._last = position
        self._tenure = 0
        self._budget = budget
        self._steps: deque[Step] = deque()
        self._pending_bytes = 0
        self._parts = Parts(mode.classes, selection)

    @classmethod
    def at(cls, mode: Mode, source: Source, index: int, chain_hash: bytes, budget: Budget) -> Intake:
        """An intake that goes on after record ``index`` of ``source``."""
        return cls(mode, Position(source.set_id, source.generation, source.epoch, index, chain_hash), budget)

    @property
    def last(self) -> Position:
        """Where accepting everything so far leads."""
        return self._last

    @property
    def pending_bytes(self) -> int:
        """Estimated request bytes of what is accepted and not yet taken."""
        return self._pending_bytes

    def wants_more(self) -> bool:
        """Whether another record could still join the next batch."""
        if not self._steps:
            return True
        if self._steps[-1].ends_batch or len(self._steps) >= _MERGED_RECORDS_MAX:
            return False
        return self._pending_bytes < self._budget.bytes_max // 2

    def accept(self, frame: LogFrame) -> None:
        """Check one frame against the last. Raises ProtocolViolation, and then holds what it held."""
        if isinstance(frame, PartFrame):
            self._parts.accept(frame)
            return
        step = self._skip(frame) if isinstance(frame, Skip) else self._record(frame)
        self._steps.append(step)
        self._pending_bytes += self._cost(step.writes)
        self._last = step.position

    def _skip(self, frame: Skip) -> Step:
        if frame.first != self._last.index + 1 or frame.last < frame.first:
            raise ProtocolViolation(f"skip of {frame.first} to {frame.last} after record {self._last.index}")
        if frame.prev_hash != self._last.chain_hash:
            raise ProtocolViolation(f"skip of {frame.first} to {frame.last}: the hash chain is broken")
        return Step((), self._moved_to(frame.last, frame.chain_hash))

    def _record(self, frame: RecordFrame) -> Step:
        try:
            record = Record.decode(frame.raw, expect_prev=self._last.chain_hash)
        except (CorruptRecord, UnicodeDecodeError) as error:
            reason = error if isinstance(error, CorruptRecord) else "text that is not UTF-8"
            raise ProtocolViolation(f"after record {self._last.index}: {reason}") from None
        header = record.header
        if header.index != self._last.index + 1:
            raise ProtocolViolation(f"record {header.index} after record {self._last.index}")
        if header.epoch < self._tenure:
            raise ProtocolViolation(f"record {header.index} is of tenure {header.epoch}, before {self._tenure}")
        for head, body in zip(header.groups, record.bodies, strict=True):
            travels = head.cls in self._mode.classes and self._selection.takes(head.cls, head.partition)
            if travels != (body is not None):
                what = f"{'lacks' if body is None else 'brings'} entries of {head.cls}/{head.partition}"
                raise ProtocolViolation(f"record {header.index} {what}")
        if header.kind == "part":
            raise ProtocolViolation(f"record {header.index} is a part and came by itself")
        found = self._parts.take(record) if header.kind == "commit" else record.writes()
        writes = checked_writes(found, self._mode.classes, self._selection)
        self._tenure = header.epoch
        keyring = any(write.key in self._keyrings for write in writes)
        return Step(writes, self._moved_to(header.index, record.chain_hash), keyring, header.positions)

    def _moved_to(self, index: int, chain_hash: bytes) -> Position:
        last = self._last
        return Position(last.set_id, last.generation, last.epoch, index, chain_hash)

    def take(self, *, steps_max: int | None = None) -> Batch | None:
        """The longest prefix of what was accepted that is one commit; at least one record, None when there is none."""
        if not self._steps:
            return None
        merged: dict[str, Write] = {}
        size_bytes = 0
        taken: list[Step] = []
        while self._steps and len(taken) < (steps_max or _MERGED_RECORDS_MAX):
            step = self._steps[0]
            new_keys = sum([write.key not in merged for write in step.writes])
            cost = self._cost(step.writes)
            too_many = len(merged) + new_keys > self._budget.writes_max or size_bytes + cost > self._budget.bytes_max
            if taken and too_many:
                break
            self._steps.popleft()
            taken.append(step)
            size_bytes += cost
            for write in step.writes:
                merged.pop(write.key, None)  # the last write also decides the order
                merged[write.key] = write
            if step.ends_batch:
                break
        self._pending_bytes -= sum([self._cost(step.writes) for step in taken])
        return Batch(tuple(merged.values()), taken[-1].position, tuple(taken))

    def give_back(self, batch: Batch) -> None:
        """Undo the last :meth:`take`: the store found the batch too large, and it is to be taken in smaller ones."""
        self._steps.extendleft(reversed(batch.steps))
        self._pending_bytes += sum([self._cost(step.writes) for step in batch.steps])

    def _cost(self, writes: Iterable[Write]) -> int:
        return sum([self._budget.cost_bytes(write) for write in writes])


def checked_writes(
    writes: Sequence[Write], classes: Collection[str], selection: Partitions = EVERYTHING
) -> tuple[Write, ...]:
    """The same writes, if every key is a well-formed key of what travels; else ProtocolViolation."""
    for write in writes:
        try:
            write.key.encode()
            cls, partition, _ = split_key(write.key)
        except ValueError:
            raise ProtocolViolation("an entry's key is malformed") from None
        if cls not in classes:
            raise ProtocolViolation(f"an entry of class {cls} where only {', '.join(classes)} may travel")
        if not selection.takes(cls, partition):
            raise ProtocolViolation(f"an entry of {cls}/{partition}, which is not sent to this secondary")
    return tuple(writes)


def split_writes(writes: Sequence[Write], budget: Budget) -> Iterator[list[Write]]:
    """Writes with distinct keys, in order, cut into pieces that each fit one commit. None is empty."""
    piece: list[Write] = []
    size_bytes = 0
    for write in writes:
        cost = budget.cost_bytes(write)
        if piece and (len(piece) >= budget.writes_max or size_bytes + cost > budget.bytes_max):
            yield piece
            piece, size_bytes = [], 0
        piece.append(write)
        size_bytes += cost
    if piece:
        yield piece
