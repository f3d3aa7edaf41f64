"""The first records of a store generation, written before anybody reads it.

Nothing points to a generation while it is being made, so it needs no atomicity: what fits no transaction goes in
several, each an ordinary record with its entries. What makes the generation visible (``guard``, or a flip of the
pointer afterwards) comes last; a crash before it leaves keys that the next tenure deletes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence

from consul_backend.batching import GROUP_FRAME_BYTES, Prepared, Preparer
from consul_backend.errors import Conflict, OutcomeUnknown, TooLarge
from consul_backend.fenced import guards
from consul_backend.limits import Limits, base64_bytes, body_bytes
from consul_backend.physical import PhysicalStore
from consul_backend.position import Position
from consul_backend.tenure import Tenure
from consul_backend.txn import Cas, Op
from consul_backend.wal import BATCH_ID_BYTES, GENESIS_INDEX, GENESIS_PREV, SEGMENT_RECORDS, Record, Write, record_key

_ATTEMPTS = 5
_PAUSE_S = 0.1
_RECORD_BYTES = 1024  # the header but for its groups, with positions, and the record's own operation
_CAS_BYTES = 16  # a ``cas`` is that much longer than the ``set`` which a prepared write counts


async def genesis(
    physical: PhysicalStore,
    generation: str,
    writes: Sequence[Write],
    *,
    node_id: str,
    time_ms: int,
    random_bytes: Callable[[int], bytes],
    positions: Mapping[str, Position] | None = None,
    guard: Sequence[Op] = (),
    tenure: Tenure | None = None,
    segment_records: int = SEGMENT_RECORDS,
) -> None:
    """Begin a generation with ``writes``, none of which may exist yet; ``guard`` goes with the last transaction, and
    every one is fenced by ``tenure``, if there is one.

    A lost answer is resolved by sending the same again and reading the record. Raises Conflict (a guard or fence failed
    or something exists), TooLarge, PermissionDenied, Unavailable; OutcomeUnknown when it stays unknown.
    """
    fence = guards(tenure) if tenure is not None else []
    entries = Preparer(generation, physical.limits).prepare_all(writes)
    for write in entries.values():
        if write.value is None:
            raise ValueError(f"a genesis deletes nothing, but {write.key!r} is to be deleted")
    pieces = _pieces(list(entries.values()), physical.limits, [*fence, *guard])
    if GENESIS_INDEX + len(pieces) > segment_records:
        raise TooLarge(f"a genesis of {len(pieces)} transactions, the first segment of the log has {segment_records}")
    prev = GENESIS_PREV
    for number, piece in enumerate(pieces):
        last = number == len(pieces) - 1
        record = Record.build(
            index=GENESIS_INDEX + number,
            prev_hash=prev,
            epoch=0,
            writer=node_id,
            batch_id=random_bytes(BATCH_ID_BYTES),
            time_ms=time_ms,
            kind="data" if number else "genesis",
            positions=(positions or {}) if last else {},
            groups=_groups(piece),
        )
        prev = record.chain_hash
        created = [Cas(write.op.key, write.value, 0) for write in piece if write.value is not None]
        log = Cas(record_key(generation, record.index, segment_records), record.encode(), 0)
        await _write_once(physical, [*fence, *(guard if last else ()), log, *created], log)


async def _write_once(physical: PhysicalStore, ops: Sequence[Op], record: Cas) -> None:
    for attempt in range(_ATTEMPTS):
        try:
            await physical.txn(ops)
        except OutcomeUnknown:
            if attempt == _ATTEMPTS - 1:
                raise
            await asyncio.sleep(_PAUSE_S)
        except Conflict:
            found = await physical.get(record.key, consistent=True)
            if found is None or found.value != record.value:
                raise
            return
        else:
            return


def _pieces(entries: Sequence[Prepared], limits: Limits, beside: Sequence[Op]) -> list[list[Prepared]]:
    """The entries of each transaction, in order; the limits hold for each with ``beside`` in it. Raises TooLarge for an
    entry that fits none."""
    ops_max = limits.ops_max - 1 - len(beside)
    room_max = limits.body_bytes_max - body_bytes(beside, limits.prefix_bytes) - base64_bytes(_RECORD_BYTES)
    pieces: list[list[Prepared]] = [[]]
    room = room_max
    for entry in entries:
        cost = entry.op_bytes + _CAS_BYTES + base64_bytes(entry.record_bytes + GROUP_FRAME_BYTES + len(entry.group[1]))
        if cost > room_max:
            raise TooLarge(f"an entry of {cost} bytes in a transaction, one has room for {room_max}")
        if len(pieces[-1]) >= ops_max or cost > room:
            pieces.append([])
            room = room_max
        pieces[-1].append(entry)
        room -= cost
    return pieces


def _groups(entries: Sequence[Prepared]) -> dict[tuple[str, str], Sequence[tuple[str, bytes | None]]]:
    groups: dict[tuple[str, str], list[tuple[str, bytes | None]]] = {}
    for write in entries:
        groups.setdefault(write.group, []).append((write.path, write.value))
    return dict(groups)
