"""How batches are packed into one store transaction. Pure.

A commit transaction holds, in order: the fence, the chain check, the data operations, the record. Whole batches are
added in the order of arrival as long as everything fits the store's limits; several writes of one key share one
operation and one entry of the record, the last one wins. Values count twice: as data and inside the record.

Sizes are exact for the data operations and an upper bound for the record, so what is packed always fits.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from consul_backend.errors import TooLarge
from consul_backend.keys import encode_partition, encode_path, split_key
from consul_backend.limits import BODY_OVERHEAD_BYTES, KEY_BYTES_MAX, Limits, base64_bytes, op_bytes
from consul_backend.merkle import PATH_BYTES_MAX, entry_digest
from consul_backend.physical import LOCK_KEY
from consul_backend.position import Position
from consul_backend.txn import Cas, CheckIndex, CheckSession, Delete, Set
from consul_backend.wal import Write

OVERHEAD_OPS = 3
"""Fence, chain check and record."""

MANIFEST_MAGIC = b"\x00outrider-chunks\x00"
"""A data key that begins so holds no value but says where its chunks are (:mod:`consul_backend.chunks`). A value that
happens to begin so is stored in chunks itself, whatever its size."""

_ENTRY_FRAME_BYTES = 11  # array of two, a string and a bytes header of at most five each
GROUP_FRAME_BYTES = 64  # header item with its 32-byte digest and count, headers of the body and its array
_RECORD_FRAME_BYTES = 225  # the header's fixed fields at their longest, the hashes, the outer array
_POSITIONS_RESERVE_BYTES = 512  # so that a position arriving before a queued batch does not push it over the limit
_INDEX_MAX = (1 << 64) - 1

_GROUPS_KEPT_MAX = 4096

_PLAIN_PATH = re.compile(r"[A-Za-z0-9-]+(?:/[A-Za-z0-9-]+)*\Z")  # stands for itself when encoded
_encode_positions = msgspec.msgpack.Encoder().encode


class NeedsParts(TooLarge):
    """Nothing is wrong with the write but its size: no single transaction holds it (``large_batch.py``)."""


class Prepared(msgspec.Struct, gc=False):
    """One write with everything computed once: names, operation, entry digest (None: a deletion), sizes."""

    key: str
    group: tuple[str, str]
    path: str
    value: bytes | None
    digest: bytes | None
    op: Set | Delete
    op_bytes: int
    record_bytes: int


class Batch:
    """What one caller wants committed together: writes by key, and positions to record with them."""

    __slots__ = ("alone", "positions", "size_bytes", "writes")

    def __init__(self, writes: dict[str, Prepared], positions: Mapping[str, Position] | None) -> None:
        self.writes = writes
        self.positions = positions
        self.size_bytes = 0
        for write in writes.values():
            self.size_bytes += write.op_bytes + write.record_bytes
        self.alone = False


class Preparer:
    """Turns logical writes into prepared ones, under one generation's prefix."""

    def __init__(self, generation: str, limits: Limits) -> None:
        self._prefix = f"g/{generation}/d/"
        self._limits = limits
        self._groups: dict[str, tuple[tuple[str, str], str]] = {}

    def prepare(self, write: Write, *, any_size: bool = False) -> Prepared:
        """Raises ValueError for a malformed key, TooLarge for a key that no transaction can hold, NeedsParts (unless
        ``any_size``) for such a value."""
        key, value = write.key, write.value
        cut = key.find("/", 2)
        path = key[cut + 1 :]
        known = self._groups.get(key[:cut]) if cut > 0 and path else None
        group, prefix = known or self._group(key)
        encoded = path if _PLAIN_PATH.match(path) else encode_path(path)
        where = prefix + encoded
        path_bytes = len(path) if path.isascii() else len(path.encode())
        if path_bytes > PATH_BYTES_MAX or len(where) > KEY_BYTES_MAX:
            raise TooLarge(f"a key of {len(where)} bytes as stored, the limit is {KEY_BYTES_MAX}")
        frame = _ENTRY_FRAME_BYTES + path_bytes
        if value is None:
            delete = Delete(where)
            size = op_bytes(delete, self._limits.prefix_bytes)
            return Prepared(key, group, path, None, None, delete, size, frame)
        if not any_size and (len(value) > self._limits.value_bytes_max or value.startswith(MANIFEST_MAGIC)):
            raise NeedsParts(f"a value of {len(value)} bytes, the store takes {self._limits.value_bytes_max}")
        put = Set(where, value)
        size = op_bytes(put, self._limits.prefix_bytes)
        digest = entry_digest(key, value)
        return Prepared(key, group, path, value, digest, put, size, frame + len(value))

    def _group(self, key: str) -> tuple[tuple[str, str], str]:
        """The group of a key and what its stored names begin with; kept, because thousands of keys share them."""
        cls, partition, _ = split_key(key)
        if len(self._groups) >= _GROUPS_KEPT_MAX:
            self._groups.clear()
        found = (cls, partition), f"{self._prefix}{encode_partition(cls, partition)}/"
        self._groups[f"{cls}/{partition}"] = found
        return found

    def prepare_all(self, writes: Iterable[Write]) -> dict[str, Prepared]:
        """Writes by key; of several of one key the last counts. Raises as :meth:`prepare`."""
        return {write.key: self.prepare(write) for write in writes}


