"""A store generation from outside its tenure: dropping one, reading one entry. Making one: ``genesis.py``."""

from __future__ import annotations

from consul_backend.chunks import read_value
from consul_backend.fenced import fenced_idempotent
from consul_backend.keys import encode_partition, encode_path, own_folders, split_key
from consul_backend.physical import PhysicalStore
from consul_backend.tenure import Tenure
from consul_backend.txn import DeleteTree


def physical_key(generation: str, key: str) -> str:
    """Where a logical key is stored. Raises ValueError for a malformed key."""
    cls, partition, path = split_key(key)
    return f"g/{generation}/d/{encode_partition(cls, partition)}/{encode_path(path)}"


async def read_entry(physical: PhysicalStore, generation: str, key: str) -> bytes | None:
    """One entry without an index, for nodes that are not active; None means proven absence."""
    while True:
        item = await physical.get(physical_key(generation, key), consistent=True)
        if item is None:
            return None
        value = await read_value(physical, generation, item.value, consistent=True)
        if value is not None:
            return value
        again = await physical.get(physical_key(generation, key), consistent=True)
        if again is not None and again.modify_index == item.modify_index:
            return item.value  # no manifest of ours, or chunks that are gone: whoever reads it will not take it


async def drop_generation(physical: PhysicalStore, generation: str, tenure: Tenure) -> None:
    """Delete everything of a generation that is no longer pointed to, fenced, a folder at a time: one big deletion
    would occupy Consul for long. What is not ours goes with the last deletion. Can be repeated. Raises FenceLost and
    what the store raises."""
    root = f"g/{generation}/"
    for folder in ("d/", "merkle/"):
        for cls in own_folders(await physical.list(root + folder, consistent=True)):
            for partition in own_folders(await physical.list(root + folder + cls, consistent=True)):
                await fenced_idempotent(physical, tenure, [DeleteTree(root + folder + cls + partition)])
    for name in own_folders(await physical.list(root + "b/", consistent=True)):
        await fenced_idempotent(physical, tenure, [DeleteTree(f"{root}b/{name}")])
    for segment in own_folders(await physical.list(root + "wal/", consistent=True)):
        await fenced_idempotent(physical, tenure, [DeleteTree(f"{root}wal/{segment}")])
    await fenced_idempotent(physical, tenure, [DeleteTree(root)])
