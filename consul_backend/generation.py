"""A store generation from outside its tenure: making one, dropping one, reading one entry."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence

from consul_backend.batching import Preparer
from consul_backend.chunks import read_value
from consul_backend.errors import Conflict, OutcomeUnknown
from consul_backend.fenced import fenced_idempotent
from consul_backend.keys import encode_partition, encode_path, split_key
from consul_backend.physical import PhysicalStore
from consul_backend.position import Position
from consul_backend.tenure import Tenure
from consul_backend.txn import Cas, DeleteTree, Op
from consul_backend.wal import BATCH_ID_BYTES, GENESIS_INDEX, GENESIS_PREV, Record, Write, record_key

_ATTEMPTS = 5
_PAUSE_S = 0.1


def physical_key(generation: str, key: str) -> str:
    """Where a logical key is stored. Raises ValueError for a malformed key."""
    cls, partition, path = split_key(key)
    return f"g/{generation}/d/{encode_partition(cls, partition)}/{encode_path(path)}"


async def read_entry(physical: PhysicalStore, generation: str, key: str, consistent: bool = True) -> bytes | None:
    """One entry without an index, for nodes that are not active; None means proven absence."""
    while True:
        item = await physical.get(physical_key(generation, key), consistent=consistent)
        if item is None:
            return None
        value = await read_value(physical, generation, item.value, consistent=consistent)
        if value is not None:
            return value
        again = await physical.get(physical_key(generation, key), consistent=True)
        if again is not None and again.modify_index == item.modify_index:
            return item.value  # no manifest of ours, or chunks that are gone: whoever reads it will not take it


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
) -> None:
    """Begin a generation: one transaction of ``guard``, record 1 and ``writes``, none of which may exist yet.

    A lost answer is resolved by sending the same again and reading record 1. Raises Conflict (a guard failed or
    something exists), TooLarge, PermissionDenied, Unavailable; OutcomeUnknown when it stays unknown.
    """
    preparer = Preparer(generation, physical.limits)
    entries = preparer.prepare_all(writes)
    groups: dict[tuple[str, str], list[tuple[str, bytes | None]]] = {}
    ops: list[Op] = [*guard]
    for write in entries.values():
        if write.value is None:
            raise ValueError(f"a genesis deletes nothing, but {write.key!r} is to be deleted")
        groups.setdefault(write.group, []).append((write.path, write.value))
    record = Record.build(
        index=GENESIS_INDEX,
        prev_hash=GENESIS_PREV,
        epoch=0,
        writer=node_id,
        batch_id=random_bytes(BATCH_ID_BYTES),
        time_ms=time_ms,
        kind="genesis",
        positions=positions or {},
        groups=dict(groups),
    )
    key, raw = record_key(generation, GENESIS_INDEX, GENESIS_INDEX + 1), record.encode()
    ops.append(Cas(key, raw, 0))
    ops += [Cas(write.op.key, write.value, 0) for write in entries.values() if write.value is not None]
    for attempt in range(_ATTEMPTS):
        try:
            await physical.txn(ops)
        except OutcomeUnknown:
            if attempt == _ATTEMPTS - 1:
                raise
            await asyncio.sleep(_PAUSE_S)
        except Conflict:
            found = await physical.get(key, consistent=True)
            if found is None or found.value != raw:
                raise
            return
        else:
            return


async def drop_generation(physical: PhysicalStore, generation: str, tenure: Tenure) -> None:
    """Delete everything of a generation that is no longer pointed to, fenced, a folder at a time: one big deletion
    would occupy Consul for long. Can be repeated. Raises FenceLost and what the store raises."""
    root = f"g/{generation}/"
    for folder in ("d/", "merkle/"):
        for cls in await physical.list(root + folder, consistent=True):
            for partition in await physical.list(root + folder + cls, consistent=True):
                await fenced_idempotent(physical, tenure, [DeleteTree(root + folder + cls + partition)])
    for name in await physical.list(root + "b/", consistent=True):
        await fenced_idempotent(physical, tenure, [DeleteTree(f"{root}b/{name}")])
    for segment in await physical.list(root + "wal/", consistent=True):
        await fenced_idempotent(physical, tenure, [DeleteTree(f"{root}wal/{segment}")])
    await fenced_idempotent(physical, tenure, [DeleteTree(root)])
