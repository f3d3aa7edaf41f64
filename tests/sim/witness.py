"""Watches the store itself, in the order in which it applies transactions, and keeps the whole log.

Judged here, at each transaction and not by what clients saw: P2 (the log is dense, chained, epochs never decrease), P4
(a data key changes exactly as its record says), P11 (whoever writes holds the lock of the current epoch), P13 (what is
collected was needed by nobody), and that no index is ever written twice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

from consul_backend.checkpoint import Checkpoint, decode_checkpoint
from consul_backend.chunks import decode_manifest
from consul_backend.election import decode_epoch
from consul_backend.errors import Corrupt
from consul_backend.memory_table import MemoryTable
from consul_backend.merkle import entry_digest
from consul_backend.physical import EPOCH_KEY, LOCK_KEY
from consul_backend.replicated import physical_key
from consul_backend.testing import Applied
from consul_backend.txn import Cas, Delete, DeleteTree, Set
from consul_backend.wal import CorruptRecord, Record
from tests.sim.fold import BadLog, Fold

GENESIS_NODE = "genesis"


@dataclass(frozen=True, slots=True)
class Violation:
    """What does not hold, and how it showed."""

    checker: str
    text: str

    def __str__(self) -> str:
        return f"{self.checker}: {self.text}"


class Witness:
    """``owner_of`` says which process a session was made by; ``report`` is told of each violation at once."""

    def __init__(
        self,
        generation: str,
        table: MemoryTable,
        owner_of: Callable[[str], str],
        report: Callable[[Violation], None],
        *,
        segment_records: int,
    ) -> None:
        self.records: list[Record] = []
        self.fold = Fold()
        self.checkpoint: Checkpoint | None = None
        self.oldest_index = 1
        self.counts: dict[str, int] = {}
        self.damaged: set[str] = set()
        """Keys that the nemesis changed behind everyone's back."""
        self.beyond_repair: set[str] = set()
        self.digest = hashlib.blake2b(digest_size=8)
        self._generation = generation
        self._table = table
        self._owner_of = owner_of
        self._report = report
        self._segment_records = segment_records
        self._data = f"g/{generation}/d/"
        self._chunks = f"g/{generation}/b/"
        self._wal = f"g/{generation}/wal/"
        self._merkle = f"g/{generation}/merkle/"
        self._checkpoint_key = f"g/{generation}/checkpoint"
        self._digests: dict[tuple[str, bytes], bytes] = {}
        self._places: dict[str, str] = {}

    # -- what was

    def stored_value(self, key: str) -> bytes | None:
        """What a logical key's data key stands for in the store, chunks put together."""
        item = self._table.read(self.where(key))
        manifest = decode_manifest(item.value) if item is not None else None
        if item is None or manifest is None:
            return item.value if item is not None else None
        pieces = self._table.items(f"{self._chunks}{manifest.name}/0")
        return b"".join(piece.value for piece in pieces)

    def where(self, key: str) -> str:
        """A logical key's data key."""
        found = self._places.get(key)
        if found is None:
            found = self._places[key] = physical_key(self._generation, key)
        return found

    def digest_of(self, key: str, value: bytes) -> bytes:
        """The index's digest of an entry, computed once."""
        found = self._digests.get((key, value))
        if found is None:
            found = self._digests[key, value] = entry_digest(key, value)
        return found

    # -- judging

    def applied(self, applied: Applied) -> None:
        """A transaction took effect just now."""
        self.digest.update(f"{applied.at_s:.9f} {applied.node} {applied.index} {len(applied.ops)}\n".encode())
        data: dict[str, bytes | None] = {}
        record: tuple[str, bytes] | None = None
        upkeep: list[str] = []
        for op in applied.ops:
            match op:
                case Set(key, value) | Cas(key, value):
                    if key.startswith(self._data):
                        data[key] = value
                    elif key.startswith(self._wal):
                        record = (key, value)
                    elif key.startswith((self._merkle, self._chunks)):
                        upkeep.append("flush" if key.startswith(self._merkle) else "chunk")
                    elif key == self._checkpoint_key:
                        upkeep.append("checkpoint")
                        self._checkpointed(value)
                case Delete(key):
                    if key.startswith(self._data):
                        data[key] = None
                    elif key.startswith(self._merkle) or key == self._checkpoint_key:
                        upkeep.append("flush")
                case DeleteTree(prefix):
                    if prefix.startswith(self._wal):
                        upkeep.append("collect")
                        self._collected(prefix)
                    elif prefix.startswith(self._merkle):
                        upkeep.append("rebuild")
                    elif prefix.startswith(self._chunks):
                        upkeep.append("collect chunks")
                    elif prefix.startswith(self._data) or self._data.startswith(prefix):
                        self._violated("P4", f"data was deleted by prefix {prefix}")
                case _:
                    pass
        if record is not None:
            self._recorded(applied, *record, data)
        elif data and self._repairs(data):
            upkeep.append("repair")
        elif data:
            self._violated("P4", f"{applied.node} changed data without a record: {sorted(data)[:3]}")
        for what in dict.fromkeys(upkeep):
            self.counts[what] = self.counts.get(what, 0) + 1
        for what in upkeep[:1]:
            self._require_holder(applied, what)

    def _recorded(self, applied: Applied, key: str, raw: bytes, data: dict[str, bytes | None]) -> None:
        last = self.records[-1] if self.records else None
        try:
            record = Record.decode(raw, expect_prev=last.chain_hash if last is not None else None)
        except CorruptRecord as error:
            self._violated(
                "P2", f"{applied.node} wrote {key}, which does not follow record {len(self.records)}: {error}"
            )
            return
        if record.index != len(self.records) + 1:
            self._violated("P2", f"{applied.node} wrote record {record.index} after record {len(self.records)}")
            return
        if last is not None and record.header.epoch < last.header.epoch:
            self._violated("P2", f"record {record.index} has epoch {record.header.epoch} after {last.header.epoch}")
        self.records.append(record)
        kind = f"{record.header.kind} record"
        self.counts[kind] = self.counts.get(kind, 0) + 1
        try:
            said = self.fold.feed(record)
        except BadLog as error:
            self._violated("P2", str(error))
            return
        if said is None:
            self._rolled(record, data)
        elif {self.where(key): value for key, value in said.items()} != data:
            self._violated("P4", f"record {record.index} says other changes than its transaction made")
        if applied.node != GENESIS_NODE:
            self._require_holder(applied, f"record {record.index}", epoch=record.header.epoch)

    def _repairs(self, data: dict[str, bytes | None]) -> bool:
        """Whether data without a record puts right what the nemesis changed, and nothing else."""
        names = {self.where(key): key for key in self.damaged}
        return all(where in names and self.stored_value(names[where]) == self.newest(names[where]) for where in data)

    def newest(self, key: str) -> bytes | None:
        """What the log says a key has now."""
        versions = self.fold.versions.get(key)
        return versions[-1][1] if versions else None

    def repaired(self, oldest_index: int) -> None:
        """Everything was repaired that can be from records ``oldest_index`` on: what is older than these is lost."""
        for key in self.damaged:
            versions = self.fold.versions.get(key)
            if versions and versions[-1][0] < oldest_index:
                self.beyond_repair.add(key)

    def _rolled(self, record: Record, data: dict[str, bytes | None]) -> None:
        """Data keys of a large batch: each gets the value that its commit record made true."""
        names = {self.where(key): key for key in self.fold.unrolled}
        for where in data:
            key = names.get(where)
            if key is None or self.stored_value(key) != self.fold.unrolled[key]:
                self._violated("P4", f"record {record.index} rolls {where} to what no commit record made true")
        if record.header.large is not None and record.header.large.done:
            for key, value in self.fold.unrolled.items():
                if self.stored_value(key) != value:
                    self._violated("P4", f"record {record.index} says done, but {key} is not in its data key")
            self.fold.rolled()

    def _require_holder(self, applied: Applied, what: str, *, epoch: int | None = None) -> None:
        lock, stored = self._table.read(LOCK_KEY), self._table.read(EPOCH_KEY)
        if lock is None or not lock.session or stored is None:
            self._violated("P11", f"{applied.node} wrote ({what}) while nobody held the lock")
            return
        current = decode_epoch(stored)
        if current.session != lock.session or self._owner_of(lock.session) != applied.node:
            holder = self._owner_of(lock.session)
            self._violated("P11", f"{applied.node} wrote ({what}) while {holder} held the lock")
        elif epoch is not None and epoch != current.number:
            self._violated("P11", f"{applied.node} wrote ({what}) as epoch {epoch} during epoch {current.number}")

    def _checkpointed(self, raw: bytes) -> None:
        try:
            checkpoint = decode_checkpoint(self._generation, raw)
        except Corrupt as error:
            self._violated("P8", str(error))
            return
        before = self.checkpoint
        if before is not None and checkpoint.head_index < before.head_index:
            self._violated("P8", f"the checkpoint went back from {before.head_index} to {checkpoint.head_index}")
        if checkpoint.head_index > len(self.records):
            self._violated("P8", f"a checkpoint of record {checkpoint.head_index}, which does not exist")
        elif self.records[checkpoint.head_index - 1].chain_hash != checkpoint.head_hash:
            self._violated("P8", f"a checkpoint of another record {checkpoint.head_index}")
        self.checkpoint = checkpoint

    def _collected(self, prefix: str) -> None:
        name = prefix.removeprefix(self._wal).removesuffix("/")
        if not name.isdigit():
            self._violated("P13", f"{prefix} was collected")
            return
        last = (int(name) + 1) * self._segment_records - 1
        if last < self.oldest_index:
            return
        if int(name) * self._segment_records > self.oldest_index:
            self._violated("P13", f"segment {name} was collected before record {self.oldest_index}")
        needed = 1 if self.checkpoint is None else self.checkpoint.scan_from
        if last >= min(needed, len(self.records)):
            self._violated("P13", f"record {last} was collected, recovery needs {needed}")
        spans = [(batch.first, len(self.records)) for batch in self.fold.open.values()] + self.fold.spans
        for first, commit in spans:
            # A commit record that is older than what recovery reads may lose its parts a moment before it goes itself.
            if first <= last < commit and commit >= needed:
                what = f"record {last} was collected, a part of a batch"
                self._violated("P13", f"{what} of records {first} to {commit} whose commit record stays or comes")
        self.oldest_index = last + 1

    def _violated(self, checker: str, text: str) -> None:
        self._report(Violation(checker, text))