class Budget:
    """What one transaction of this tenure has room for."""

    def __init__(self, limits: Limits, *, session: str, record_key: str, writer: str) -> None:
        prefix = limits.prefix_bytes
        self.ops_max = limits.ops_max - OVERHEAD_OPS
        self.record_bytes_max = limits.value_bytes_max
        self.body_bytes_max = limits.body_bytes_max
        self.fixed_body_bytes = (
            BODY_OVERHEAD_BYTES
            + op_bytes(CheckSession(LOCK_KEY, session), prefix)
            + op_bytes(CheckIndex(record_key, _INDEX_MAX), prefix)
            + op_bytes(Cas(record_key, b"", 0), prefix)
        )
        self.fixed_record_bytes = _RECORD_FRAME_BYTES + len(writer.encode())


class Packing:
    """The contents of one transaction while it fills: ``entries`` by key, ``positions``, ``batches``."""

    __slots__ = ("_budget", "_groups", "_op_bytes", "_record_bytes", "batches", "entries", "positions")

    def __init__(self, budget: Budget, positions: Mapping[str, Position]) -> None:
        self._budget = budget
        self._groups: set[tuple[str, str]] = set()
        self._op_bytes = 0
        self._record_bytes = budget.fixed_record_bytes + _positions_bytes(positions)
        self.batches: list[Batch] = []
        self.entries: dict[str, Prepared] = {}
        self.positions: Mapping[str, Position] = positions

    def add(self, batch: Batch) -> bool:
        """Take ``batch`` in whole; False, changing nothing, when it does not fit beside what is there."""
        entries, known = self.entries, self._groups
        ops, op_size, record_size = len(entries), self._op_bytes, self._record_bytes
        groups: set[tuple[str, str]] = set()
        for key, write in batch.writes.items():
            old = entries.get(key)
            if old is None:
                ops += 1
                op_size += write.op_bytes
                record_size += write.record_bytes
                if write.group not in known and write.group not in groups:
                    groups.add(write.group)
                    record_size += GROUP_FRAME_BYTES + len(write.group[1].encode())
            else:
                op_size += write.op_bytes - old.op_bytes
                record_size += write.record_bytes - old.record_bytes
        positions = self.positions
        if batch.positions:
            positions = {**positions, **batch.positions}
            record_size += _positions_bytes(positions) - _positions_bytes(self.positions)
        if self._excess(ops, op_size, record_size) is not None:
            return False
        self._op_bytes, self._record_bytes, self.positions = op_size, record_size, positions
        known |= groups
        entries.update(batch.writes)
        self.batches.append(batch)
        return True

    def _excess(self, ops: int, op_size: int, record_size: int) -> str | None:
        budget = self._budget
        if ops > budget.ops_max:
            return f"{ops} keys, one transaction of this store takes {budget.ops_max}"
        if record_size > budget.record_bytes_max:
            return f"a record of about {record_size} bytes, the store takes {budget.record_bytes_max}"
        body = budget.fixed_body_bytes + op_size + base64_bytes(record_size)
        if body > budget.body_bytes_max:
            return f"a request of about {body} bytes, the store takes {budget.body_bytes_max}"
        return None

    @property
    def record_bytes(self) -> int:
        """Upper bound of the record's size."""
        return self._record_bytes

    def groups(self) -> dict[tuple[str, str], Sequence[tuple[str, bytes | None]]]:
        """The entries as the record takes them."""
        groups: dict[tuple[str, str], list[tuple[str, bytes | None]]] = {}
        for write in self.entries.values():
            found = groups.get(write.group)
            if found is None:
                groups[write.group] = [(write.path, write.value)]
            else:
                found.append((write.path, write.value))
        return dict(groups)


def require_fits_alone(batch: Batch, budget: Budget, positions: Mapping[str, Position]) -> None:
    """Raises NeedsParts, naming size and limit, when no transaction can hold ``batch`` even by itself."""
    if len(batch.writes) == 1 and not batch.positions and batch.size_bytes < budget.body_bytes_max // 8:
        return
    groups = {write.group for write in batch.writes.values()}
    merged = {**positions, **batch.positions} if batch.positions else positions
    record_size = budget.fixed_record_bytes + _positions_bytes(merged) + _POSITIONS_RESERVE_BYTES
    record_size += sum([GROUP_FRAME_BYTES + len(partition.encode()) for _, partition in groups])
    op_size = 0
    for write in batch.writes.values():
        op_size += write.op_bytes
        record_size += write.record_bytes
    problem = Packing(budget, {})._excess(len(batch.writes), op_size, record_size)
    if problem is not None:
        raise NeedsParts(problem)


def take(pending: deque[Batch], budget: Budget, positions: Mapping[str, Position]) -> Packing:
    """The longest run of whole batches from the front of ``pending`` that fits one transaction, removed from it.

    A batch marked ``alone`` travels by itself. The packing is empty only when ``pending`` is, or when its first batch
    does not fit at all: then the caller must remove and refuse it.
    """
    packing = Packing(budget, positions)
    while pending:
        batch = pending[0]
        if batch.alone and packing.batches:
            break
        if not packing.add(batch):
            break
        pending.popleft()
        if batch.alone:
            break
    return packing


def _positions_bytes(positions: Mapping[str, Position]) -> int:
    return len(_encode_positions(positions)) if positions else 1
